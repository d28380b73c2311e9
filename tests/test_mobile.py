"""Mobile SpineNet (Appendix A): counts, Model Garden's outputs, and what training needs."""

import functools
import re

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

from spinenet_tf import graphs, specs
from spinenet_tf.models import heads, mobile
from spinenet_tf.models.count import count
from spinenet_tf.models.keras_layers import StochasticDepth
from spinenet_tf.models.layers import Style
from spinenet_tf.models.mobile import SpineNetMobile
from spinenet_tf.models.retinanet import RetinaNet

NODES = graphs.wire(graphs.SPINENET_MOBILE)
RNG = np.random.default_rng(0)

# Size, pixels, parameters (M), multiply-adds (B): counted in Model Garden's build. Table 9 prints
# 0.82/0.17, 0.97/0.52 and 2.32/1.00: no rule of rounding that we tried gives its parameters.
COUNTS = [
    ("mobile-49XS", 256, 0.873, 0.172),
    ("mobile-49S", 384, 1.031, 0.511),
    ("mobile-49", 384, 2.338, 1.005),
]


def retinanet(size, pixels, *, num_classes=91, endpoints=None, width=None, **style):
    shape = (pixels, pixels, 3)
    backbone = SpineNetMobile(size, input_shape=shape, endpoints=endpoints, width=width, **style)
    return RetinaNet(
        size, num_classes=num_classes, filters=endpoints, backbone=backbone, **style
    )  # fmt: skip


def randomize(model, seed=0):
    """`parity.randomize`, and kernels that neither fade the signal nor blow it up."""
    parity.randomize(model, seed)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        for kernel in (w for w in layer.weights if "kernel" in w.name):
            depthwise = "depthwise" in kernel.path or "_down" in kernel.path
            fan_in = np.prod(kernel.shape[:2] if depthwise else kernel.shape[:3])
            if kernel.name == "pointwise_kernel":
                fan_in = kernel.shape[2]
            gain = 2.0 if layer.name.startswith(("class", "box")) else 1.1
            kernel.assign(rng.normal(0, gain / fan_in**0.5, kernel.shape))


@pytest.mark.parametrize(("size", "pixels", "parameters", "multiply_adds"), COUNTS)
def test_counts_of_appendix_a(size, pixels, parameters, multiply_adds):
    counts = count(retinanet(size, pixels))
    assert round(counts.parameters / 1e6, 3) == parameters
    assert round(counts.multiply_adds / 1e9, 3) == multiply_adds


def test_every_size_has_a_row():
    assert {row[0] for row in COUNTS} == set(specs.MOBILE_SIZES) <= set(specs.RETINANET_HEADS)


def test_widths_are_truncated():
    """0.6 times 8, 16, 24, 40, 80, 112; squeeze-and-excitation has a fifth of a block's input."""
    model = SpineNetMobile("mobile-49XS")
    width = {
        node.level: parity.layer_of(model, f"block{node.index}_project_conv").filters
        for node in NODES
    }
    assert model.get_layer("stem_conv").filters == 4
    assert width == {1: 9, 2: 14, 3: 24, 4: 48, 5: 67, 6: 67, 7: 67}
    squeezed = [model.get_layer(f"block{i}_se_squeeze").filters for i in (0, 1, 10)]
    assert squeezed == [1, 1, 13]  # of 4, 9 and 67 channels


def test_counting_separable_convolutions_by_hand():
    image = keras.Input((8, 6, 3))
    x = keras.layers.SeparableConv2D(5, 3, padding="same")(image)
    counts = count(keras.Model(image, x))
    assert counts.parameters == 27 + 15 + 5
    assert counts.multiply_adds == 8 * 6 * (27 + 15)


def assert_close(actual, expected):
    """Within 1e-5 of the tensor's largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "size",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "mobile-49S")) for n in specs.MOBILE_SIZES],
)
def test_outputs_equal_model_gardens(size):
    pytest.importorskip("official.vision.modeling.backbones.spinenet_mobile")
    image = RNG.normal(size=(1, 256, 256, 3)).astype("f4")
    activation = "relu" if size == "mobile-49S" else "swish"
    ours = retinanet(size, 256, numerics="model_garden", activation=activation)
    randomize(ours)
    features, classes, boxes = _model_garden(ours, size, image, activation)
    taps = {f"P{n}": ours.get_layer(f"p{n}_act").output for n in graphs.OUTPUT_LEVELS}
    outputs, pyramid = ours(image), keras.Model(ours.input, taps)(image)
    for level in graphs.OUTPUT_LEVELS:
        assert_close(pyramid[f"P{level}"], features[str(level)])
        assert_close(outputs["class"][f"P{level}"], classes[str(level)])
        assert_close(outputs["box"][f"P{level}"], boxes[str(level)])


def _model_garden(ours, size, image, activation):
    import tf_keras
    from official.vision.modeling.backbones.spinenet_mobile import SpineNetMobile as Theirs
    from official.vision.modeling.heads.dense_prediction_heads import RetinaNetHead

    scaling = specs.MOBILE_SIZES[size]
    backbone = Theirs(
        tf_keras.layers.InputSpec(shape=[None, 256, 256, 3]), activation=activation,
        endpoints_num_filters=scaling.endpoints, filter_size_scale=scaling.width,
    )  # fmt: skip
    head = RetinaNetHead(
        3, 7, 91, 9, num_filters=scaling.endpoints, use_separable_conv=True, activation=activation
    )
    head(backbone(image))
    _copy(_backbone_pairs(ours, backbone))
    _copy(_head_pairs(ours, head))
    features = backbone(image)
    classes, boxes, _ = head(features)
    assert len(ours.variables) == len(backbone.variables) + len(head.variables)
    return features, classes, boxes


def _backbone_pairs(ours, theirs):
    """(our layer, Model Garden's) in the order in which both create them."""

    def created(kind):
        def number(layer):
            return int((re.search(r"_(\d+)$", layer.name) or "00")[1])

        return iter(sorted((x for x in theirs.layers if type(x).__name__ == kind), key=number))

    convs, depthwise, norms = map(created, ("Conv2D", "DepthwiseConv2D", "BatchNormalization"))
    blocks = created("InvertedBottleneckBlock")

    def pair(name, kind=convs):
        yield parity.layer_of(ours, f"{name}_conv"), next(kind)
        yield parity.layer_of(ours, f"{name}_bn"), next(norms)

    yield from pair("stem")
    for node in NODES:
        for i, level in enumerate(NODES[p].level for p in node.parents):
            for octave in range(node.level - level):
                yield from pair(f"block{node.index}_edge{i}_down{octave}", depthwise)
            yield from pair(f"block{node.index}_edge{i}_expand")
        block = next(blocks)
        for i, part in enumerate(("expand", "depthwise", "project")):
            yield (
                parity.layer_of(ours, f"block{node.index}_{part}_conv"),
                getattr(block, f"_conv{i}"),
            )
            yield parity.layer_of(ours, f"block{node.index}_{part}_bn"), getattr(block, f"_norm{i}")
        for ours_part, part in (("squeeze", "_se_reduce"), ("gate", "_se_expand")):
            layer = getattr(block._squeeze_excitation, part)
            yield ours.get_layer(f"block{node.index}_se_{ours_part}"), layer
    for level in graphs.OUTPUT_LEVELS:
        yield from pair(f"p{level}")
    assert all(next(rest, None) is None for rest in (convs, depthwise, norms, blocks))


def _head_pairs(ours, head):
    for name, convs, norms, last in (
        ("class", head._cls_convs, head._cls_norms, head._classifier),
        ("box", head._box_convs, head._box_norms, head._box_regressor),
    ):
        for i, conv in enumerate(convs):
            yield ours.get_layer(f"{name}_{i}"), conv
            for k, level in enumerate(graphs.OUTPUT_LEVELS):
                yield ours.get_layer(f"{name}_{i}_p{level}_bn"), norms[k][i]
        yield ours.get_layer(f"{name}_predict"), last


def _copy(pairs):
    """Both Keras list a layer's weights in one order."""
    for ours, theirs in pairs:
        assert type(ours).__name__ == type(theirs).__name__
        theirs.set_weights(ours.get_weights())


@pytest.mark.parametrize("numerics", ["official", "model_garden"])
def test_any_size_static_or_dynamic(numerics):
    def build(shape):
        style = dict(numerics=numerics, activation="swish")
        return SpineNetMobile("mobile-49", input_shape=shape, width=0.25, endpoints=8, **style)

    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    shapes = [(224, 160), (96, 70), (1, 33)]
    parity.check_any_size(build, shapes, RNG, close, randomize)


@pytest.mark.parametrize(("numerics", "seen"), [("official", 2), ("model_garden", 3)])
def test_strided_depthwise_padding(numerics, seen):
    """The first place reads rows -1, 0, 1 in the official code and 0, 1, 2 in Model Garden."""
    image = keras.Input((8, 8, 2))
    x = mobile.depthwise(image, 2, Style(numerics=numerics, epsilon=0.0), "d")
    model = keras.Model(image, x)
    model.get_layer("d_conv").kernel.assign(np.ones((3, 3, 2, 1)))
    picture = RNG.uniform(size=(1, 8, 8, 2)).astype("f4")
    np.testing.assert_allclose(
        model(picture)[0, 0, 0], picture[0, :seen, :seen].sum((0, 1)), rtol=1e-5
    )


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


# What each code does between the mean and the product, in NumPy.
GATES = {
    "official": (lambda x: x * _sigmoid(x), _sigmoid),
    "model_garden": (lambda x: np.maximum(x, 0), lambda x: np.clip(x + 3, 0, 6) * 0.16667),
}


@pytest.mark.parametrize("numerics", GATES)
def test_squeeze_and_excitation(numerics):
    """Whatever the network's activation is."""
    image = keras.Input((4, 5, 6))
    model = keras.Model(image, mobile.excite(image, 3, Style(numerics=numerics), "se"))
    for variable in model.variables:
        variable.assign(RNG.normal(0, 2, variable.shape))
    x = RNG.normal(1, 1, size=(2, 4, 5, 6)).astype("f4")
    (w1, b1, w2, b2), (inside, gate) = model.get_weights(), GATES[numerics]
    gates = gate(inside(x.mean((1, 2)) @ w1[0, 0] + b1) @ w2[0, 0] + b2)
    np.testing.assert_allclose(model(x), x * gates[:, None, None], atol=1e-5)


def test_a_block_adds_its_input_only_where_the_shapes_allow():
    image = keras.Input((8, 8, 4))
    for filters, strides, adds in ((4, 1, True), (6, 1, False), (4, 2, False)):
        x = mobile.mbconv(
            image, filters, style=Style(), drop_path=0.0, name="b", strides=strides
        )  # fmt: skip
        model = keras.Model(image, x)
        assert x.shape == (None, 8 // strides, 8 // strides, filters)
        assert isinstance(model.layers[-1], keras.layers.Add) == adds  # and no activation after


def test_save_and_load(tmp_path):
    model = SpineNetMobile("mobile-49S", width=0.25, endpoints=8, stochastic_depth=0.2)
    randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    image = RNG.normal(size=(1, 96, 70, 3)).astype("f4")
    for name, value in model(image).items():
        np.testing.assert_array_equal(value, loaded(image)[name])


def test_stochastic_depth_rates_rise_linearly_over_the_permuted_blocks():
    model = SpineNetMobile("mobile-49S", stochastic_depth=0.2)
    rates = {layer.name: layer.rate for layer in model.layers if isinstance(layer, StochasticDepth)}
    assert rates == {f"block{i}_drop": pytest.approx(0.2 * (i - 1) / 16) for i in range(2, 18)}


def test_mixed_bfloat16_trains_with_float32_variables_and_outputs():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = retinanet("mobile-49S", 64, num_classes=3, width=0.25, endpoints=8, activation="swish")
    image = RNG.normal(size=(2, 64, 64, 3)).astype("f4")
    with tf.GradientTape() as tape:
        outputs = model(image, training=True)
        loss = sum(tf.reduce_mean(v**2) for v in tf.nest.flatten(outputs))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert all(g is not None and np.isfinite(g).all() for g in gradients)
    for name in ("block5_depthwise_conv", "block5_se_gate", "class_0"):
        assert model.get_layer(name).compute_dtype == "bfloat16"
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert {v.dtype for v in tf.nest.flatten(outputs)} == {tf.float32}


def test_weight_decay_is_on_all_kernels_depthwise_ones_included():
    model = retinanet("mobile-49", 64, num_classes=2, width=0.25, endpoints=8, weight_decay=0.01)
    kernels = {v.path: v.numpy() for v in model.trainable_variables if "kernel" in v.name}
    expected = 0.01 * 0.5 * sum((k**2).sum() for k in kernels.values())
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    assert sum("depthwise_kernel" in path for path in kernels) == 2 * 5
    assert not retinanet("mobile-49", 64, width=0.25, endpoints=8, weight_decay=0.0).losses


def test_separable_subnets_start_as_the_sources_do():
    features = {"P3": keras.Input((8, 8, 16), name="P3"), "P4": keras.Input((4, 4, 16), name="P4")}
    predictions = heads.dense(
        features, 90, convs=2, filters=16, bias=-4.6, style=Style(), name="class", separable=True
    )
    model = keras.Model(features, predictions)
    shared = [x for x in model.layers if isinstance(x, keras.layers.SeparableConv2D)]
    assert [x.name for x in shared] == ["class_0", "class_1", "class_predict"]  # not one a level
    predict = model.get_layer("class_predict")
    assert np.unique(predict.bias) == pytest.approx([-4.6])
    for kernel in (predict.depthwise_kernel, predict.pointwise_kernel):
        assert np.std(kernel) == pytest.approx(0.03, rel=0.25)
    first, second = (model.get_layer(f"class_{i}") for i in range(2))
    limits = {"depthwise_kernel": (6 / (9 * 16 + 9)) ** 0.5, "pointwise_kernel": (6 / 32) ** 0.5}
    for name, limit in limits.items():  # Glorot: uniform up to sqrt(6 / (fan in + fan out))
        kernel = np.abs(getattr(first, name))
        assert 0.9 * limit < kernel.max() <= limit
        assert not np.array_equal(kernel, np.abs(getattr(second, name)))


def test_custom_rows_and_bad_arguments():
    rows = [(3, "mbconv", (0, 1), True), (4, "mbconv", (1, 2), True)]
    model = SpineNetMobile(blocks=rows, width=0.5, endpoints=16, input_shape=(64, 64, 3))
    assert {k: v.shape[1:] for k, v in model.output.items()} == {"P3": (8, 8, 16), "P4": (4, 4, 16)}
    stem, rows = [(1, "mbconv"), (2, "mbconv"), (2, "mbconv")], [(3, "mbconv", (1, 2), True)]
    deeper = SpineNetMobile(stem=stem, blocks=rows, input_shape=(64, 64, 3))
    assert deeper.get_layer("block2_add").output.shape[1:] == (16, 16, 24)
    assert deeper.output["P3"].shape[1:] == (8, 8, 48)
    for kwargs, message in [
        ({"size": "49"}, "size='49'"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"blocks": [(3, "residual", (0, 1), True)]}, "block 2: kind 'residual' is not 'mbconv'"),
        ({"stem": [(1, "mbconv"), (2, "bottleneck")]}, "block 1: kind 'bottleneck'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpineNetMobile(**kwargs)
