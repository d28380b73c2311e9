"""SpineNet of MBConv blocks for mobile sizes (Appendix A, Table 9)."""

import dataclasses
import functools
from collections.abc import Sequence

import gin
import keras

from spinenet_tf import graphs, specs
from spinenet_tf.models import layers
from spinenet_tf.models.layers import Style
from spinenet_tf.models.layout import layouts
from spinenet_tf.models.spinenet import build_nodes, pyramid


@keras.saving.register_keras_serializable("spinenet_tf")
def rounded_hard_sigmoid(x):
    """Model Garden's hard sigmoid of any x: it takes 0.16667 for 1 / 6."""
    return keras.ops.relu6(x + 3.0) * 0.16667


# Squeeze-and-excitation, (inside, gate): neither is stated by the paper; its code fixes swish and
# sigmoid whatever the network's activation is.
EXCITATION = {"official": ("swish", "sigmoid"), "model_garden": ("relu", rounded_hard_sigmoid)}


@gin.configurable
def SpineNetMobile(  # noqa: N802
    size: str = "mobile-49",
    *,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    blocks: Sequence[graphs.Block] | None = None,
    stem: Sequence[tuple[int, str]] | None = None,
    endpoints: int | None = None,
    width: float | None = None,
    **style,
) -> keras.Model:
    """Builds a mobile SpineNet backbone (Appendix A).

    Args:
      size: a row of `specs.MOBILE_SIZES`: 'mobile-49XS', 'mobile-49S' or 'mobile-49'.
      input_shape: (height, width, 3); None where the size is only known at run time.
      blocks: instead of the paper's rows, `(level, 'mbconv', parents, is_output)`; the first nodes
        are the stem's blocks.
      stem: instead of the L1 and the L2 block, `(level, 'mbconv')` of a chain of blocks.
      endpoints, width: override the size's scaling (see `specs.MobileScaling`).
      **style: fields of `Style`; the paper trains with activation='swish'.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> {'P3': ..., 'P7': ...}, where
      P_l is [b, ceil(h / 2**l), ceil(w / 2**l), endpoints].

    Raises:
      ValueError: unknown size, a bad block row (see `graphs.wire`), a block of another kind, or
        style.
    """
    scaling = specs.row(specs.MOBILE_SIZES, size, endpoints=endpoints, width=width)
    graph = graphs.override(graphs.SPINENET_MOBILE, stem, blocks)
    style, image = Style(**style), keras.Input(input_shape, name="image")
    plain = dataclasses.replace(style, dropblock_keep=1.0)  # the stem, as in SpineNet

    def filters(node):
        if node.kind != "mbconv":
            raise ValueError(f"block {node.index}: kind {node.kind!r} is not 'mbconv'")
        return int(specs.MOBILE_WIDTHS[node.level] * scaling.width)

    def stem_block(x, node, level):
        return mbconv(
            x, filters(node), style=plain, drop_path=0.0, strides=2 ** (node.level - level),
            name=f"block{node.index}",
        )  # fmt: skip

    def permuted_block(node, nodes, features, rate):
        x = _fuse(node, nodes, features, image, filters(node), style)
        return mbconv(x, filters(node), style=style, drop_path=rate, name=f"block{node.index}")

    x = style.stem(image, int(specs.MOBILE_STEM_FILTERS * scaling.width), 3)
    features, nodes = build_nodes(x, 1, graph, style, stem_block, permuted_block)
    outputs = pyramid(features, nodes, scaling.endpoints, style, layouts(image.shape, plain=True))
    return keras.Model(image, outputs, name=f"spinenet_{size.lower()}")


def mbconv(x, filters: int, *, style: Style, drop_path: float, name: str, strides: int = 1):
    """An inverted bottleneck with squeeze-and-excitation (Appendix A; MnasNet, arXiv 1807.11626).

    [b, h, w, c] -> [b, ceil(h / strides), ceil(w / strides), filters]. The input is added, after
    which there is no activation, if the shapes allow it.
    """
    shortcut, width = x, x.shape[-1]
    x = style.conv_bn(x, width * specs.MOBILE_EXPANSION, name=f"{name}_expand")
    x = style.dropblock(x, f"{name}_expand_dropblock")
    x = depthwise(x, strides, style, f"{name}_depthwise")
    x = style.dropblock(x, f"{name}_depthwise_dropblock")
    x = excite(x, max(1, int(width * specs.MOBILE_SE_RATIO)), style, f"{name}_se")
    x = style.conv_bn(x, filters, name=f"{name}_project", act=False)
    x = style.dropblock(x, f"{name}_project_dropblock")
    if strides > 1 or width != filters:
        return x
    if drop_path:
        x = layers.StochasticDepth(drop_path, name=f"{name}_drop")(x)
    return keras.layers.Add(name=f"{name}_add")([x, shortcut])


def depthwise(x, strides: int, style: Style, name: str):
    """A depthwise 3x3 convolution without bias, batch norm and the activation.

    [b, h, w, c] -> [b, ceil(h / strides), ceil(w / strides), c]. Weight decay is on its kernel, as
    in the official code; Model Garden leaves depthwise kernels out.
    """
    conv = functools.partial(
        keras.layers.DepthwiseConv2D, 3, use_bias=False, depthwise_regularizer=style.decay(),
        name=f"{name}_conv",
    )  # fmt: skip
    x = style.norm(style.strided(conv, x, 3, strides, name), f"{name}_bn")
    return style.act(x, f"{name}_act")


def excite(x, squeezed: int, style: Style, name: str):
    """Squeeze-and-excitation (arXiv 1709.01507): scales the channels of [b, h, w, c] features.

    Args:
      squeezed: width of the layer between the mean over the places and the gates.
    """
    inside, gate = EXCITATION[style.numerics]
    gates = keras.layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_mean")(x)
    for part, width, activation in (("squeeze", squeezed, inside), ("gate", x.shape[-1], gate)):
        gates = style.conv_layer(
            width, 1, activation=activation, name=f"{name}_{part}",
            kernel_initializer=keras.initializers.VarianceScaling(),
        )(gates)  # fmt: skip
    return keras.layers.Multiply(name=name)([x, gates])


def resample(x, image, levels: tuple[int, int], filters: int, *, style: Style, name: str):
    """A cross-scale connection of separable convolutions, without squeeze (Appendix A).

    Args:
      x: [b, h, w, c] features of the parent, at `levels[0]`.
      image: the network's input, whose size says how large `levels[1]` is.

    Returns:
      [b, h', w', filters] at `levels[1]`, batch-normalised, without activation.
    """
    source, target = levels
    for i in range(target - source):
        x = depthwise(x, 2, style, f"{name}_down{i}")
    if target < source:
        x = layers.Upsample(target, name=f"{name}_up")([x, image])
    return style.conv_bn(x, filters, name=f"{name}_expand", act=False)


def _fuse(node, nodes, features, image, filters, style):
    """Resamples and sums the parents of a node, and adds what it adopts."""
    edges = [
        resample(
            features[parent], image, (nodes[parent].level, node.level), filters,
            style=style, name=f"block{node.index}_edge{i}",
        )
        for i, parent in enumerate(node.parents)
    ]  # fmt: skip
    return layers.fuse([*edges, *(features[i] for i in node.adopted)], style, f"block{node.index}")
