"""Image classification on a pyramid (section 4.2) or on a ResNet's last features."""

import gin
import keras

from spinenet_tf import specs
from spinenet_tf.models.backbones import backbone_of
from spinenet_tf.models.keras_layers import Upsample
from spinenet_tf.models.layers import Style, float32
from spinenet_tf.models.resnet import ResNet


@gin.configurable
def Classifier(  # noqa: N802
    size: str = "49",
    *,
    num_classes: int = 1001,
    backbone: keras.Model | None = None,
    input_shape: tuple[int | None, int | None, int] = (224, 224, 3),
    **style,
) -> keras.Model:
    """Builds a classifier.

    A SpineNet's is the linear classifier of the mean over P3..P7, which are upsampled to P3 and
    averaged over space: 256 features for SpineNet-49. A ResNet's reads the mean of C5, 2048.

    Args:
      size: 'R34', 'R50', 'R101', 'R152' or a SpineNet.
      num_classes: with the background, class 0: ImageNet 1001, iNaturalist-2017 5090.
      backbone: any model that returns {'P3': ...} or {'C5': ...}; by default the size's.
      input_shape: (height, width, 3), None where dynamic; ignored with `backbone`.
      **style: fields of `Style`.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> [b, num_classes] float32 logits.

    Raises:
      ValueError: unknown size or style.
    """
    if backbone is None:
        build = ResNet if size in specs.RESNETS else backbone_of
        backbone = build(size, input_shape=input_shape, **style)
    features = backbone.output
    x = features["C5"] if "C5" in features else average(features, backbone.input)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    dense = keras.layers.Dense(
        num_classes,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        kernel_regularizer=Style(**style).decay(),
        name="class_predict",
    )
    return keras.Model(backbone.input, float32(dense(x)), name=f"classifier_{size.lower()}")


def average(features: dict, image):
    """The mean of a pyramid's maps at the size of the lowest, [b, h, w, c].

    Upsampled level by level and added on the way, as in the official code: at 224 px, where P7 is
    2 rows high and P5 7, other rows are read than by upsampling each level at once.
    """
    levels = sorted((int(name[1:]) for name in features), reverse=True)
    x = features[f"P{levels[0]}"]
    for level in levels[1:]:
        x = Upsample(level, name=f"average_up{level}")([x, image])
        x = keras.layers.Add(name=f"average_p{level}")([x, features[f"P{level}"]])
    return keras.layers.Rescaling(1 / len(levels), name="average")(x)
