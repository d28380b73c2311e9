"""Device augmentation against tf.image on the host, with the same draws."""

import numpy as np
import pytest
import tensorflow as tf

from spinenet_tf.ops import augment

RNG = np.random.default_rng(1)


def reference(image, view, i, size):
    """Flip, tf.image.resize, crop, normalise, pad: one image at a time, as a host would do it."""
    pixels = tf.constant(image, tf.float32)
    pixels = tf.reverse(pixels, [1]) if view.flip[i] else pixels
    pixels = tf.image.resize(pixels, [int(v) for v in view.scaled[i]])
    y, x = (int(v) for v in view.offset[i])
    pixels = (pixels[y : y + size, x : x + size] / 255.0 - augment.MEAN) / augment.STDDEV
    height, width = pixels.shape[:2]
    return np.pad(pixels, [(0, size - height), (0, size - width), (0, 0)])


def canvases(sizes, canvas):
    images = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]
    padded = [
        np.pad(im, [(0, canvas - im.shape[0]), (0, canvas - im.shape[1]), (0, 0)]) for im in images
    ]
    return images, tf.constant(np.stack(padded)), tf.constant(sizes)


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.1, 0.1), (2.0, 2.0), (1.0, 1.0)])
def test_view_equals_the_host_within_one_grey_level(size, scale):
    images, batch, sizes = canvases([(60, 80), (80, 33), (80, 80), (1, 80)], 80)
    draws = tf.constant(RNG.random((4, 4)), tf.float32)
    view = augment.random_view(sizes, augment.Augmentation(size, scale, True), draws)
    actual = augment.view_images(batch, sizes, view, size)
    grey = 1 / 255 / 0.225
    for i, image in enumerate(images):
        np.testing.assert_allclose(actual[i], reference(image, view, i, size), atol=0.02 * grey)


def test_fit_at_the_same_size_only_normalises():
    images, batch, sizes = canvases([(48, 64)], 64)
    view = augment.fit_view(sizes, 64)
    actual = augment.view_images(batch, sizes, view, 64)[0]
    expected = (images[0] / 255.0 - augment.MEAN) / augment.STDDEV
    np.testing.assert_allclose(actual[:48], expected, atol=1e-5)
    assert not np.any(actual[48:])  # padding is zero after normalisation, as in the paper's code


def test_boxes_follow_their_pixels():
    """A bright rectangle is found again where its box says, whatever the view."""
    image = np.zeros((80, 64, 3), np.uint8)
    box = np.array([20, 8, 44, 40], "f4")
    image[20:44, 8:40] = 255
    count = 16
    batch = tf.constant(np.repeat(np.pad(image, [(0, 0), (0, 16), (0, 0)])[None], count, 0))
    sizes = tf.constant([[80, 64]] * count)
    draws = tf.constant(RNG.random((count, 4)), tf.float32)
    view = augment.random_view(sizes, augment.Augmentation(80, (0.6, 1.7), True), draws)
    assert 0 < view.flip.numpy().sum() < count
    pixels = augment.view_images(batch, sizes, view, 80).numpy() * augment.STDDEV + augment.MEAN
    boxes = augment.view_boxes(tf.constant(np.tile(box, (count, 1, 1))), sizes, view).numpy()[:, 0]
    for i in range(count):
        inside = pixels[i].mean(-1) > 0.75  # padding denormalises to the mean, below it
        ys, xs = np.where(inside)
        y0, x0, y1, x1 = np.clip(boxes[i], 0, 80)
        found = [ys.min(), xs.min(), ys.max() + 1, xs.max() + 1]
        np.testing.assert_allclose(found, [y0, x0, y1, x1], atol=1.5)


def test_equal_draws_give_equal_views_and_the_crop_covers_the_whole_image():
    sizes = tf.constant([[50, 100]] * 1000)
    draws = tf.constant(RNG.random((1000, 4)), tf.float32)
    view = augment.random_view(sizes, augment.Augmentation(64, (2.0, 2.0), True), draws)
    again = augment.random_view(sizes, augment.Augmentation(64, (2.0, 2.0), True), draws)
    for a, b in zip(view, again, strict=True):
        np.testing.assert_array_equal(a, b)
    # 128 x 64 from 64: x offsets 0..64 all come, there is no room in y
    offsets = view.offset.numpy()
    assert set(offsets[:, 0]) == {0.0}
    assert offsets[:, 1].min() == 0 and offsets[:, 1].max() == 64
    assert (
        not augment.random_view(sizes, augment.Augmentation(64, (2.0, 2.0), False), draws)
        .flip.numpy()
        .any()
    )


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.1, 0.1), (1.0, 1.0)])
def test_the_host_shows_what_the_device_shows(scale):
    """`sample_view` in grey levels, at most the rounding apart; and as much of the image."""
    size, sides = 64, [(60, 80), (80, 33), (80, 80), (1, 80)]
    images, batch, sizes = canvases(sides, 80)
    draws = tf.constant(RNG.random((4, 4)), tf.float32)
    view = augment.random_view(sizes, augment.Augmentation(size, scale, True), draws)
    expected = augment.view_images(batch, sizes, view, size).numpy()
    expected = 255 * (expected * augment.STDDEV + augment.MEAN)
    for i, image in enumerate(images):
        one = augment.View(*(part[i : i + 1] for part in view))
        shown = augment.sample_view(tf.constant(image), sizes[i : i + 1], one, size)
        height, width = augment.extent(view, size)[i].numpy().astype(int)
        assert shown.shape == (height, width, 3) and shown.dtype == tf.uint8
        np.testing.assert_allclose(shown, expected[i, :height, :width], atol=0.51)


def test_factors_rounded_to_bfloat16_stay_within_a_grey_level(monkeypatch):
    """What a TPU does of a float32 product by default, on noise, the worst of images."""
    size = 96
    images, batch, sizes = canvases([(60, 80), (80, 33), (80, 80), (7, 80)], 80)
    draws = tf.constant(RNG.random((4, 4)), tf.float32)
    view = augment.random_view(sizes, augment.Augmentation(size, (0.5, 2.0), True), draws)
    exact = augment.view_images(batch, sizes, view, size).numpy()
    einsum = tf.einsum

    def rounded(equation, *factors):
        factors = [tf.cast(tf.cast(f, tf.bfloat16), tf.float32) for f in factors]
        return einsum(equation, *factors)

    monkeypatch.setattr(tf, "einsum", rounded)
    coarse = augment.view_images(batch, sizes, view, size).numpy()
    errors = 255 * np.abs((coarse - exact) * augment.STDDEV)
    assert 0.01 < errors.max() <= 1.0


def test_multiply_adds_are_those_of_the_products():
    """TensorFlow's own count of the traced products; at most 2 % of a SpineNet-49 step at 640."""
    canvas, size = 48, 64
    specs = [
        tf.TensorSpec([1, canvas, canvas, 3], tf.uint8), tf.TensorSpec([1, 2], tf.int32),
        augment.View(
            tf.TensorSpec([1, 2]), tf.TensorSpec([1, 2]), tf.TensorSpec([1], tf.bool)
        ),
    ]  # fmt: skip
    function = tf.function(lambda i, s, v: augment.view_images(i, s, v, size))
    graph = function.get_concrete_function(*specs).graph
    products = [op for op in graph.get_operations() if op.type == "Einsum"]
    counted = 0
    for op in products:
        equation = op.get_attr("equation").decode()
        sides = {}
        for term, value in zip(equation.split("->")[0].split(","), op.inputs, strict=True):
            sides |= dict(zip(term, value.shape, strict=True))
        counted += int(np.prod(list(sides.values())))
    assert counted == augment.multiply_adds(canvas, size) and len(products) == 2
    step = 3 * 85.4e9  # Table 2's forward pass, and twice as much backward
    assert augment.multiply_adds(640, 640) / step < 0.02
    assert augment.multiply_adds(640, 1280) / (4 * step) < 0.02
