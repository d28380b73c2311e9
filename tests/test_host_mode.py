"""Data.augment='host' against the device: same draws, same images, objects and losses."""

import itertools

import gin
import numpy as np
import pytest
import tensorflow as tf
import tiny

from spinenet_tf import modes
from spinenet_tf.data import pipeline
from spinenet_tf.data.pipeline import Data
from spinenet_tf.ops import augment
from spinenet_tf.tasks import common
from spinenet_tf.tasks.detection import Detection
from spinenet_tf.tasks.instances import InstanceSegmentation

MASKS = "make_task.task = @InstanceSegmentation"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.make_records(tmp_path_factory.mktemp("host"))


def batches(records, view, where, labels="masks", count=3):
    data = Data(
        pattern=f"{records}/set-*", batch_size=4, canvas=64, max_boxes=12, mask_size=112,
        shuffle=8, augment=where,
    )  # fmt: skip
    stream = pipeline.train_batches(data, labels=labels, augmentation=view)
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("size", [64, 96])
def test_a_host_batch_shows_what_the_device_makes(shards, size):
    view = augment.Augmentation(size, (0.5, 2.0), True)
    flips = 0
    pairs = zip(batches(shards, view, "device"), batches(shards, view, "host"), strict=True)
    for device, host in pairs:
        assert host["image"].shape == (4, size, size, 3) and bool(tf.reduce_all(host["viewed"]))
        np.testing.assert_array_equal(device["id"], host["id"])
        expected, seen = common.look(device, size, view)
        found, same = common.look(host, size, view)
        grey = 1 / 255 / 0.225
        np.testing.assert_allclose(found, expected, atol=0.52 * grey)
        for mine, yours in zip(
            common.seen_objects(host, same, size), common.seen_objects(device, seen, size),
            strict=True,
        ):  # fmt: skip
            there = np.asarray(host["classes"] > 0)
            np.testing.assert_allclose(mine[there], yours[there], atol=1e-3)
        np.testing.assert_allclose(augment.extent(same, size), augment.extent(seen, size))
        masks = np.where(
            seen.flip[:, None, None, None], device["masks"][..., ::-1], device["masks"]
        )
        np.testing.assert_array_equal(host["masks"], masks)
        flips += int(np.sum(seen.flip))
    assert 0 < flips < 12


@pytest.mark.parametrize("task", [Detection, InstanceSegmentation])
def test_losses_are_equal(shards, task):
    gin.parse_config([b for b in tiny.BINDINGS if "mask_size" not in b])
    task = task(scale=(0.7, 1.4))
    model, view = task.build(), task.augmentation
    for device, host in zip(
        batches(shards, view, "device", count=2), batches(shards, view, "host", count=2),
        strict=True,
    ):  # fmt: skip
        _, expected = task.loss(model, device, training=True)
        _, found = task.loss(model, host, training=True)
        # Half a grey level may turn which proposals the second stage sees, but not the anchors.
        for name in ("class", "box") if isinstance(task, Detection) else ("rpn_score", "rpn_box"):
            np.testing.assert_allclose(found[name], expected[name], rtol=0.02)


def test_training_in_host_mode(shards, tmp_path, eagerly):
    tiny.bind(shards, "Data.augment = 'host'", "Training.steps = 4")
    figures = modes.train_and_eval(f"{tmp_path}/model")
    assert "AP" in figures


def test_what_cannot_be_is_refused(shards):
    with pytest.raises(ValueError, match="Data.augment='tpu' is not one of"):
        Data(augment="tpu")
    with pytest.raises(ValueError, match="needs the task's augmentation"):
        batches(shards, None, "host")
