"""Convolutions of stride 2 and their written gradients against the plain ones."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from spinenet_tf.models.device import for_tpu
from spinenet_tf.models.halving import HalvingConv
from spinenet_tf.models.layers import Style


@pytest.mark.parametrize("numerics", ["official", "model_garden"])
@pytest.mark.parametrize("shape", [(8, 6), (7, 6), (8, 5), (5, 9), (1, 2), (3, 1), (1, 1)])
def test_halving_is_a_padded_strided_convolution(shape, numerics):
    style, image = Style(numerics=numerics), keras.Input((*shape, 3))
    with for_tpu():
        ours = keras.Model(image, style.conv_bn(image, 4, 3, 2, name="a", act=False))
    plain = keras.Model(image, style.conv_bn(image, 4, 3, 2, name="a", act=False))
    layer = ours.get_layer("a_conv")
    assert isinstance(layer, HalvingConv) and ours.output.shape == plain.output.shape
    plain.set_weights(ours.get_weights())
    x = keras.random.normal((2, *shape, 3), seed=1)
    results = []
    for model in (ours, plain):
        kernel = model.get_layer("a_conv").kernel.value
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
            loss = tf.reduce_sum(tf.sin(y))
        results.append([y, *tape.gradient(loss, [x, kernel])])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    copy = HalvingConv.from_config(layer.get_config())
    assert copy.symmetric == layer.symmetric and copy.filters == 4


def test_a_map_of_unknown_size_is_halved_plainly():
    image = keras.Input((None, None, 3))
    with for_tpu():
        model = keras.Model(image, Style().conv_bn(image, 4, 3, 2, name="a"))
    assert type(model.get_layer("a_conv")) is keras.layers.Conv2D
