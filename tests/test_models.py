"""The networks: counts of the paper, outputs of Model Garden and of the official code."""

import contextlib
import functools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

from spinenet_tf import RetinaNet, SpineNet, graphs, specs
from spinenet_tf.models.count import count
from spinenet_tf.models.device import for_tpu
from spinenet_tf.models.keras_layers import (
    ImageConv,
    MapDense,
    ReplicaSeeds,
    StochasticDepth,
    Swish,
)
from spinenet_tf.models.layers import Style

NODES = graphs.wire(graphs.SPINENET_49)
RNG = np.random.default_rng(0)


def test_every_size_has_a_head():
    assert set(specs.SIZES) <= set(specs.RETINANET_HEADS)


def test_counting_by_hand():
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same")(image)  # 8*8*4 * 9*3, 112 parameters
    x = keras.layers.BatchNormalization()(x)  # 8*8*4, 8 parameters and 8 moving
    shared = keras.layers.DepthwiseConv2D(3, padding="same")  # 8*8*4 * 9 twice, 40 parameters
    x = keras.layers.Dense(2)(keras.layers.Flatten()(shared(shared(x))))  # 256*2, 514 parameters
    counts = count(keras.Model(image, x))
    assert counts.parameters == 112 + 8 + 40 + 514
    assert counts.moving_statistics == 8
    assert counts.multiply_adds == 256 * 27 + 256 + 2 * 256 * 9 + 512


def test_counting_a_dynamic_model_is_refused():
    with pytest.raises(ValueError, match="static size"):
        count(SpineNet("49S"))


@pytest.mark.parametrize("numerics", ["official", "model_garden"])
def test_any_size_static_or_dynamic(numerics):
    def build(shape):
        return SpineNet("49", input_shape=shape, width=0.125, endpoints=8, numerics=numerics)

    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    parity.check_any_size(build, [(224, 224), (100, 172), (64, 32)], RNG, close)


def test_upsampling_reads_row_floor_of_i_times_source_over_target():
    """What the official code's nearest resize does; 224 px needs 2 rows of P7 on 7 of P5."""
    from spinenet_tf.models.keras_layers import Upsample

    features = np.arange(2 * 3, dtype="f4").reshape(1, 2, 3, 1)
    resized = Upsample(5)([features, np.zeros((1, 224, 192, 3), "f4")])
    rows, columns = [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(resized[0, ..., 0], features[0, rows][:, columns, 0])


def assert_close(actual, expected):
    """Within 1e-4 of the tensor's largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "size",
    ["49S", *(pytest.param(n, marks=pytest.mark.slow) for n in ("49", "96", "143", "190"))],
)
def test_outputs_equal_model_gardens(size):
    """Same weights, same image: SpineNet and heads, whatever size the input is declared with."""
    pytest.importorskip("official.vision.modeling.backbones.spinenet")
    image = RNG.normal(size=(1, 256, 256, 3)).astype("f4")
    style = dict(numerics="model_garden", activation="swish" if size == "49S" else "relu")
    ours = RetinaNet(size, input_shape=(256, 256, 3), **style)
    parity.randomize(ours)
    features, classes, boxes = _model_garden(ours, size, image, style["activation"])
    backbone = keras.Model(
        ours.input, {f"P{n}": ours.get_layer(f"p{n}_act").output for n in range(3, 8)}
    )
    outputs, pyramid = ours(image), backbone(image)
    for level in graphs.OUTPUT_LEVELS:
        assert_close(pyramid[f"P{level}"], features[str(level)])
        assert_close(outputs["class"][f"P{level}"], classes[str(level)])
        assert_close(outputs["box"][f"P{level}"], boxes[str(level)])
    if size in ("49S", "49"):
        dynamic = RetinaNet(size, **style)
        dynamic.set_weights(ours.get_weights())
        assert_close(dynamic(image)["class"]["P5"], classes["5"])


def _model_garden(ours, size, image, activation):
    import tf_keras
    from official.vision.modeling.backbones import spinenet
    from official.vision.modeling.heads.dense_prediction_heads import RetinaNetHead

    scaling, head_row = specs.SIZES[size], specs.RETINANET_HEADS[size]
    backbone = spinenet.SpineNet(
        tf_keras.layers.InputSpec(shape=[None, 256, 256, 3]),
        endpoints_num_filters=head_row.endpoints, resample_alpha=scaling.alpha,
        block_repeats=scaling.repeats, filter_size_scale=scaling.width, activation=activation,
    )  # fmt: skip
    head = RetinaNetHead(
        3, 7, 91, 9, num_convs=head_row.convs, num_filters=head_row.filters, activation=activation
    )
    head(backbone(image))
    parity.copy_to_model_garden(ours, backbone, head, NODES, scaling.repeats)
    features = backbone(image)
    classes, boxes, _ = head(features)
    return features, classes, boxes


def test_outputs_equal_the_official_codes(shared):
    """A TF1 checkpoint of the paper's code: every raw output."""
    folder = shared / "fixtures/official_tf1/retinanet_spinenet_tiny_relu"
    expected = np.load(folder / "io.npz")
    backbone = SpineNet("49", width=0.125, endpoints=32, epsilon=1e-4, input_shape=(128, 128, 3))
    model = RetinaNet("49", filters=32, backbone=backbone, epsilon=1e-4)
    parity.load_official(model, tf.train.load_checkpoint(str(folder / "model.ckpt")), NODES)
    outputs = model(expected["image"])
    for level in graphs.OUTPUT_LEVELS:
        assert_close(outputs["class"][f"P{level}"], expected[f"cls_outputs/{level}"])
        assert_close(outputs["box"][f"P{level}"], expected[f"box_outputs/{level}"])


@pytest.fixture
def tiny():
    return SpineNet(
        "96", width=0.125, endpoints=8, stochastic_depth=0.2, activation="swish",
        input_shape=(None, None, 3),
    )  # fmt: skip


def test_save_and_load(tiny, tmp_path):
    parity.randomize(tiny)
    tiny.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    image = RNG.normal(size=(1, 96, 64, 3)).astype("f4")
    for name, value in tiny(image).items():
        np.testing.assert_array_equal(value, loaded(image)[name])


def test_stochastic_depth_rates_rise_linearly_over_the_blocks(tiny):
    rates = {layer.name: layer.rate for layer in tiny.layers if isinstance(layer, StochasticDepth)}
    assert len(rates) == 15 * 2  # both repeats of the 15 permuted blocks, none in the stem
    assert rates["block2_0_drop"] == pytest.approx(0.2 / 15)
    assert rates["block16_1_drop"] == pytest.approx(0.2)


def test_stochastic_depth_drops_whole_images_and_rescales():
    image = keras.Input((4, 4, 8))
    from spinenet_tf.models.layers import Style, block

    style = Style()
    model = keras.Model(image, block(image, "residual", 8, style=style, drop_path=0.5, name="b"))
    branch = keras.Model(
        image, [model.get_layer("b_2_bn").output, model.get_layer("b_drop").output]
    )
    before, after = branch(RNG.normal(size=(64, 4, 4, 8)).astype("f4"), training=True)
    ratio = np.asarray(after).reshape(64, -1) / np.asarray(before).reshape(64, -1)
    assert set(np.round(np.unique(ratio), 4)) == {0.0, 2.0}
    assert (np.ptp(ratio, axis=1) < 1e-4).all()


def test_mixed_bfloat16_trains_with_float32_variables_and_outputs():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = RetinaNet(
        "49S", num_classes=3, convs=1, filters=8, input_shape=(64, 64, 3),
        backbone=SpineNet("49S", width=0.125, endpoints=8, input_shape=(64, 64, 3)),
    )  # fmt: skip
    image = RNG.normal(size=(2, 64, 64, 3)).astype("f4")
    with tf.GradientTape() as tape:
        outputs = model(image, training=True)
        loss = sum(tf.reduce_mean(v**2) for v in tf.nest.flatten(outputs))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert all(g is not None and np.isfinite(g).all() for g in gradients)
    assert model.get_layer("block5_0_2_conv").compute_dtype == "bfloat16"
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert {v.dtype for v in tf.nest.flatten(outputs)} == {tf.float32}


def test_weight_decay_is_half_the_squares_of_the_kernels_only():
    model = RetinaNet(
        "49", num_classes=2, convs=1, filters=8, weight_decay=0.01,
        backbone=SpineNet("49", width=0.125, endpoints=8, weight_decay=0.01),
    )  # fmt: skip
    kernels = [v.numpy() for v in model.trainable_variables if v.name == "kernel"]
    expected = 0.01 * 0.5 * sum((k**2).sum() for k in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_custom_rows_and_bad_arguments():
    rows = [(3, "residual", (0, 1), True), (4, "bottleneck", (1, 2), True)]
    model = SpineNet("49", blocks=rows, width=0.25, endpoints=16, input_shape=(64, 64, 3))
    assert {k: v.shape[1:] for k, v in model.output.items()} == {"P3": (8, 8, 16), "P4": (4, 4, 16)}
    for kwargs, message in [
        ({"size": "50"}, "size='50'"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"numerics": "exact"}, "numerics='exact'"),
        ({"stochastic_depth": 1.0}, "stochastic_depth"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpineNet(**kwargs)
    with pytest.raises(ValueError, match="num_classes=1"):
        RetinaNet("49", num_classes=1)


JAX_SCRIPT = """
import sys, json, numpy as np
from spinenet_tf.models.spinenet import SpineNet
model = SpineNet("49S", width=0.125, endpoints=8, activation="swish")
model.load_weights(sys.argv[1])
image = np.random.default_rng(3).normal(size=(1, 96, 70, 3)).astype("f4")
print(json.dumps({k: np.asarray(v).tolist() for k, v in model(image).items()}))
"""


@pytest.mark.slow
def test_the_same_model_runs_on_the_jax_backend(tmp_path):
    pytest.importorskip("jax")
    model = SpineNet("49S", width=0.125, endpoints=8, activation="swish")
    parity.randomize(model)
    model.save_weights(tmp_path / "w.weights.h5")
    run = subprocess.run(
        [sys.executable, "-c", JAX_SCRIPT, str(tmp_path / "w.weights.h5")],
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    on_jax = json.loads(run.stdout.strip().splitlines()[-1])
    image = np.random.default_rng(3).normal(size=(1, 96, 70, 3)).astype("f4")
    for name, value in model(image).items():
        assert_close(on_jax[name], value)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (2, 9, 12, 3), (1, 13, 7, 3), (1, 1, 2, 3)])
def test_image_conv_is_a_padded_strided_convolution(kernel, shape):
    layer, half = ImageConv(4, kernel, strides=2), [kernel // 2] * 2
    image = tf.pad(keras.random.normal(shape, seed=0), [[0, 0], half, half, [0, 0]])
    actual = layer(image)
    expected = tf.nn.conv2d(image, layer.kernel.value, 2, "VALID")
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert layer.compute_output_shape(image.shape) == actual.shape
    dynamic = tf.function(layer, input_signature=[tf.TensorSpec([None] * 3 + [3])])
    np.testing.assert_allclose(dynamic(image), expected, atol=1e-5)


@pytest.mark.parametrize("machine", [contextlib.nullcontext, for_tpu])
def test_map_dense_is_flatten_and_dense(machine):
    maps = keras.random.normal((3, 5, 4, 6), seed=0)
    with machine():
        layer = MapDense(7, bias_initializer="normal", activation="relu")
    assert layer.flattens == (machine is not for_tpu)
    actual = layer(maps)
    expected = tf.reshape(maps, [3, -1]) @ layer.kernel.value + layer.bias.value
    np.testing.assert_allclose(actual, tf.nn.relu(expected), atol=1e-5)
    assert layer.kernel.shape == (120, 7) and layer.compute_output_shape(maps.shape) == (3, 7)
    with pytest.raises(ValueError, match="incompatible"):
        layer(maps[:, 1:])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_swish_and_its_gradient_are_tensorflows(dtype):
    x = tf.cast(tf.linspace(-60.0, 60.0, 1201), dtype)
    found = []
    for function in (Swish(dtype=dtype), tf.nn.silu):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
            loss = tf.reduce_sum(tf.sin(tf.cast(y, "float64")))
        found.append([y, tape.gradient(loss, x)])
    rounding = 8 * {"float64": 2e-16, "float32": 1e-7, "bfloat16": 2**-8}[dtype]
    for ours, theirs in zip(*found, strict=True):
        ours, theirs = (tf.cast(v, "float64").numpy() for v in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=rounding, atol=rounding)


def test_a_tpus_swish_is_kerases():
    image, style = keras.Input((4, 4, 3)), Style(activation="swish")
    with for_tpu():
        of_tpu = keras.Model(image, style.act(image, "act")).get_layer("act")
    here = keras.Model(image, style.act(image, "act")).get_layer("act")
    assert isinstance(here, Swish) and of_tpu.activation is keras.activations.silu


def test_draws_are_uniform_and_those_of_calls_and_layers_do_not_overlap():
    """A Philox counter that went up by one a call would give a batch its neighbour's numbers."""
    generators = [ReplicaSeeds(seed) for seed in (1, 2, 3)]
    draws = np.concatenate([g.uniform((32, 1)).numpy() for _ in range(4) for g in generators])
    assert draws.dtype == np.float32 and len(np.unique(draws)) == draws.size
    many = generators[0].uniform((100_000,)).numpy()
    assert 0 <= many.min() and many.max() < 1
    share, _ = np.histogram(many, 10, (0, 1))
    np.testing.assert_allclose(share / many.size, 0.1, atol=0.005)


def test_a_draw_is_few_operations_of_a_tpus_program():
    generator = ReplicaSeeds(1)
    draw = tf.function(lambda: generator.uniform((8, 1, 1, 1)), jit_compile=True)
    assert draw.experimental_get_compiler_ir()(stage="hlo").count(" = ") < 80  # 320 of Keras'
