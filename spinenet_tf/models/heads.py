"""Subnets on a feature pyramid (section 4.1)."""

import keras

from spinenet_tf.models.layers import Style


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

    Returns:
      {level: [b, h, w, outputs]}, float32 under mixed precision as well.
    """
    tower = [
        _conv(style, filters, 0.01, name=f"{name}_{i}", bias_initializer="zeros")
        for i in range(convs)
    ]
    predict = _conv(
        style, outputs, 1e-5, name=f"{name}_predict",
        bias_initializer=keras.initializers.Constant(bias),
    )  # fmt: skip
    predictions = {}
    for level, x in features.items():
        for i, conv in enumerate(tower):
            x = style.act(style.norm(conv(x), f"{name}_{i}_{level.lower()}_bn"))
        x = predict(x)
        predictions[level] = keras.layers.Activation("linear", dtype="float32")(x)
    return predictions


def _conv(style: Style, filters: int, stddev: float, **kwargs) -> keras.layers.Conv2D:
    initializer = keras.initializers.RandomNormal(stddev=stddev)
    return style.conv_layer(filters, 3, padding="same", kernel_initializer=initializer, **kwargs)
