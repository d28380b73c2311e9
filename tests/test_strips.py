"""Maps in strips of rows give what whole maps give, with gradients."""

import contextlib

import gin
import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
import tiny

from spinenet_tf import RetinaNet, SpineNet, modes
from spinenet_tf.data.pipeline import Data
from spinenet_tf.models.device import for_tpu, images_a_device, images_at_once
from spinenet_tf.models.layers import Style
from spinenet_tf.models.layout import PLAIN, Layout, layouts, relay
from spinenet_tf.models.mask_rcnn import MaskRCNN
from spinenet_tf.models.resnet import ResNet
from spinenet_tf.models.strips import Halo, Rows, cut, join, strips_of

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(
    ("images", "height", "strips"),
    [(1, 64, 8), (2, 64, 4), (4, 64, 2), (8, 64, 1), (3, 64, 1), (0, 64, 1), (2, 10, 1),
     (2, None, 1), (1, 32, 8), (1, 24, 1), (4, 10, 2)],
)  # fmt: skip
def test_few_images_are_cut_into_8_strips(images, height, strips):
    with for_tpu(images):
        assert strips_of(height) == strips
    with images_a_device(images):
        assert strips_of(height) == 1  # no TPU


def test_strips_are_of_one_image():
    image = keras.Input((6, 2, 1))
    parts = cut(image, 3)
    assert parts.shape == (None, 2, 2, 1) and join(parts, 3).shape == image.shape
    x = np.arange(24, dtype="f4").reshape(2, 6, 2, 1)
    found = keras.Model(image, [parts, join(parts, 3)])(x)
    np.testing.assert_array_equal(found[0], [x[i, j : j + 2] for i in (0, 1) for j in (0, 2, 4)])
    np.testing.assert_array_equal(found[1], x)


@pytest.mark.parametrize("columns", [(1, 1), (0, 0), (1, 0)])
@pytest.mark.parametrize("rows", [(1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("strips", [1, 2, 3, 6])
def test_a_halo_is_what_the_whole_map_has_there(strips, rows, columns):
    x = RNG.normal(size=(2, 6, 3, 2)).astype("f4")
    whole, height = np.pad(x, [(0, 0), rows, columns, (0, 0)]), 6 // strips
    expected = [
        image[first : first + height + sum(rows)]
        for image in whole
        for first in range(0, 6, height)
    ]
    layer = Halo(strips, rows, columns)
    layer = Halo.from_config(layer.get_config())
    found = layer(x.reshape(2 * strips, height, 3, 2))
    np.testing.assert_array_equal(found, expected)
    assert found.shape == layer.compute_output_shape((2 * strips, height, 3, 2))


@pytest.mark.parametrize("numerics", ["official", "model_garden"])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(("kernel", "strides"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_of_strips(kernel, strides, columns, numerics):
    keras.config.set_dtype_policy("float64")
    style, image = Style(numerics=numerics, momentum=0.9), keras.Input((12, 8, 5))
    layout, after = Layout(columns, 3), Layout(columns if strides == 1 else 1, 3)
    with for_tpu(2):
        x = relay(image, PLAIN, layout)
        x = style.conv_bn(x, 4, kernel, strides, name="a", layout=layout)
        ours = keras.Model(image, relay(x, after, PLAIN))
    plain = keras.Model(image, style.conv_bn(image, 4, kernel, strides, name="a"))
    assert ours.output.shape == plain.output.shape
    assert_equal(ours, plain, RNG.normal(size=(2, 12, 8, 5)))


def spinenet(shape, **settings):
    settings = dict(width=0.125, endpoints=8, stochastic_depth=0.5) | settings
    return SpineNet("49", input_shape=shape, **settings)


def recomputed(shape, **style):
    """All of SpineNet-190's recipe, at the width of a test; under `for_tpu` only."""
    return spinenet(shape, recompute=images_at_once() > 0, **style)


def with_l1(shape, **style):
    blocks = [
        (1, "bottleneck", (0, 1), False), (1, "bottleneck", (0, 2), False),
        (2, "bottleneck", (2, 3), False), (3, "bottleneck", (1, 4), True),
    ]  # fmt: skip
    return spinenet(shape, blocks=blocks, **style)


def retinanet(shape, **style):
    backbone = spinenet(shape, **style)
    return RetinaNet("49", backbone=backbone, convs=1, filters=8, num_classes=3, **style)


def proposals(shape, **style):
    backbone = spinenet(shape, **style)
    return MaskRCNN("49", backbone=backbone, filters=8, fc=8, **style).get_layer("rpn")


def resnet(shape, **style):
    return ResNet("R50", input_shape=shape, stochastic_depth=0.5, **style)


@pytest.mark.parametrize(
    ("make", "images", "size", "numerics"),
    [
        (retinanet, 2, (320, 64), "official"),
        pytest.param(retinanet, 2, (128, 72), "official", marks=pytest.mark.slow),  # odd columns
        pytest.param(retinanet, 1, (256, 64), "official", marks=pytest.mark.slow),
        (retinanet, 4, (64, 64), "model_garden"),
        (retinanet, 2, (320, 72), "model_garden"),
        (proposals, 2, (128, 64), "official"),
        (resnet, 4, (64, 72), "model_garden"),
        (recomputed, 2, (128, 64), "official"),
        (with_l1, 2, (64, 64), "official"),
    ],
)
def test_a_network_in_strips_is_the_plain_one(make, images, size, numerics):
    """Whose stochastic depth drops the same images."""
    keras.config.set_dtype_policy("float64")
    shape, models = (*size, 3), []
    for context in (for_tpu(images), contextlib.nullcontext()):
        keras.utils.set_random_seed(1)
        with context:
            models.append(make(shape, numerics=numerics, activation="swish"))
    ours, plain = models
    kinds = [{type(layer) for layer in model.layers} for model in models]
    assert {Halo, Rows} <= kinds[0] and not {Halo, Rows} & kinds[1]
    assert_equal(ours, plain, RNG.normal(0.3, 1.0, (images, *shape)))


def test_where_there_are_strips():
    with for_tpu(2):
        at_1280, at_640, odd, unknown = (layouts((None, n, n, 3)) for n in (1280, 640, 650, None))
        wide = layouts((None, 640, None, 3))
        RetinaNet("49", input_shape=(640, None, 3), convs=1, filters=8)
        assert layouts((None, 640, 640, 3), plain=True)[2] == PLAIN
    assert [at_640[level] for level in range(2, 8)] == [
        Layout(2, 4), Layout(1, 4), Layout(1, 4), Layout(1, 4), PLAIN, PLAIN
    ]  # fmt: skip
    assert at_1280[6] == Layout(1, 4) and at_1280[7] == PLAIN
    assert all(lie[level] == PLAIN for lie in (odd, unknown, wide) for level in range(2, 8))
    assert layouts((None, 640, 640, 3))[2] == PLAIN  # no TPU


def test_the_trainer_tells_the_model_how_many_images_it_sees(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(modes, "Run", lambda *_: seen.append(images_at_once()))
    gin.parse_config(tiny.BINDINGS)
    with for_tpu():
        modes._make_run(str(tmp_path), Data(batch_size=4))
    assert seen == [4] and images_at_once() == 0


def test_saved_and_loaded(tmp_path):
    with for_tpu(2):
        model = SpineNet("49", width=0.125, endpoints=8, input_shape=(128, 64, 3))
    parity.randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = RNG.normal(size=(2, 128, 64, 3)).astype("f4")
    for name, y in model(x).items():
        np.testing.assert_array_equal(loaded(x)[name], y)


def results(model, x):
    """In training: outputs, gradients and moved averages; and inference."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = tf.nest.flatten(model(x, training=True))
        loss = tf.add_n([tf.reduce_sum(tf.sin(tf.cast(y, x.dtype))) for y in outputs])
    variables = sorted(model.trainable_variables, key=lambda v: v.path)
    gradients = tape.gradient(loss, [x, *(v.value for v in variables)])
    averages = sorted(model.non_trainable_variables, key=lambda v: v.path)
    still = tf.nest.flatten(model(x, training=False))
    return [*outputs, *gradients, *(v.numpy() for v in averages), *still]


def assert_equal(ours, plain, x):
    """In float64, where only the order of sums differs."""
    parity.randomize(plain)
    values = {v.path: v for v in plain.variables}  # those of random layers too
    for variable in ours.variables:
        variable.assign(values[variable.path])
    for found, expected in zip(results(ours, x), results(plain, x), strict=True):
        scale = np.abs(expected).max() + 1e-3
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale)
