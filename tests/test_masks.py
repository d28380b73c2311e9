"""Masks of records against pycocotools, Pillow, TensorFlow and the PNG path of training."""

import io
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pycocotools import mask as coco_mask

from spinenet_tf.data import images, masks
from spinenet_tf.data.records import BOX_MASK_SIZE, BOX_MASKS, Instance, encode_example

RNG = np.random.default_rng(8)
HEIGHT, WIDTH = 37, 53


def random_mask(kind: str) -> np.ndarray:
    mask = np.zeros([HEIGHT, WIDTH], np.uint8)
    if kind == "noise":
        mask[:] = RNG.integers(0, 2, mask.shape)
    elif kind == "full":
        mask[:] = 1
    elif kind == "columns":
        mask[:, 7:9] = 1
    elif kind == "corner":
        mask[-1, -1] = 1
    elif kind == "ring":
        mask[5:20, 10:30] = 1
        mask[8:15, 15:22] = 0
    return mask


KINDS = ["noise", "full", "columns", "corner", "ring", "empty"]


def compressed(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_and_its_png_are_the_mask(kind):
    mask = random_mask(kind)
    window = masks.window_of(compressed(mask), HEIGHT, WIDTH)
    whole = np.zeros_like(mask)
    rows = slice(window.top, window.top + len(window.pixels))
    whole[rows, window.left : window.left + window.pixels.shape[1]] = window.pixels
    np.testing.assert_array_equal(whole, mask)
    png = masks.png(window)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), mask)
    np.testing.assert_array_equal(tf.io.decode_png(png, channels=1)[..., 0], mask)


def test_run_lengths_are_those_of_pycocotools():
    for height, width in ((1, 1), (5, 7), (300, 500)):
        for density in (0.001, 0.5):
            mask = (RNG.random((height, width)) < density).astype(np.uint8)
            rle = coco_mask.encode(np.asfortranarray(mask))
            runs = masks.run_lengths(rle["counts"])
            assert runs.sum() == height * width and (runs >= 0).all()
            pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
            np.testing.assert_array_equal(pixels, mask)
    assert len(masks.run_lengths(b"")) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "box", [(0, 0, WIDTH, HEIGHT), (10, 5, 20, 15), (9.3, 4.6, 21.9, 17.2), (52.5, 36.2, 0.5, 0.8)]
)
def test_a_box_mask_is_what_training_cuts_out_of_the_png(kind, box):
    window = masks.window_of(compressed(random_mask(kind)), HEIGHT, WIDTH)
    x, y, w, h = box
    yxyx = np.array([[y / HEIGHT, x / WIDTH, (y + h) / HEIGHT, (x + w) / WIDTH]], np.float32)
    expected = images.crop_masks(tf.constant([masks.png(window)]), tf.constant(yxyx), 28)[0]
    found = masks.box_mask(window, box, 28)
    assert found.shape == (28, 28) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.numpy().astype(int)).max() <= 1


def test_a_record_holds_the_box_masks_of_all_its_objects_or_of_none():
    cells = RNG.integers(0, 256, (3, 5, 5), np.uint8)
    objects = [Instance((0, 0, 4, 4), 1, "x", False, 16.0, box_mask=c) for c in cells]
    record = tf.train.Example.FromString(encode_example(b"", 9, 9, "x", 1, objects))
    feature = record.features.feature
    (stored,) = feature[BOX_MASKS].bytes_list.value
    assert zlib.decompress(stored) == cells.tobytes()
    assert feature[BOX_MASK_SIZE].int64_list.value[:] == [5]
    with pytest.raises(ValueError, match="3 masks for 4 objects: all or none"):
        encode_example(b"", 9, 9, "x", 1, [*objects, Instance((0, 0, 1, 1), 1, "x", False, 1.0)])
