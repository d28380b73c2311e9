"""Mask R-CNN on any backbone that returns {'P3': ..., ...} (section 4.1)."""

import gin
import keras

from spinenet_tf import specs
from spinenet_tf.models.backbones import backbone_of
from spinenet_tf.models.keras_layers import MapDense
from spinenet_tf.models.layers import Style, float32
from spinenet_tf.models.strips import around, cut, join, strips_of_pyramid

BOX_CELLS, MASK_CELLS = 7, 14  # sides of the regions' features
MASK_SIZE = 2 * MASK_CELLS  # side of a predicted mask


@gin.configurable
def MaskRCNN(  # noqa: N802
    size: str = "49",
    *,
    num_classes: int = 91,
    anchors_per_place: int = 3,
    rpn_convs: int | None = None,
    convs: int | None = None,
    filters: int | None = None,
    fc: int | None = None,
    endpoints: int | None = None,
    box_convs: int | None = None,
    fcs: int | None = None,
    norm: bool | None = None,
    backbone: keras.Model | None = None,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    **style,
) -> keras.Model:
    """Builds the networks of a Mask R-CNN as one model of three, which a task calls one by one.

    What lies between them (proposals, RoIAlign) has no weights and is `ops.rois`. Use
    `model.get_layer(name)` with 'rpn', 'box_head' or 'mask_head'.

    Args:
      size: names the backbone and the subnets (`specs.REGION_HEADS`).
      num_classes: with the background, class 0; COCO has 91.
      anchors_per_place: scales times aspect ratios.
      rpn_convs, convs, filters, fc, endpoints, box_convs, fcs, norm: override the size's subnets
        (see `specs.RegionHead`).
      backbone: any model that returns a pyramid; by default the size's.
      input_shape: (height, width, 3), None where dynamic; ignored with `backbone`.
      **style: fields of `Style`, for backbone and subnets.

    Returns:
      A functional model of three inputs, {'image': [b, h, w, 3], 'box_rois': [n, 7, 7, c],
      'mask_rois': [m, 14, 14, c]} -> {'rpn': {'features': {'P3': ...}, 'score': {'P3': [b, h3, w3,
      anchors]}, 'box': {'P3': [b, h3, w3, anchors * 4]}}, 'box_head': {'class': [n, num_classes]
      logits, 'box': [n, num_classes * 4]}, 'mask_head': [m, 28, 28, num_classes] logits}; all but
      the features float32.

    Raises:
      ValueError: unknown size or style, or num_classes below 2.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: it counts the background, so 2 at least")
    head = specs.row(
        specs.REGION_HEADS, size, rpn_convs=rpn_convs, convs=convs, filters=filters, fc=fc,
        endpoints=endpoints, box_convs=box_convs, fcs=fcs, norm=norm,
    )  # fmt: skip
    if backbone is None:
        backbone = backbone_of(size, input_shape=input_shape, endpoints=head.endpoints, **style)
    style = Style(**style)
    channels = backbone.output["P3"].shape[-1]
    parts = {
        "rpn": region_proposals(backbone, anchors_per_place, head, style),
        "box_head": box_head(channels, num_classes, head, style),
        "mask_head": mask_head(channels, num_classes, head, style),
    }
    inputs = {
        "image": keras.Input(backbone.input.shape[1:], name="image"),
        "box_rois": keras.Input((BOX_CELLS, BOX_CELLS, channels), name="box_rois"),
        "mask_rois": keras.Input((MASK_CELLS, MASK_CELLS, channels), name="mask_rois"),
    }
    pairs = zip(parts.items(), inputs.values(), strict=True)
    outputs = {name: part(x) for (name, part), x in pairs}
    return keras.Model(inputs, outputs, name=f"mask_rcnn_{size.lower()}")


def region_proposals(
    backbone: keras.Model, anchors_per_place: int, head: specs.RegionHead, style: Style
) -> keras.Model:
    """The backbone and the region proposal network; see `MaskRCNN` for its outputs."""
    strips, padding = strips_of_pyramid(backbone.output)
    tower = [
        _conv(style, head.filters, 3, 0.01, f"rpn_{i}", padding) for i in range(head.rpn_convs)
    ]
    score = _conv(style, anchors_per_place, 1, 1e-5, "rpn_score")
    box = _conv(style, anchors_per_place * 4, 1, 1e-5, "rpn_box")
    outputs = {"features": backbone.output, "score": {}, "box": {}}
    for level, x in backbone.output.items():
        x = cut(x, strips[level])
        for i, conv in enumerate(tower):
            x = conv(around(x, strips[level], padding))
            x = _activate(x, head, style, f"rpn_{i}_{level.lower()}")
        outputs["score"][level] = float32(join(score(x), strips[level]))
        outputs["box"][level] = float32(join(box(x), strips[level]))
    return keras.Model(backbone.input, outputs, name="rpn")


def box_head(channels: int, num_classes: int, head: specs.RegionHead, style: Style) -> keras.Model:
    """[n, 7, 7, c] -> {'class': [n, num_classes] logits, 'box': [n, num_classes * 4]}, float32."""
    rois = keras.Input((BOX_CELLS, BOX_CELLS, channels))
    convs = head.convs if head.box_convs is None else head.box_convs
    x = _tower(rois, convs, head, style, "box_head")
    uniform = keras.initializers.VarianceScaling(1 / 3, "fan_out", "uniform")
    for name in ("box_head_fc", *(f"box_head_fc{i}" for i in range(2, head.fcs + 1))):
        x = _activate(_dense(x, style, head.fc, uniform, name), head, style, name)
    normal = keras.initializers.RandomNormal
    classes = _dense(x, style, num_classes, normal(stddev=0.01), "box_head_class")
    boxes = _dense(x, style, num_classes * 4, normal(stddev=0.001), "box_head_box")
    outputs = {"class": float32(classes), "box": float32(boxes)}
    return keras.Model(rois, outputs, name="box_head")


def mask_head(channels: int, num_classes: int, head: specs.RegionHead, style: Style) -> keras.Model:
    """[n, 14, 14, c] -> [n, 28, 28, num_classes] logits, float32."""
    rois = keras.Input((MASK_CELLS, MASK_CELLS, channels))
    x = _tower(rois, head.convs, head, style, "mask_head")
    x = keras.layers.Conv2DTranspose(
        head.filters, 2, 2, kernel_initializer=_he(), kernel_regularizer=style.decay(),
        name="mask_head_up",
    )(x)  # fmt: skip
    x = _activate(x, head, style, "mask_head_up")
    x = style.conv_layer(num_classes, 1, kernel_initializer=_he(), name="mask_head_predict")(x)
    return keras.Model(rois, float32(x), name="mask_head")


def _activate(x, head: specs.RegionHead, style: Style, name: str):
    """Batch norm, where the subnets have it, and the activation."""
    return style.act(style.norm(x, f"{name}_bn") if head.norm else x)


def _tower(x, convs: int, head: specs.RegionHead, style: Style, name: str):
    for i in range(convs):
        conv = style.conv_layer(
            head.filters, 3, padding="same", kernel_initializer=_he(), name=f"{name}_{i}"
        )
        x = _activate(conv(x), head, style, f"{name}_{i}")
    return x


def _conv(style: Style, filters: int, kernel: int, stddev: float, name: str, padding="same"):
    initializer = keras.initializers.RandomNormal(stddev=stddev)
    return style.conv_layer(
        filters, kernel, padding=padding, kernel_initializer=initializer, name=name
    )


def _dense(x, style: Style, units: int, initializer, name: str):
    kind = MapDense if len(x.shape) == 4 else keras.layers.Dense
    settings = dict(kernel_initializer=initializer, kernel_regularizer=style.decay())
    return kind(units, **settings, name=name)(x)


def _he():
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")
