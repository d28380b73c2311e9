"""Subnets on a feature pyramid (section 4.1)."""

import functools

import keras

from spinenet_tf.models.layers import Style
from spinenet_tf.models.strips import around, cut, join, strips_of_pyramid


def dense(
    features: dict,
    outputs: int,
    *,
    convs: int,
    filters: int,
    bias: float,
    style: Style,
    name: str,
    separable: bool = False,
) -> dict:
    """RetinaNet's class or box subnet: convolutions shared by all levels, batch norm per level.

    Args:
      features: {level: [b, h, w, c]}.
      outputs: channels of the prediction, anchors per place times values per anchor.
      bias: start of the prediction's bias.
      separable: depthwise 3x3, then 1x1 with bias, instead of all 3x3 convolutions (Appendix A).

    Returns:
      {level: [b, h, w, outputs]}, float32 under mixed precision as well.
    """
    make, spread, last = (_separable, None, 0.03) if separable else (_conv, 0.01, 1e-5)
    strips, padding = strips_of_pyramid(features)
    make = functools.partial(make, style, padding=padding)
    tower = [
        make(filters, spread, name=f"{name}_{i}", bias_initializer="zeros") for i in range(convs)
    ]
    predict = make(
        outputs, last, name=f"{name}_predict", bias_initializer=keras.initializers.Constant(bias)
    )
    predictions = {}
    for level, x in features.items():
        x = cut(x, strips[level])
        for i, conv in enumerate(tower):
            x = conv(around(x, strips[level], padding))
            x = style.act(style.norm(x, f"{name}_{i}_{level.lower()}_bn"))
        x = join(predict(around(x, strips[level], padding)), strips[level])
        predictions[level] = keras.layers.Activation("linear", dtype="float32")(x)
    return predictions


def _conv(style: Style, filters: int, stddev: float, **kwargs) -> keras.layers.Conv2D:
    initializer = keras.initializers.RandomNormal(stddev=stddev)
    return style.conv_layer(filters, 3, kernel_initializer=initializer, **kwargs)


def _separable(style: Style, filters: int, stddev: float | None, **kwargs) -> keras.Layer:
    """Towers start as the official code's (Glorot, no `stddev`), predictions as Model Garden's."""
    parts = {}
    for part in ("depthwise", "pointwise"):
        normal = stddev and keras.initializers.RandomNormal(stddev=stddev)
        parts[f"{part}_initializer"] = normal or "glorot_uniform"
        parts[f"{part}_regularizer"] = style.decay()
    return keras.layers.SeparableConv2D(filters, 3, **parts, **kwargs)
