"""The baselines' pyramids on a ResNet: FPN and NAS-FPN (Tables 2, 3 and 5)."""

from typing import NamedTuple

import gin
import keras

from spinenet_tf import graphs, specs
from spinenet_tf.models import layers
from spinenet_tf.models.keras_layers import Upsample
from spinenet_tf.models.layers import Style
from spinenet_tf.models.resnet import ResNet


class Merge(NamedTuple):
    """A merging cell of NAS-FPN, then a 3x3 convolution."""

    level: int
    combine: str  # 'sum', or 'attention': the first input gates the second
    inputs: tuple[int, int]  # 0 to 4 are the pyramid P3..P7 that comes in, 5 is the first cell
    adopted: tuple[int, ...] = ()  # added as it is: an input of this level that no cell reads


# NAS-FPN's 7 merging cells (arXiv 1904.07392, Figure 6). Attention's coarser input comes first.
NAS_FPN = (
    Merge(4, "attention", (3, 1)),
    Merge(4, "sum", (1, 5)),
    Merge(3, "sum", (0, 6)),
    Merge(4, "sum", (6, 7)),
    Merge(5, "attention", (8, 7), adopted=(2,)),
    Merge(7, "attention", (9, 6), adopted=(4,)),
    Merge(6, "attention", (10, 9)),
)
NAS_FPN_REPEATS = 7  # '7 @ 256' in NAS-FPN's tables


@gin.configurable
def ResNetFPN(  # noqa: N802 - a network's name, as in keras.applications
    size: str = "R50-FPN",
    *,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    endpoints: int = 256,
    **style,
) -> keras.Model:
    """Builds a ResNet with a pyramid network on it.

    Args:
      size: a row of `specs.PYRAMIDS`: 'R50-FPN', 'R101-FPN', 'R152-FPN' or 'R50-NAS-FPN'.
      input_shape: (height, width, 3); None where the size is only known at run time.
      endpoints: channels of P3..P7 and of all convolutions of the pyramid network.
      **style: fields of `Style`.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> {'P3': ..., 'P7': ...}, where
      P_l is [b, ceil(h / 2**l), ceil(w / 2**l), endpoints].

    Raises:
      ValueError: unknown size or style.
    """
    resnet, decoder = specs.row(specs.PYRAMIDS, size)
    backbone = ResNet(resnet, input_shape=input_shape, **style)
    decode = {"fpn": fpn, "nas_fpn": nas_fpn}[decoder]
    outputs = decode(backbone.output, backbone.input, endpoints, Style(**style))
    return keras.Model(backbone.input, outputs, name=size.lower().replace("-", "_"))


def fpn(features: dict, image, filters: int, style: Style, separable: bool = False) -> dict:
    """FPN with batch norm (arXiv 1612.03144), and P6 and P7 of RetinaNet (arXiv 1708.02002).

    Both of the paper's codes use SAME padding here, so `style.numerics` makes no difference.

    Args:
      features: {'C3': [b, h, w, c], 'C4': ..., 'C5': ...}; others are not read.
      image: the network's input.
      separable: depthwise 3x3, then 1x1 instead of every 3x3 convolution (FPNLite).

    Returns:
      {'P3': [b, h, w, filters], ..., 'P7': ...}, batch-normalised, not activated.
    """
    merged, pyramid = None, {}
    for level in (5, 4, 3):
        x = conv(features[f"C{level}"], filters, 1, style, f"lateral{level}")
        if merged is not None:
            up = Upsample(level, name=f"top_down{level}")([merged, image])
            x = keras.layers.Add(name=f"merge{level}")([up, x])
        merged = x
        pyramid[level] = conv(merged, filters, 3, style, f"post_hoc{level}", separable=separable)
    coarse = dict(strides=2, separable=separable)
    for level in (6, 7):
        x = pyramid[level - 1] if level == 6 else style.act(pyramid[6], "coarser7_in")
        pyramid[level] = conv(x, filters, 3, style, f"coarser{level}", **coarse)
    return {f"P{n}": style.norm(pyramid[n], f"p{n}_bn") for n in graphs.OUTPUT_LEVELS}


def nas_fpn(features: dict, image, filters: int, style: Style, separable: bool = False) -> dict:
    """NAS-FPN: seven copies of the cells of `NAS_FPN` in a row (arXiv 1904.07392).

    Args, Returns: as of `fpn`; DropBlock, where the style has it, follows every cell.
    """
    pyramid = []
    for level in (3, 4, 5):
        x = conv(features[f"C{level}"], filters, 1, style, f"lateral{level}")
        pyramid.append(style.norm(x, f"lateral{level}_bn"))
    for level in (6, 7):
        pyramid.append(layers.max_pool(pyramid[-1], 2, 2, f"coarser{level}"))
    for i in range(NAS_FPN_REPEATS):
        pyramid = _merge_all(pyramid, image, filters, style, separable, f"cell{i}")
    return {f"P{n}": x for n, x in zip(graphs.OUTPUT_LEVELS, pyramid, strict=True)}


def _merge_all(
    pyramid: list, image, filters: int, style: Style, separable: bool, name: str
) -> list:
    """One pass over the cells: the features of levels 3 to 7 in, those of levels 3 to 7 out."""
    features, levels = list(pyramid), [*graphs.OUTPUT_LEVELS]
    for i, cell in enumerate(NAS_FPN):
        here = f"{name}_{i}"
        inputs = [
            _resize(features[n], image, levels[n], cell.level, f"{here}_edge{k}")
            for k, n in enumerate(cell.inputs)
        ]
        if cell.combine == "attention":
            inputs[1] = _gate(*inputs, here)
        x = keras.layers.Add(name=f"{here}_add")([*inputs, *(features[n] for n in cell.adopted)])
        x = conv(style.act(x, f"{here}_act"), filters, 3, style, here, separable=separable)
        features.append(style.dropblock(style.norm(x, f"{here}_bn"), f"{here}_dropblock"))
        levels.append(cell.level)
    newest = dict(zip(levels, features, strict=True))  # of a level; L4 has three cells
    return [newest[level] for level in graphs.OUTPUT_LEVELS]


def _gate(coarse, fine, name: str):
    """fine * sigmoid(the largest of coarse over all places), by channel."""
    weight = keras.layers.GlobalMaxPooling2D(keepdims=True, name=f"{name}_max")(coarse)
    weight = keras.layers.Activation("sigmoid", name=f"{name}_gate")(weight)
    return keras.layers.Multiply(name=f"{name}_gated")([fine, weight])


def _resize(x, image, source: int, target: int, name: str):
    """[b, h, w, c] from level `source` to `target`: max-pooled without overlap, or repeated."""
    if target > source:
        factor = 2 ** (target - source)
        return layers.max_pool(x, factor, factor, name)
    return Upsample(target, name=name)([x, image]) if target < source else x


def conv(
    x, filters: int, kernel: int, style: Style, name: str, *, strides: int = 1, separable=False
):
    """A SAME convolution with bias, as all of FPN's and NAS-FPN's are; or a separable one."""
    if separable:
        decay = dict(depthwise_regularizer=style.decay(), pointwise_regularizer=style.decay())
        return keras.layers.SeparableConv2D(
            filters, kernel, strides=strides, padding="same", name=f"{name}_conv", **decay
        )(x)
    return style.conv_layer(
        filters, kernel, strides=strides, padding="same", name=f"{name}_conv",
        kernel_initializer=keras.initializers.VarianceScaling(),
    )(x)  # fmt: skip
