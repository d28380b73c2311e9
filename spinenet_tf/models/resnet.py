"""ResNet, the baselines' backbone (arXiv 1512.03385; Tables 2, 5 and 6 of the SpineNet paper)."""

import dataclasses

import gin
import keras

from spinenet_tf import specs
from spinenet_tf.models import layers
from spinenet_tf.models.layers import Style
from spinenet_tf.models.layout import PLAIN, Layout, layouts, relay

DROPBLOCK_LEVELS = (4, 5)  # its authors leave the first two groups out (arXiv 1810.12890)


@gin.configurable
def ResNet(  # noqa: N802 - a network's name, as in keras.applications
    size: str = "R50",
    *,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    project: bool = False,
    **style,
) -> keras.Model:
    """Builds a ResNet with the stride on the 3x3 convolution of a bottleneck.

    The shortcut is projected where the width or the size changes (option B of the ResNet paper).
    Stochastic depth rises from block to block; in the official code from level to level.

    Args:
      size: a row of `specs.RESNETS`: 'R34', 'R50', 'R101' or 'R152'.
      input_shape: (height, width, 3); None where the size is only known at run time.
      project: also project the first block of ResNet-34's L2, 4,224 parameters more, as both of
        the paper's codes do; the others project it anyway.
      **style: fields of `Style`.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> {'C2': ..., 'C5': ...}, where
      C_l is [b, ceil(h / 2**l), ceil(w / 2**l), c], c from 256 to 2048, for R34 from 64 to 512.

    Raises:
      ValueError: unknown size or style.
    """
    stages = specs.row(specs.RESNETS, size)
    style, image = Style(**style), keras.Input(input_shape, name="image")
    lie = layouts(image.shape)
    x = style.pooled_stem(image, specs.STEM_FILTERS, lie[2])
    rates = [style.depth_rate(i, sum(stages.blocks)) for i in range(sum(stages.blocks))]
    outputs = {}
    for level, blocks in zip(specs.RESNET_WIDTHS, stages.blocks, strict=True):
        dropped = level in DROPBLOCK_LEVELS and style.dropblock_keep < 1
        layout = PLAIN if dropped else lie[level]
        x = _stage(x, level, stages.kind, rates[:blocks], style, project, layout)
        x, rates = relay(x, layout, PLAIN), rates[blocks:]
        outputs[f"C{level}"] = x
    return keras.Model(image, outputs, name=f"resnet_{size.lower()}")


def _stage(
    x, level: int, kind: str, rates: list[float], style: Style, project: bool, layout: Layout
):  # fmt: skip
    """The blocks of a level, one a rate; the first halves plain features, but for L2."""
    if level not in DROPBLOCK_LEVELS:
        style = dataclasses.replace(style, dropblock_keep=1.0)
    for i, rate in enumerate(rates):
        strides = 2 if level > 2 and i == 0 else 1
        here = layout if strides == 1 else PLAIN
        x = layers.block(
            x, kind, specs.RESNET_WIDTHS[level], style=style, drop_path=rate, strides=strides,
            name=f"l{level}_{i}", project=project and i == 0, layout=here,
        )  # fmt: skip
        x = relay(x, here, layout)
    return x
