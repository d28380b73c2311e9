"""The baselines: counts of the paper's tables, outputs of Model Garden."""

import re

import keras
import numpy as np
import parity
import pytest

from spinenet_tf import graphs, specs
from spinenet_tf.models import fpn, heads
from spinenet_tf.models.count import count
from spinenet_tf.models.fpn import ResNetFPN
from spinenet_tf.models.keras_layers import DropBlock, StochasticDepth
from spinenet_tf.models.layers import Style
from spinenet_tf.models.mobilenet import MobileNetLite
from spinenet_tf.models.resnet import ResNet

RNG = np.random.default_rng(0)

# Table 6, ImageNet columns at 224 px: parameters (M), multiply-adds (B).
TABLE_6 = [("R34", 21.8, 3.7), ("R50", 25.6, 4.1), ("R101", 44.6, 7.8), ("R152", 60.2, 11.5)]


@pytest.mark.parametrize(("size", "parameters", "multiply_adds"), TABLE_6)
def test_resnet_counts_of_table_6(size, parameters, multiply_adds):
    resnet = ResNet(size, input_shape=(224, 224, 3))
    x = keras.layers.GlobalAveragePooling2D()(resnet.output["C5"])
    counts = count(keras.Model(resnet.input, keras.layers.Dense(1001)(x)))
    assert counts.parameters / 1e6 == pytest.approx(parameters, abs=0.0511)  # R101: 44.551
    assert counts.multiply_adds / 1e9 == pytest.approx(multiply_adds, abs=0.05)


def test_every_baseline_has_a_row():
    assert set(specs.PYRAMIDS) <= set(specs.RETINANET_HEADS)
    assert {row[0] for row in TABLE_6} == set(specs.RESNETS)


# ---- outputs of Model Garden


def assert_close(actual, expected):
    """Within 1e-4 of the tensor's largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _copy(ours, names, theirs):
    """Sets their (conv, norm) pairs to our layers named '{name}_conv' and '{name}_bn'."""
    for name, (conv, norm) in zip(names, theirs, strict=True):
        conv.set_weights(parity.layer_of(ours, f"{name}_conv").get_weights())
        if norm is not None:
            parity._copy_norm(parity.layer_of(ours, f"{name}_bn"), norm)


def _resnet_names(size):
    stages = specs.RESNETS[size]
    yield "stem"
    for level, blocks in zip((2, 3, 4, 5), stages.blocks, strict=True):
        for i in range(blocks):
            if i == 0 and (level > 2 or stages.kind == "bottleneck"):
                yield f"l{level}_0_shortcut"
            for conv in range(3 if stages.kind == "bottleneck" else 2):
                yield f"l{level}_{i}_{conv + 1}"


def _garden_resnet(model, size):
    """(conv, norm) of every convolution, and R34's first projection made the identity."""
    kinds = [(type(layer).__name__, layer) for layer in model.layers]
    yield tuple(
        next(layer for name, layer in kinds if name == kind)
        for kind in ("Conv2D", "BatchNormalization")
    )
    for i, block in enumerate(layer for name, layer in kinds if name.endswith("Block")):
        if i == 0 and size == "R34":
            block._shortcut.set_weights([np.eye(64)[None, None]])
            ones, zeros = np.ones(64), np.zeros(64)
            block._norm0.set_weights([ones, zeros, zeros, ones - block._norm0.epsilon])
        elif block._use_projection:
            yield block._shortcut, block._norm0
        for k in range(1, 4 if specs.RESNETS[size].kind == "bottleneck" else 3):
            yield getattr(block, f"_conv{k}"), getattr(block, f"_norm{k}")


def _copy_fpn(ours, theirs):
    names = [f"{kind}_{n}" for kind in ("lateral", "post_hoc") for n in (3, 4, 5)]
    names += ["coarser_6", "coarser_7"]
    pairs = [(theirs.get_layer(name), None) for name in names]
    _copy(ours, [re.sub(r"_(\d)", r"\1", name) for name in names], pairs)
    for level in graphs.OUTPUT_LEVELS:
        parity._copy_norm(ours.get_layer(f"p{level}_bn"), theirs.get_layer(f"norm_{level}"))


def _copy_nas_fpn(ours, theirs):
    def of(kind):
        def number(layer):
            found = re.search(r"_(\d+)$", layer.name)
            return int(found[1]) if found else 0

        return sorted((x for x in theirs.layers if type(x).__name__ == kind), key=number)

    cells = [f"cell{i}_{k}" for i in range(7) for k in range(7)]
    pairs = zip(of("Conv2D"), of("BatchNormalization"), strict=True)
    _copy(ours, [*(f"lateral{n}" for n in (3, 4, 5)), *cells], pairs)


def _garden_features(ours, size, image, activation):
    import tf_keras
    from official.vision.modeling.backbones import resnet

    shape = tf_keras.layers.InputSpec(shape=[None, *image.shape[1:]])
    theirs = resnet.ResNet(int(size[1:]), shape, activation=activation)
    parity.randomize(ours)
    _copy(ours, _resnet_names(size), _garden_resnet(theirs, size))
    return theirs, theirs(image)


@pytest.mark.parametrize(
    "size", ["R34", "R50", *(pytest.param(n, marks=pytest.mark.slow) for n in ("R101", "R152"))]
)
def test_resnets_outputs_equal_model_gardens(size):
    pytest.importorskip("official.vision.modeling.backbones.resnet")
    activation = "swish" if size == "R50" else "relu"
    image = RNG.normal(size=(1, 256, 256, 3)).astype("f4")
    ours = ResNet(size, input_shape=(256, 256, 3), numerics="model_garden", activation=activation)
    _, expected = _garden_features(ours, size, image, activation)
    outputs = ours(image)
    for level in (2, 3, 4, 5):
        assert_close(outputs[f"C{level}"], expected[str(level)])


@pytest.mark.parametrize(("size", "activation"), [
    ("R50-FPN", "relu"), pytest.param("R50-FPN", "swish", marks=pytest.mark.slow),
    ("R50-NAS-FPN", "swish"),
])  # fmt: skip
def test_pyramids_outputs_equal_model_gardens(size, activation):
    pytest.importorskip("official.vision.modeling.decoders.fpn")
    from official.vision.modeling import decoders

    image = RNG.normal(size=(1, 256, 256, 3)).astype("f4")
    style = dict(numerics="model_garden", activation=activation)
    ours = ResNetFPN(size, input_shape=(256, 256, 3), **style)
    theirs, features = _garden_features(ours, specs.PYRAMIDS[size][0], image, activation)
    if "NAS" in size:
        decoder = decoders.NASFPN(theirs.output_specs, num_repeats=7, activation=activation)
        _copy_nas_fpn(ours, decoder)
    else:
        decoder = decoders.FPN(theirs.output_specs, activation=activation)
        _copy_fpn(ours, decoder)
    total = sum(np.prod(v.shape) for v in [*theirs.variables, *decoder.variables])
    assert total == ours.count_params()  # every weight of both was compared
    expected, outputs = decoder(features), ours(image)
    for level in graphs.OUTPUT_LEVELS:
        assert_close(outputs[f"P{level}"], expected[str(level)])


# ---- any input size


@pytest.mark.parametrize(("size", "numerics"), [
    ("R50-FPN", "official"), ("R50-FPN", "model_garden"), ("R50-NAS-FPN", "official"),
])  # fmt: skip
def test_any_size_static_or_dynamic(size, numerics):
    def build(shape):
        return ResNetFPN(size, input_shape=shape, endpoints=8, numerics=numerics)

    parity.check_any_size(build, [(224, 224), (100, 172)], RNG, assert_close)


def test_numerics_differ_by_the_padding_of_strided_convolutions():
    """On 2 px the stem's first place sees pixel (1, 1) through kernel place (4, 4) with the
    symmetric padding of 3, and through (3, 3) with SAME's 2 before and 3 after."""
    image = np.zeros((1, 2, 2, 3), "f4")
    image[0, 1, 1] = 1
    models = {n: ResNet("R34", numerics=n) for n in ("official", "model_garden")}
    kernel = np.abs(RNG.normal(size=(7, 7, 3, 64))).astype("f4")
    for name, seen in (("official", kernel[4, 4]), ("model_garden", kernel[3, 3])):
        stem = models[name].get_layer("stem")
        parity.layer_of(stem, "stem_conv").kernel.assign(kernel)
        expected = seen.sum(0) / np.sqrt(1.001)  # a batch norm as it begins
        np.testing.assert_allclose(stem(image)[0, 0, 0], expected, rtol=1e-5)


# ---- NAS-FPN's table, regularisation, errors


def test_nas_fpn_reads_every_input_and_returns_every_level():
    """The published rule: what no cell reads is added to the output cell of its level."""
    levels, read = list(graphs.OUTPUT_LEVELS), set()
    for cell in fpn.NAS_FPN:
        assert all(levels[n] == cell.level for n in cell.adopted)
        if cell.combine == "attention":
            assert levels[cell.inputs[0]] > levels[cell.inputs[1]]
        read |= {*cell.inputs, *cell.adopted}
        levels.append(cell.level)
    assert read >= set(range(len(levels) - 5)) and sorted(levels[-5:]) == [3, 4, 5, 6, 7]


def _layers(model, kind):
    return {layer.name: layer for layer in model.layers if isinstance(layer, kind)}


def test_stochastic_depth_rises_over_all_blocks():
    drops = _layers(ResNet("R50", stochastic_depth=0.2), StochasticDepth)
    assert len(drops) == 16
    assert drops["l2_0_drop"].rate == pytest.approx(0.2 / 16)
    assert drops["l3_0_drop"].rate == pytest.approx(0.2 * 4 / 16)
    assert drops["l5_2_drop"].rate == pytest.approx(0.2)


def test_dropblock_is_in_the_last_two_levels_only_and_in_nas_fpn():
    resnet = _layers(ResNet("R50", dropblock_keep=0.9), DropBlock)
    assert {name[:2] for name in resnet} == {"l4", "l5"}
    assert len(resnet) == (6 + 3) * 3 + 2  # every convolution, two projected shortcuts
    size = dict(input_shape=(64, 64, 3), endpoints=8, dropblock_keep=0.9)
    assert _layers(ResNetFPN("R50-FPN", **size), DropBlock).keys() == resnet.keys()
    assert len(_layers(ResNetFPN("R50-NAS-FPN", **size), DropBlock)) == len(resnet) + 49


@pytest.mark.parametrize("size", ["R50-FPN", "R50-NAS-FPN"])
def test_weight_decay_and_gradients_reach_every_kernel(size):
    import tensorflow as tf

    model = ResNetFPN(size, input_shape=(64, 64, 3), endpoints=8, weight_decay=0.01)
    kernels = [v.numpy() for v in model.trainable_variables if v.name == "kernel"]
    expected = 0.01 * 0.5 * sum((k**2).sum() for k in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    image = RNG.normal(size=(2, 64, 64, 3)).astype("f4")
    with tf.GradientTape() as tape:
        outputs = model(image, training=True)
        loss = sum(tf.reduce_sum(v * RNG.normal(size=v.shape)) for v in outputs.values())
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert all(g is not None and np.isfinite(g).all() for g in gradients)


def test_nas_fpn_in_bfloat16_saves_and_loads(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = ResNetFPN("R50-NAS-FPN", endpoints=8)
    parity.randomize(model)
    model.save(tmp_path / "model.keras")
    image = RNG.normal(size=(1, 96, 64, 3)).astype("f4")
    loaded = keras.models.load_model(tmp_path / "model.keras")(image)
    for name, value in model(image).items():
        assert value.dtype == "bfloat16"
        np.testing.assert_array_equal(value, loaded[name])


# Table 9: size, subnet convolutions, the paper's parameters (M) and multiply-adds (B), and ours.
TABLE_9 = [
    ("MobileNetV2-FPNLite", 4, (2.20, 1.01), (2.223, 1.177)),
    ("MobileNetV2-SSDLite", 0, (4.30, 0.80), (3.195, 0.843)),
    ("MobileNetV3-SSDLite", 0, (3.22, 0.51), (3.152, 0.498)),
    ("MobileNetV3-Small-SSDLite", 0, (1.77, 0.16), (1.058, 0.156)),
]


@pytest.mark.parametrize(("size", "convs", "paper", "ours"), TABLE_9)
def test_mobilenets_resemble_table_9(size, convs, paper, ours):
    """At 320 px with separable RetinaNet subnets; only the multiply-adds come near."""
    model = MobileNetLite(size, input_shape=(320, 320, 3))
    outputs = [
        heads.dense(
            model.output, 9 * values, convs=convs, filters=model.output["P5"].shape[-1], bias=0.0,
            style=Style(), name=name, separable=True,
        )
        for name, values in (("class", 91), ("box", 4))
    ]  # fmt: skip
    counts = count(keras.Model(model.input, outputs))
    costs = counts.parameters / 1e6, counts.multiply_adds / 1e9
    assert costs == pytest.approx(ours, abs=0.0006)
    assert costs[1] == pytest.approx(paper[1], rel=0.17)


@pytest.mark.parametrize("size", list(specs.MOBILENETS))
def test_mobilenets_of_any_static_size_and_dynamic_multiples_of_32(size):
    levels = range(3, 8) if "FPN" in size else range(4, 10)
    dynamic = MobileNetLite(size, endpoints=8)
    parity.randomize(dynamic)
    for shape in [(64, 96), (100, 172)]:
        static = MobileNetLite(size, input_shape=(*shape, 3), endpoints=8)
        static.set_weights(dynamic.get_weights())
        image = RNG.normal(size=(2, *shape, 3)).astype("f4")
        expected = static(image)
        assert list(expected) == [f"P{n}" for n in levels]
        for level in levels:
            sides = tuple(-(-side // 2**level) for side in shape)
            assert expected[f"P{level}"].shape == (2, *sides, 8)
            if shape == (64, 96):
                assert_close(dynamic(image)[f"P{level}"], expected[f"P{level}"])


def test_mobilenets_take_batch_norm_and_weight_decay_of_the_style():
    model = MobileNetLite("MobileNetV3-Small-SSDLite", momentum=0.9, synchronized=True)
    norms = _layers(model, keras.layers.BatchNormalization).values()
    assert {(n.momentum, n.epsilon, n.synchronized) for n in norms} == {(0.9, 1e-3, True)}
    kernels = [v for v in model.trainable_variables if v.name.endswith("kernel")]
    expected = 4e-5 / 2 * sum((v.numpy() ** 2).sum() for v in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_bad_arguments():
    for build, kwargs, message in [
        (ResNet, {"size": "R18"}, "size='R18'"),
        (ResNetFPN, {"size": "R50"}, "size='R50'"),
        (ResNetFPN, {"activation": "gelu"}, "activation='gelu'"),
        (MobileNetLite, {"size": "MobileNetV1"}, "size='MobileNetV1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(**kwargs)
