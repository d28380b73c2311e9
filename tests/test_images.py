"""Decoding, crops of images and of masks, against NumPy."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from spinenet_tf.data import images

RNG = np.random.default_rng(0)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def sample(mask, y, x):
    """Linear interpolation between pixel centres k + 0.5, pixel by pixel; 0 outside."""
    total = 0.0
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            weight = max(0, 1 - abs(row + 0.5 - y)) * max(0, 1 - abs(column + 0.5 - x))
            total += weight * mask[row, column]
    return total


def oracle(mask, box, size):
    """`box` in pixels, yxyx."""
    ymin, xmin, ymax, xmax = box
    crop = np.zeros([size, size])
    for i in range(size):
        for j in range(size):
            y = ymin + (i + 0.5) / size * (ymax - ymin)
            x = xmin + (j + 0.5) / size * (xmax - xmin)
            crop[i, j] = 255 * sample(mask, y, x)
    return crop


def crop(mask, box, size):
    scale = np.array(mask.shape * 2, np.float32)
    boxes = tf.constant([box], tf.float32) / scale
    return images.crop_masks(tf.constant([png(mask)]), boxes, size)[0].numpy()


@pytest.mark.parametrize(
    "box",
    [
        (2, 3, 8, 9),  # whole pixels
        (1.3, 2.7, 6.45, 10.1),  # fractions
        (4, 5, 5, 6),  # one pixel
        (4.25, 5.5, 4.75, 5.75),  # less than one
        (0, 0, 9, 12),  # the whole image: touches all edges
        (0, 6.5, 3.2, 12),
        (-2, -1.5, 4, 5),  # sticks out
        (5, 8, 12, 15),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 14])
def test_a_mask_in_its_box_is_what_numpy_samples(box, size):
    mask = RNG.integers(0, 2, (9, 12), np.uint8)
    np.testing.assert_allclose(crop(mask, box, size), oracle(mask, box, size), atol=0.6)


def test_a_full_mask_is_255_but_for_half_a_pixel_at_the_image_edge():
    inner = crop(np.ones([20, 30], np.uint8), (1, 1, 19, 29), 112)
    assert (inner == 255).all()
    edge = crop(np.ones([20, 30], np.uint8), (0, 0, 20, 30), 112)
    assert edge.min() > 63 and (edge[3:-3, 2:-2] == 255).all()  # a corner's limit is a quarter
    assert (crop(np.ones([1, 1], np.uint8), (0, 0, 1, 1), 3)[1, 1]) == 255  # image of one pixel


def test_a_pixel_a_cell_copies_the_pixels():
    mask = RNG.integers(0, 2, (16, 16), np.uint8)
    np.testing.assert_array_equal(crop(mask, (3, 4, 10, 11), 7), 255 * mask[3:10, 4:11])


def test_masks_of_0_and_255_are_those_of_0_and_1():
    mask = RNG.integers(0, 2, (8, 8), np.uint8)
    np.testing.assert_array_equal(crop(mask, (1, 1, 7, 6), 9), crop(255 * mask, (1, 1, 7, 6), 9))


def test_no_masks():
    empty = images.crop_masks(tf.constant([], tf.string), tf.zeros([0, 4]), 7)
    assert empty.shape == (0, 7, 7) and empty.dtype == tf.uint8


def jpeg(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def smooth(height, width):
    """Red says how far down a pixel is, green how far right; blue is 100."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * (y + 0.5) / height, 255 * (x + 0.5) / width, np.full([height, width], 100)]
    return np.stack(planes, -1).astype(np.uint8)


def view(encoded, size=64, seed=(0, 0), area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=True):
    seed = tf.constant(seed, tf.int64)
    return images.random_view(encoded, size, area=area, ratio=ratio, flip=flip, seed=seed).numpy()


def window_of(crop, height, width):
    """ymin, xmin, ymax, xmax that a view of `smooth` shows, in pixels; and whether mirrored."""
    middle = crop.astype(float).mean((0, 1))
    sides = []
    for axis, channel, length in ((0, 0, height), (1, 1, width)):
        line = crop[..., channel].astype(float).mean(1 - axis) * length / 255
        slope = np.polyfit(np.arange(len(line)), line, 1)[0]
        sides.append((slope * len(line), middle[channel] * length / 255))
    (h, y), (w, x) = sides
    return (y - h / 2, x - abs(w) / 2, y + h / 2, x + abs(w) / 2), w < 0


@pytest.mark.parametrize("encode", [jpeg, png])
def test_random_views_are_crops_of_the_asked_area_and_shape(encode):
    height, width = 300, 400
    encoded = encode(smooth(height, width))
    boxes, mirrored = [], []
    for seed in range(150):
        box, flipped = window_of(view(encoded, 32, (7, seed)), height, width)
        boxes.append(box)
        mirrored.append(flipped)
    ymin, xmin, ymax, xmax = np.transpose(boxes)
    assert min(ymin.min(), xmin.min()) > -3 and ymax.max() < height + 3 and xmax.max() < width + 3
    shares = (ymax - ymin) * (xmax - xmin) / (height * width)
    assert 0.07 < shares.min() < 0.2 and 0.8 < shares.max() < 1.03
    ratios = (xmax - xmin) / (ymax - ymin)
    assert 0.7 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.4
    assert 50 < sum(mirrored) < 100
    assert np.ptp(ymin) > height / 3 and np.ptp(xmin) > width / 3


def test_a_view_follows_from_its_seed_in_tf_data_too():
    encoded = jpeg(smooth(90, 120))
    a, b, c = (view(encoded, seed=seed) for seed in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    mapped = tf.data.Dataset.from_tensors(tf.constant([1, 2], tf.int64)).map(
        lambda seed: images.random_view(
            encoded, 64, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=True, seed=seed
        )
    )
    np.testing.assert_array_equal(a, next(iter(mapped)))


def test_the_flip_has_its_own_luck_and_can_be_off():
    encoded = png(smooth(80, 80))
    whole = dict(area=(1.0, 1.0), ratio=(1.0, 1.0))
    plain = view(encoded, **whole, flip=False)
    for seed in ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4)):
        np.testing.assert_array_equal(view(encoded, seed=seed, **whole, flip=False), plain)
        flipped = view(encoded, seed=seed, **whole)
        assert (flipped == plain).all() or (flipped == plain[:, ::-1]).all()


def test_an_image_too_long_for_any_crop_is_taken_whole():
    box, _ = window_of(view(png(smooth(10, 400)), 32, flip=False, area=(0.5, 1)), 10, 400)
    np.testing.assert_allclose(box, (0, 0, 10, 400), atol=8)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (256, 256), (33, 57), (1, 1), (1, 9)])
@pytest.mark.parametrize("encode", [jpeg, png])
def test_the_central_view_is_the_middle_224_of_256(shape, encode):
    height, width = shape
    encoded = encode(RNG.integers(0, 256, (height, width, 3), np.uint8))
    pixels = images.decode_image(encoded).numpy()
    side = max(int(224 / 256 * min(shape)), 1)
    y, x = (height - side + 1) // 2, (width - side + 1) // 2
    crop = tf.image.resize(pixels[y : y + side, x : x + side], [224, 224], antialias=True)
    found = images.central_view(encoded, 224)
    assert found.shape == (224, 224, 3) and found.dtype == tf.uint8
    # A crop's JPEG border has no neighbours to interpolate the colours from.
    inner = slice(16, -16) if encode is jpeg and min(shape) > 30 else slice(None)
    np.testing.assert_allclose(found[inner, inner], crop[inner, inner], atol=0.51)


def test_grey_images_have_three_channels_in_every_view():
    grey = RNG.integers(0, 256, (40, 50), np.uint8)
    for encoded in (jpeg(grey), png(grey)):
        assert view(encoded).shape == (64, 64, 3)
        assert images.central_view(encoded, 64).shape == (64, 64, 3)
