"""What is computed together or in another form equals plain Keras layers, and their gradients."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

from spinenet_tf.models.convolution import conv, filter_gradient, for_tpu
from spinenet_tf.models.layers import Style, max_pool

RNG = np.random.default_rng(3)


def set_weights(together, plain):
    """Equal lively weights of layers with equal names."""
    for variable in together.variables:
        layer, name = variable.path.split("/")
        value = RNG.normal(0.1, 0.5, variable.shape)
        value = np.abs(value) + 0.2 if "variance" in name else value
        variable.assign(value)
        of_layer = {v.name: v for v in parity.layer_of(plain, layer).variables}
        of_layer[name].assign(value)


def both(model, inputs):
    """Inference, training, and gradients and moved averages by variable."""
    inputs = [tf.constant(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = tf.nest.flatten(model(inputs, training=True))
        loss = tf.add_n([tf.reduce_sum(tf.sin(tf.cast(y, tf.float32))) for y in outputs])
    variables = sorted(model.trainable_variables, key=lambda v: v.path)
    gradients = tape.gradient(loss, [*(v.value for v in variables), *inputs])
    averages = sorted(model.non_trainable_variables, key=lambda v: v.path)
    still = tf.nest.flatten(model(inputs, training=False))
    return [*still, *outputs, *gradients, *(v.numpy() for v in averages)]


def assert_equal(together, plain, inputs, tolerance=2e-5):
    set_weights(together, plain)
    for ours, theirs in zip(both(together, inputs), both(plain, inputs), strict=True):
        ours, theirs = (np.asarray(v, np.float32) for v in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def maps(*channels, shape=(2, 6, 7)):
    return [RNG.normal(0.7, 1.0, (*shape, c)).astype("f4") for c in channels]


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("channels", [(8,), (8, 3), (4, 8, 5)])
def test_a_sum_of_convolutions(channels, synchronized):
    style = Style(synchronized=synchronized, momentum=0.9)
    inputs = [keras.Input((None, None, c)) for c in channels]
    names = [f"edge{i}" for i in range(len(channels))]
    together = keras.Model(inputs, style.pointwise_sum(inputs, 12, names, "sum"))
    parts = [
        style.norm(style.plain_conv(12, 1, name=f"{name}_conv")(x), f"{name}_bn")
        for x, name in zip(inputs, names, strict=True)
    ]
    plain = keras.Model(inputs, keras.layers.Add()(parts) if len(parts) > 1 else parts[0])
    assert_equal(together, plain, maps(*channels))


@pytest.mark.parametrize("activation", ["relu", "swish"])
@pytest.mark.parametrize("count", [1, 3])
def test_convolutions_of_one_map(count, activation):
    style = Style(activation=activation, synchronized=True, momentum=0.9)
    image, names = keras.Input((None, None, 8)), [f"edge{i}" for i in range(count)]
    together = keras.Model([image], style.pointwise_split(image, 5, names, "split"))
    plain = keras.Model([image], [style.conv_bn(image, 5, name=name) for name in names])
    assert_equal(together, plain, maps(8))


@pytest.mark.parametrize("numerics", ["official", "model_garden"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(16, 24), (14, 16), (15, 24), (23, 31), (4, 4)])
def test_the_stem(shape, dynamic, numerics):
    style = Style(activation="swish", synchronized=True, numerics=numerics, momentum=0.9)
    image = keras.Input((None, None, 3) if dynamic else (*shape, 3))
    together = keras.Model([image], style.pooled_stem(image, 6))
    assert dynamic or together.output.shape[1:] == (-(-shape[0] // 4), -(-shape[1] // 4), 6)
    plain = max_pool(style.conv_bn(image, 6, 7, 2, name="stem"), 3, 2, "pool")
    assert_equal(together, keras.Model([image], plain), maps(3, shape=(2, *shape)), 1e-4)


def test_the_gradient_of_the_stems_pool_goes_to_one_of_equals():
    style = Style()
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, style.pooled_stem(image, 2))
    kernel = parity.layer_of(model, "stem_conv").kernel
    kernel.assign(tf.ones_like(kernel))
    x = tf.ones([1, 8, 8, 3])
    beta = parity.layer_of(model, "stem_bn").beta
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=False))
    gradient = tape.gradient(loss, beta.value)
    np.testing.assert_allclose(gradient, [4.0, 4.0])  # one for each of 2 x 2 places


def test_under_mixed_precision_a_kernel_is_scaled_before_it_is_rounded():
    keras.config.set_dtype_policy("mixed_bfloat16")
    style, image = Style(synchronized=True), keras.Input((None, None, 64))
    together = keras.Model([image], style.pointwise_sum([image], 128, ["a"], "sum"))
    plain = style.norm(style.plain_conv(128, 1, name="a_conv")(image), "a_bn")
    plain = keras.Model([image], plain)
    assert {v.dtype for v in together.variables} == {"float32"}
    x = [RNG.normal(0.7, 1.0, (4, 12, 12, 64)).astype("f4")]
    set_weights(together, plain)
    keras.config.set_dtype_policy("float32")
    exact = style.norm(style.plain_conv(128, 1, name="a_conv")(image), "a_bn")
    exact = keras.Model([image], exact)
    for variable in together.variables:
        layer, name = variable.path.split("/")
        values = {v.name: v for v in parity.layer_of(exact, layer).variables}
        values[name].assign(variable)
    outputs = [np.asarray(m(x, training=True), np.float32) for m in (together, plain, exact)]
    errors = [np.abs(y - outputs[2]).mean() for y in outputs[:2]]
    assert together(x).dtype == tf.bfloat16 and errors[0] < 1.2 * errors[1]


def test_saved_and_loaded(tmp_path):
    style, image = Style(), keras.Input((16, 16, 3))
    x = style.pooled_stem(image, 4)
    parts = style.pointwise_split(x, 3, ["u", "v"], "split")
    model = keras.Model(image, style.pointwise_sum(parts, 8, ["x", "y"], "sum"))
    parity.randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    (picture,) = maps(3, shape=(1, 16, 16))
    np.testing.assert_array_equal(loaded(picture), model(picture))


def test_a_frozen_layer_keeps_its_averages():
    style, image = Style(), keras.Input((16, 16, 3))
    model = keras.Model(image, style.pointwise_sum([style.pooled_stem(image, 4)], 8, ["x"], "sum"))
    model.trainable = False
    before = [v.numpy() for v in model.variables]
    (picture,) = maps(3, shape=(2, 16, 16))
    np.testing.assert_array_equal(model(picture, training=True), model(picture))
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "same"), ((2, 2), "valid")])
def test_a_small_batch_as_a_volume(batch, strides, padding):
    (x,) = maps(5, shape=(batch, 9, 128))
    kernel = RNG.normal(size=(3, 3, 5, 4)).astype("f4")
    expected = conv(x, kernel, strides, padding)
    with for_tpu():
        traced = tf.function(lambda: conv(tf.constant(x), kernel, strides, padding))
        graph = traced.get_concrete_function().graph
        np.testing.assert_allclose(traced(), expected, rtol=1e-5, atol=1e-5)
        moments = filter_gradient(tf.constant(x), tf.constant(x))
    kinds = {operation.type for operation in graph.get_operations()}
    assert ("Conv3D" in kinds) == (batch == 3 and strides == (1, 1))
    np.testing.assert_allclose(moments[0, 0], np.einsum("bhwi,bhwj->ij", x, x), rtol=1e-4)
