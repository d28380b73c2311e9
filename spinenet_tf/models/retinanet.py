"""RetinaNet on any backbone that returns {'P3': ..., ...}."""

import math

import gin
import keras

from spinenet_tf import specs
from spinenet_tf.models import heads
from spinenet_tf.models.backbones import backbone_of
from spinenet_tf.models.layers import Style

PRIOR = 0.01  # foreground probability at the start of training, section 4.1 of the RetinaNet paper


@gin.configurable
def RetinaNet(  # noqa: N802
    size: str = "49",
    *,
    num_classes: int = 91,
    anchors_per_place: int = 9,
    convs: int | None = None,
    filters: int | None = None,
    endpoints: int | None = None,
    backbone: keras.Model | None = None,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    **style,
) -> keras.Model:
    """Builds a RetinaNet detector (section 4.1).

    Args:
      size: names the backbone and the subnets (`specs.SIZES`, `specs.RETINANET_HEADS`).
      num_classes: with the background, class 0, which is never predicted; COCO has 91.
      anchors_per_place: scales times aspect ratios.
      convs, filters, endpoints: override the size's subnets (see `specs.DenseHead`).
      backbone: any model that returns a pyramid; by default the size's.
      input_shape: (height, width, 3), None where dynamic; ignored with `backbone`.
      **style: fields of `Style`, for backbone and subnets.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> {'class': {'P3': [b, h3, w3,
      anchors * num_classes] logits, ...}, 'box': {'P3': [b, h3, w3, anchors * 4], ...}}, float32,
      channels anchor-major.

    Raises:
      ValueError: unknown size or style, or num_classes below 2.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: it counts the background, so 2 at least")
    head = specs.row(specs.RETINANET_HEADS, size, convs=convs, filters=filters, endpoints=endpoints)
    if backbone is None:
        backbone = backbone_of(size, input_shape=input_shape, endpoints=head.endpoints, **style)
    shared = dict(
        convs=head.convs, filters=head.filters, separable=head.separable, style=Style(**style)
    )
    classes = heads.dense(
        backbone.output, anchors_per_place * num_classes,
        bias=-math.log((1 - PRIOR) / PRIOR), name="class", **shared,
    )  # fmt: skip
    boxes = heads.dense(backbone.output, anchors_per_place * 4, bias=0.0, name="box", **shared)
    outputs = {"class": classes, "box": boxes}
    return keras.Model(backbone.input, outputs, name=f"retinanet_{size.lower()}")
