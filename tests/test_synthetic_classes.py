"""Beetles: deterministic, equal in all but the places of their spots, and convertible."""

import json

import numpy as np
import pytest
from PIL import Image

from spinenet_tf.data import classes, pipeline
from spinenet_tf.data import synthetic_classes as beetles


def test_twenty_classes_of_equally_many_spots():
    assert len(beetles.KINDS) == len(set(beetles.KINDS)) == len(set(beetles.NAMES)) == 20
    assert {len(kind) for kind in beetles.KINDS} == {3}


def test_spots_lie_apart_and_on_the_wings():
    """So that a class is told by its places, whatever the wobble."""
    places = np.array([(side * x, y) for x, y in beetles.PLACES for side in (-1, 1)])
    apart = np.linalg.norm(places[:, None] - places, axis=-1) + np.eye(len(places))
    assert apart.min() > beetles.SPOT + 0.016
    edge = ((places - (0, 0.12)) / (np.array([0.34, 0.38]) - beetles.SPOT / 2)) ** 2
    assert edge.sum(-1).max() < 1


def test_only_the_spots_differ_between_the_classes():
    """Two classes from one seed: what differs is inside the box, and small."""
    for seed in range(5):
        (a, box), (b, other) = (beetles.render(seed, label, size=96) for label in (1, 20))
        assert box == other and a.shape == (96, 96, 3) and a.dtype == np.uint8
        differs = (a != b).any(-1)
        rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
        x, y, w, h = box
        assert y <= rows[0] and rows[-1] <= y + h and x <= columns[0] and columns[-1] <= x + w
        spot = np.pi / 4 * (beetles.SPOT * beetles.MAX_BODY * 96) ** 2
        assert 0 < differs.sum() < 12 * 1.6 * spot


@pytest.mark.parametrize("size", [64, 96, 160])
def test_the_beetle_is_as_large_as_said_and_inside(size):
    for seed in range(20):
        _, (x, y, w, h) = beetles.render(seed, 1, size=size)
        assert min(x, y) >= -0.01 and x + w <= size + 0.01 and y + h <= size + 0.01
        assert 0.5 * size < h <= 0.91 * size
    assert beetles.SPOT * beetles.MIN_BODY * 96 > 6


def test_same_seed_same_bytes_and_splits_share_no_picture(tmp_path):
    def files(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}

    for name in ("a", "b"):
        for split in ("train", "val"):
            beetles.write_classes(tmp_path / name, num_images=22, image_size=48, split=split)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    beetles.write_classes(tmp_path / "c", num_images=22, image_size=48, seed=1)
    pictures = [p.read_bytes() for f in ("a", "c") for p in (tmp_path / f).rglob("*.jpg")]
    assert len(pictures) == len(set(pictures)) == 66


def test_the_set_becomes_records_that_are_read(tmp_path):
    path = beetles.write_classes(tmp_path, num_images=40, image_size=48, split="val")
    truth = json.loads(path.read_text())
    assert [c["name"] for c in truth["categories"]] == list(beetles.NAMES)
    counts = np.bincount([a["category_id"] for a in truth["annotations"]])
    assert counts.tolist() == [2] * 20
    summary = classes.convert(
        str(tmp_path), str(tmp_path / "set"), annotations=str(path), num_shards=2
    )
    assert (summary.num_examples, summary.num_classes, summary.rejected) == (40, 21, [])
    data = pipeline.Data(pattern=f"{tmp_path}/set-*", batch_size=8, canvas=32)
    rows = list(pipeline.eval_batches(data, labels="class").as_numpy_iterator())
    assert all((row["label"] == row["id"] % 20 + 1).all() for row in rows)
    assert Image.open(tmp_path / "val" / "000000.jpg").size == (48, 48)
