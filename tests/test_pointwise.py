"""What is computed together or in pairs of columns equals plain Keras layers, with gradients."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

from spinenet_tf import SpineNet
from spinenet_tf.models import pointwise
from spinenet_tf.models.device import for_tpu
from spinenet_tf.models.layers import Style, max_pool
from spinenet_tf.models.layout import PLAIN, Layout
from spinenet_tf.models.pairs import PairConv, pair, pairs_fit, unpair
from spinenet_tf.models.resnet import ResNet

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
        loss = tf.add_n([tf.reduce_sum(tf.sin(tf.cast(y, inputs[0].dtype))) for y in outputs])
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


def maps(*channels, shape=(2, 6, 8)):
    return [RNG.normal(0.7, 1.0, (*shape, c)).astype("f4") for c in channels]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("channels", [(8,), (8, 3), (4, 8, 5)])
def test_a_sum_of_convolutions(channels, synchronized, columns):
    style = Style(synchronized=synchronized, momentum=0.9)
    inputs = [keras.Input((6, 8, c)) for c in channels]
    names = [f"edge{i}" for i in range(len(channels))]
    parts = [pair(x) for x in inputs] if columns == 2 else inputs
    summed = style.pointwise_sum(parts, 12, names, "sum", columns)
    together = keras.Model(inputs, unpair(summed) if columns == 2 else summed)
    parts = [
        style.norm(style.plain_conv(12, 1, name=f"{name}_conv")(x), f"{name}_bn")
        for x, name in zip(inputs, names, strict=True)
    ]
    plain = keras.Model(inputs, keras.layers.Add()(parts) if len(parts) > 1 else parts[0])
    assert_equal(together, plain, maps(*channels))


@pytest.mark.parametrize("activation", ["relu", "swish"])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_convolutions_of_one_map(count, columns, activation):
    style = Style(activation=activation, synchronized=True, momentum=0.9)
    image, names = keras.Input((6, 8, 8)), [f"edge{i}" for i in range(count)]
    x = pair(image) if columns == 2 else image
    parts = style.pointwise_split(x, 5, names, "split", columns)
    together = keras.Model([image], [unpair(part) if columns == 2 else part for part in parts])
    plain = keras.Model([image], [style.conv_bn(image, 5, name=name) for name in names])
    assert_equal(together, plain, maps(8))


@pytest.mark.parametrize("numerics", ["official", "model_garden"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("shape", [(16, 24), (12, 8), (14, 16), (15, 24), (23, 31), (4, 4)])
def test_the_stem(shape, pairs, numerics):
    style = Style(activation="swish", synchronized=True, numerics=numerics, momentum=0.9)
    image = keras.Input((*shape, 3))
    with for_tpu():
        pairs = pairs and pairs_fit(image.shape)
    x = style.pooled_stem(image, 6, Layout(2) if pairs else PLAIN)
    together = keras.Model([image], unpair(x) if pairs else x)
    assert together.output.shape[1:] == (-(-shape[0] // 4), -(-shape[1] // 4), 6)
    plain = max_pool(style.conv_bn(image, 6, 7, 2, name="stem"), 3, 2, "pool")
    assert_equal(together, keras.Model([image], plain), maps(3, shape=(2, *shape)), 1e-4)


@pytest.mark.parametrize("numerics", ["official", "model_garden"])
@pytest.mark.parametrize(("kernel", "strides"), [(1, 1), (3, 1), (3, 2)])
def test_convolutions_of_pairs_of_columns(kernel, strides, numerics):
    style, image = Style(numerics=numerics, momentum=0.9), keras.Input((6, 8, 5))
    x = style.conv_bn(pair(image), 4, kernel, strides, name="a", layout=Layout(2))
    together = keras.Model([image], unpair(x) if strides == 1 else x)
    plain = keras.Model([image], style.conv_bn(image, 4, kernel, strides, name="a"))
    assert_equal(together, plain, maps(5, shape=(2, 6, 8)))


@pytest.mark.parametrize("shape", [(64, 128, 3), (104, 72, 3), (132, 64, 3)])
def test_a_network_for_a_tpu_has_the_shapes_of_the_plain_one(shape):
    with for_tpu():
        model = SpineNet("49", width=0.125, endpoints=8, input_shape=shape)
    in_pairs = any(isinstance(layer, PairConv) for layer in model.layers)
    assert in_pairs == (shape[0] % 8 == 0)  # an L2 of an odd number of rows has none
    for level, features in model(np.zeros((1, *shape), "f4")).items():
        sides = [-(-side // 2 ** int(level[1])) for side in shape[:2]]
        assert features.shape == (1, *sides, 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda shape: SpineNet("49", width=0.25, endpoints=8, input_shape=shape),
        pytest.param(
            lambda shape: SpineNet(
                "R14-SP39", width=0.25, endpoints=8, input_shape=shape, numerics="model_garden"
            ),
            marks=pytest.mark.slow,
        ),
        lambda shape: ResNet("R50", input_shape=shape),
    ],
)  # fmt: skip
def test_a_network_for_a_tpu_is_the_plain_one(make):
    """Which has no pairs of columns. In float64, where only the order of sums differs."""
    keras.config.set_dtype_policy("float64")
    with for_tpu():
        in_pairs, plain = make((64, 128, 3)), make((None, None, 3))
    assert PairConv not in {type(layer) for layer in make((64, 128, 3)).layers}
    kinds = [{type(layer) for layer in model.layers} for model in (in_pairs, plain)]
    assert PairConv in kinds[0] and PairConv not in kinds[1]
    parity.randomize(in_pairs)
    values = {v.path: v for v in in_pairs.variables if v.dtype != "int64"}
    for variable in plain.variables:
        if variable.dtype != "int64":
            variable.assign(values[variable.path])
    image = RNG.normal(0.3, 1.0, (4, 64, 128, 3))
    for ours, theirs in zip(both(in_pairs, [image]), both(plain, [image]), strict=True):
        scale = np.abs(theirs).max() + 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7 * scale)


def test_the_gradient_of_the_stems_pool_goes_to_one_of_equals():
    style = Style()
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, unpair(style.pooled_stem(image, 2, Layout(2))))
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
    x = style.pooled_stem(image, 4, Layout(2))
    x = style.conv_bn(x, 3, 3, name="a", layout=Layout(2))
    parts = style.pointwise_split(x, 3, ["u", "v"], "split", 2)
    model = keras.Model(image, style.pointwise_sum(parts, 8, ["x", "y"], "sum", 2))
    parity.randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    (picture,) = maps(3, shape=(1, 16, 16))
    np.testing.assert_array_equal(loaded(picture), model(picture))


def test_a_frozen_layer_keeps_its_averages():
    style, image = Style(), keras.Input((16, 16, 3))
    model = keras.Model(
        image, style.pointwise_sum([style.pooled_stem(image, 4, Layout(2))], 8, ["x"], "sum")
    )
    model.trainable = False
    before = [v.numpy() for v in model.variables]
    (picture,) = maps(3, shape=(2, 16, 16))
    np.testing.assert_array_equal(model(picture, training=True), model(picture))
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, new)


def test_variances_survive_factors_rounded_to_bfloat16(monkeypatch):
    """What a TPU does of a float32 product by default; the channels have most in common."""
    common, own = RNG.normal(size=(512, 1)), RNG.normal(size=(512, 64))
    covariance = np.cov((30 * common + own).T)
    kernel = RNG.normal(size=(64, 32))
    kernel -= kernel.mean(0)  # what is common to the channels cancels
    expected = np.einsum("ij,jk,ik->k", covariance, kernel, kernel)
    factors = [tf.constant(v, tf.float32) for v in (covariance, kernel)]
    matmul = keras.ops.matmul

    def rounded(*factors):
        return matmul(*(tf.cast(tf.cast(f, tf.bfloat16), tf.float32) for f in factors))

    monkeypatch.setattr(pointwise.ops, "matmul", rounded)
    errors = [
        np.abs(np.sum(product(*factors) * factors[1], 0) / expected - 1).max()
        for product in (pointwise.exact_product, rounded)
    ]
    assert errors[0] < 0.02 < 1 < errors[1]


def test_gradients_of_an_exact_product():
    a, b = (tf.constant(RNG.normal(size=shape), tf.float32) for shape in ((5, 7), (7, 3)))
    found = []
    for product in (pointwise.exact_product, tf.matmul):
        with tf.GradientTape() as tape:
            tape.watch([a, b])
            y = product(a, b)
            loss = tf.reduce_sum(tf.sin(y))
        found.append([y, *tape.gradient(loss, [a, b])])
    for ours, plain in zip(*found, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-4)
