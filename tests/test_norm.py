"""Our batch norm against Keras'."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from spinenet_tf.models import norm
from spinenet_tf.models.device import for_tpu
from spinenet_tf.models.norm import BatchNorm


def run(layer, x):
    """Output in training and inference, gradients, averages."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        loss = tf.reduce_sum(tf.sin(tf.cast(y, tf.float32)))
    gradients = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    averages = [layer.moving_mean.value, layer.moving_variance.value]
    return [y, *gradients, *averages, layer(x, training=False)]


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (1, 1, 1, 3), (7, 6)])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float64"])
def test_batch_norm_is_that_of_keras(shape, synchronized, policy):
    settings = dict(momentum=0.9, epsilon=1e-3, synchronized=synchronized, dtype=policy)
    ours, plain = BatchNorm(**settings), keras.layers.BatchNormalization(**settings)
    x = tf.cast(keras.random.normal(shape, 0.5, 2.0, seed=1), ours.compute_dtype)
    rng = np.random.default_rng(0)
    for layer in (ours, plain):
        layer.build(shape)
    values = [rng.uniform(0.5, 1.5, v.shape) for v in ours.variables]
    for layer in (ours, plain):
        layer.set_weights(values)
    tolerance = 0.03 if "bfloat16" in policy else 2e-5
    for found, expected in zip(run(ours, x), run(plain, x), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(
            tf.cast(found, tf.float32),
            tf.cast(expected, tf.float32),
            atol=tolerance,
            rtol=tolerance,
        )


def test_the_fused_operation_is_for_maps_on_one_device_that_is_no_tpu():
    maps = tf.zeros([2, 3, 3, 4])
    assert norm._fused_fits(BatchNorm(synchronized=True), maps)
    assert not norm._fused_fits(BatchNorm(), tf.zeros([2, 4]))
    assert not norm._fused_fits(BatchNorm(), tf.cast(maps, tf.float64))
    with for_tpu():
        assert not norm._fused_fits(BatchNorm(), maps)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        assert norm._fused_fits(BatchNorm(), maps)
        assert not norm._fused_fits(BatchNorm(synchronized=True), maps)


def test_a_frozen_norm_is_that_of_keras():
    layer, x = BatchNorm(trainable=False), keras.random.normal((2, 3, 3, 4), seed=1)
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
