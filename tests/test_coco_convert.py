"""COCO JSON to TFRecord shards: what is kept, what is rejected and why, and restarts."""

import io
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from spinenet_tf.data import coco, synthetic
from spinenet_tf.data.records import parse_example
from spinenet_tf.data.shards import in_processes

ROOT = Path(__file__).parents[1]
MINI = ROOT.parent / "shared" / "data" / "coco_mini"
HEIGHT, WIDTH = 40, 60
CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 90, "name": "brush"}]
TRIANGLE = [[5.0, 5.0, 30.0, 5.0, 5.0, 25.0]]


def annotation(number, **changes):
    plain = {"id": number, "image_id": 1, "category_id": 3, "bbox": [5.0, 5.0, 25.0, 20.0]}
    return plain | {"area": 250.0, "iscrowd": 0, "segmentation": TRIANGLE} | changes


def image_entry(number, name="plain.jpg", **changes):
    return {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH} | changes


def write(folder, images, annotations, categories=CATEGORIES):
    """A COCO set whose plain.jpg always exists; (images folder, JSON)."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 60)).save(folder / "plain.jpg")
    value = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(value))
    return str(folder), str(folder / "set.json")


def run(source, prefix, **options):
    return coco.convert(*source, str(prefix), **{"num_shards": 1} | options)


def read(prefix, masks=False):
    files = sorted(tf.io.gfile.glob(f"{prefix}-*.tfrecord"))
    return [parse_example(record, masks=masks) for record in tf.data.TFRecordDataset(files)]


def shard_bytes(prefix):
    return {p.name: p.read_bytes() for p in prefix.parent.glob(f"{prefix.name}-*")}


def test_image_without_annotations_is_kept(tmp_path):
    summary = run(write(tmp_path / "in", [image_entry(7)], []), tmp_path / "out")
    (example,) = read(tmp_path / "out")
    assert int(example["id"]) == 7 and example["boxes"].shape == (0, 4)
    assert (summary.num_examples, summary.num_instances, summary.rejected) == (1, 0, [])
    assert example["encoded"].numpy() == (tmp_path / "in" / "plain.jpg").read_bytes()


BAD = {
    "unknown image id": ({"image_id": 99}, "image_id"),
    "unknown category id": ({"category_id": 4}, "category_id"),
    "NaN, infinite or not four": ({"bbox": [5.0, float("nan"), 3.0, 4.0]}, "bbox"),
    "infinite or not four": ({"bbox": [5.0, 5.0, float("inf"), 4.0]}, "bbox"),
    "not four numbers": ({"bbox": [5.0, 5.0, 3.0]}, "bbox"),
    "width or height is not positive": ({"bbox": [5.0, 5.0, 0.0, 4.0]}, "bbox"),
    "height is not positive": ({"bbox": [5.0, 5.0, 3.0, -4.0]}, "bbox"),
    "entirely outside the 60x40 image": ({"bbox": [60.0, 5.0, 3.0, 4.0]}, "bbox"),
    "negative or not a number": ({"area": -1.0}, "area"),
    "neither 0 nor 1": ({"iscrowd": 2}, "iscrowd"),
    "neither polygons nor RLE": ({"segmentation": []}, "segmentation"),
    "not a polygon": ({"segmentation": [[1.0, 2.0, 3.0, 4.0]]}, "segmentation"),
    "polygon far outside": ({"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, "segmentation"),
    "RLE size": ({"segmentation": {"size": [9, 9], "counts": [81]}}, "segmentation"),
    "do not add up": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 6]}},
        "segmentation",
    ),
    "counts do not": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": ""}}, "segmentation"),
}


def test_every_bad_annotation_is_listed_with_its_reason(tmp_path):
    bad = [annotation(n, **changes) for n, (changes, _) in enumerate(BAD.values(), 1)]
    source = write(tmp_path / "in", [image_entry(1)], [*bad, annotation(1000)])
    summary = run(source, tmp_path / "out")
    listed = {entry["annotation_id"]: entry for entry in summary.rejected}
    assert len(summary.rejected) == len(BAD)
    for number, (reason, (_, field)) in enumerate(BAD.items(), 1):
        assert reason in listed[number]["reason"] and listed[number]["field"] == field
    assert summary.num_instances == 1 and summary.clipped == 0
    assert json.loads((tmp_path / "out.json").read_text())["rejected"] == summary.rejected


def test_a_set_of_boxes_alone_and_one_without_labels(tmp_path):
    """Made by box tools, and COCO's test images: neither loses anything."""
    entries = [annotation(1, segmentation=[]), annotation(2, segmentation=None)]
    del entries[1]["segmentation"]
    summary = run(write(tmp_path / "in", [image_entry(1)], entries), tmp_path / "boxes")
    assert (summary.num_instances, summary.masks, summary.png_masks) == (2, False, False)
    assert not summary.rejected and len(read(tmp_path / "boxes")[0]["labels"]) == 2
    entries[0]["segmentation"] = TRIANGLE  # one without a mask among others is a mistake
    summary = run(write(tmp_path / "in", [image_entry(1)], entries), tmp_path / "masks")
    assert (summary.num_instances, summary.masks, len(summary.rejected)) == (1, True, 1)
    source = write(tmp_path / "in", [image_entry(1)], [])
    unlabelled = json.loads(Path(source[1]).read_text())
    del unlabelled["annotations"]
    Path(source[1]).write_text(json.dumps(unlabelled))
    summary = run(source, tmp_path / "test")
    assert (summary.num_examples, summary.num_instances) == (1, 0)


def test_bad_images_are_listed_and_tried_again(tmp_path):
    folder = tmp_path / "in"
    images = [
        image_entry(1),
        image_entry(2, "missing.jpg"),
        image_entry(3, "broken.jpg"),
        image_entry(4, "plain.jpg", width=WIDTH + 1),
    ]
    source = write(folder, images, [annotation(1, image_id=2)])
    (folder / "broken.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:200])
    reasons = {e["image_id"]: e["reason"] for e in run(source, tmp_path / "out").rejected}
    assert reasons.keys() == {2, 3, 4}
    assert "no image file" in reasons[2] and "cannot be decoded" in reasons[3]
    assert "(60, 40)" in reasons[4]
    for name in ("missing.jpg", "broken.jpg"):
        (folder / name).write_bytes((folder / "plain.jpg").read_bytes())
    again = run(source, tmp_path / "out")
    assert [e["image_id"] for e in again.rejected] == [4]
    assert (again.num_examples, again.num_instances) == (3, 1)


def test_boxes_partly_outside_are_clipped(tmp_path):
    annotations = [
        annotation(1, bbox=[-5.0, 30.0, 20.0, 20.0]),
        annotation(2, bbox=[40.0, 20.0, 20.0000001, 20.0]),  # rounding, not a clip
    ]
    summary = run(write(tmp_path / "in", [image_entry(1)], annotations), tmp_path / "out")
    (example,) = read(tmp_path / "out")
    # y 30..40 of 40, x 0..15 of 60; y 20..40, x 40..60.
    expected = [[0.75, 0, 1, 0.25], [0.5, 2 / 3, 1, 1]]
    np.testing.assert_allclose(example["boxes"], expected, atol=1e-6)
    assert summary.clipped == 1 and not summary.rejected


def test_masks_equal_pycocotools_and_crowd_is_kept(tmp_path):
    region = np.zeros([HEIGHT, WIDTH], np.uint8, order="F")
    region[3:30:2, 10:50] = 1
    compressed = coco_mask.encode(region)
    compressed["counts"] = compressed["counts"].decode()
    crowd = {"size": [HEIGHT, WIDTH], "counts": [200, 30, HEIGHT * WIDTH - 230]}
    segmentations = [TRIANGLE, TRIANGLE + [[40, 30, 55.5, 31, 50, 38]], compressed, crowd]
    annotations = [
        annotation(n, segmentation=s, iscrowd=int(s is crowd)) for n, s in enumerate(segmentations)
    ]
    source = write(tmp_path / "in", [image_entry(1)], annotations)
    run(source, tmp_path / "out")
    (example,) = read(tmp_path / "out", masks=True)
    oracle = COCO(source[1])
    for n, png in enumerate(example["masks"]):
        mask = tf.io.decode_png(png, channels=1)[..., 0]
        np.testing.assert_array_equal(mask, oracle.annToMask(oracle.anns[n]))
    assert example["crowd"].numpy().tolist() == [False, False, False, True]
    np.testing.assert_array_equal(tf.io.decode_png(example["masks"][2])[..., 0], region)


@pytest.mark.parametrize(
    ("name", "mode", "reencoded"),
    [
        ("a.jpg", "L", 0),
        ("a.jpg", "CMYK", 1),
        ("a.png", "RGB", 0),
        ("a.png", "P", 1),
        ("a.png", "RGBA", 1),
        ("a.png", "1", 1),
        ("a.bmp", "RGB", 1),
    ],
)
def test_every_kind_of_image_becomes_readable(tmp_path, name, mode, reencoded):
    source = write(tmp_path / "in", [image_entry(1, name)], [])
    ramp = np.linspace(0, 255, WIDTH).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[None, :, None], [HEIGHT, WIDTH, 3]).copy())
    picture.convert(mode).save(tmp_path / "in" / name)
    summary = run(source, tmp_path / "out")
    assert (summary.reencoded, summary.rejected) == (reencoded, [])
    (example,) = read(tmp_path / "out")
    image = tf.io.decode_image(example["encoded"], channels=3).numpy()
    expected = np.asarray(picture.convert(mode).convert("RGB"), int)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image - expected).mean() < (20 if mode == "1" else 4)


def test_exif_orientation_is_ignored(tmp_path):
    source = write(tmp_path / "in", [image_entry(1)], [annotation(1)])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "in" / "plain.jpg", exif=exif)
    assert run(source, tmp_path / "out").num_instances == 1
    turned = image_entry(1, height=WIDTH, width=HEIGHT)
    source = write(tmp_path / "turned", [turned], [annotation(1)])
    (rejected, *_) = run(source, tmp_path / "second").rejected
    assert "is its EXIF orientation meant?" in rejected["reason"]


def test_labels(tmp_path):
    source = write(
        tmp_path / "in", [image_entry(1)], [annotation(1), annotation(2, category_id=90)]
    )
    as_ids = run(source, tmp_path / "ids")
    contiguous = run(source, tmp_path / "contiguous", contiguous_labels=True)
    assert (as_ids.num_classes, contiguous.num_classes) == (91, 3)
    assert [c["label"] for c in as_ids.categories] == [3, 90]
    assert contiguous.categories[1] == {"id": 90, "name": "brush", "label": 2}
    assert read(tmp_path / "contiguous")[0]["labels"].numpy().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("images", "annotations", "categories", "message"),
    [
        ([image_entry(1), image_entry(1)], [], CATEGORIES, r"set.json: duplicate .*images.*\[1\]"),
        ([image_entry(1)], [annotation(5), annotation(5)], CATEGORIES, r"annotations.*\[5\]"),
        ([image_entry(1)], [], [{"id": 0, "name": "x"}], "--contiguous_labels"),
        ([image_entry(1)], None, CATEGORIES, "set.json: no list 'annotations'"),
    ],
)
def test_unusable_json(tmp_path, images, annotations, categories, message):
    with pytest.raises(ValueError, match=message):
        run(write(tmp_path / "in", images, annotations, categories), tmp_path / "out")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    path = synthetic.write_coco(folder, num_images=24, image_size=96, split="val")
    return str(folder / "val"), str(path)


def test_restart_gives_the_same_bytes(shapes, tmp_path):
    prefix = tmp_path / "set"
    first = run(shapes, prefix, num_shards=3)
    before = shard_bytes(prefix)
    untouched = (tmp_path / "set-00002-of-00003.tfrecord").stat().st_mtime_ns
    (tmp_path / "set-00001-of-00003.tfrecord").unlink()
    (tmp_path / "set-00001-of-00003.tfrecord.partial").write_bytes(b"half a record")
    assert run(shapes, prefix, num_shards=3) == first
    assert shard_bytes(prefix) == before and len(before) == 3
    assert (tmp_path / "set-00002-of-00003.tfrecord").stat().st_mtime_ns == untouched


def test_no_record_is_lost_or_doubled(shapes, tmp_path):
    summary = run(shapes, tmp_path / "set", num_shards=5)
    examples = read(tmp_path / "set")
    ids = [int(example["id"]) for example in examples]
    truth = json.loads(Path(shapes[1]).read_text())
    assert sorted(ids) == list(range(1, 25)) != ids
    assert sum(summary.shards.values()) == summary.num_examples == 24
    assert sum(len(e["labels"]) for e in examples) == len(truth["annotations"])
    assert json.loads((tmp_path / "set.json").read_text())["shards"] == summary.shards


def test_parallel_equals_serial(shapes, tmp_path):
    run(shapes, tmp_path / "a" / "set", num_shards=3)
    run(shapes, tmp_path / "b" / "set", num_shards=3, run=partial(in_processes, workers=2))
    assert shard_bytes(tmp_path / "a" / "set") == shard_bytes(tmp_path / "b" / "set")


def test_other_inputs_need_overwrite(shapes, tmp_path):
    run(shapes, tmp_path / "set", num_shards=3)
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(shapes, tmp_path / "set", num_shards=2)
    run(shapes, tmp_path / "set", num_shards=2, overwrite=True)
    assert len(shard_bytes(tmp_path / "set")) == 2
    (tmp_path / "set.state.json").unlink()  # shards of unknown origin
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(shapes, tmp_path / "set", num_shards=2)


def script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "make_coco_records.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_script(shapes, tmp_path):
    images, annotations = shapes
    source = [f"--images={images}", f"--annotations={annotations}"]
    done = script(*source, f"--output={tmp_path / 'set'}", "--num_shards=2", "--strict")
    assert done.returncode == 0, done.stderr
    assert "24 examples" in done.stdout and "0 rejected" in done.stdout
    assert "instances, with masks\nnum_classes=7 with the background" in done.stdout
    assert "24/24 images" in done.stderr
    absent = script(*source[:1], "--annotations=/absent.json", f"--output={tmp_path / 'x'}")
    assert absent.returncode == 1 and "Traceback" not in absent.stderr
    assert absent.stderr.splitlines()[-1] == "error: /absent.json: no such file"
    images, annotations = write(tmp_path / "in", [image_entry(1)], [annotation(1, bbox=[0] * 4)])
    none = script(f"--images={images}", f"--annotations={annotations}", f"--output={tmp_path}/y")
    assert none.returncode == 1 and "error: not one object" in none.stderr


@pytest.mark.skipif(not MINI.exists(), reason="no real COCO images here")
def test_real_coco(tmp_path):
    annotations = MINI / "annotations" / "instances_val2017.json"
    summary = run((str(MINI / "val2017"), str(annotations)), tmp_path / "val", num_shards=2)
    truth = json.loads(annotations.read_text())
    assert (summary.num_examples, summary.num_classes) == (len(truth["images"]), 91)
    assert (summary.num_instances, summary.rejected) == (len(truth["annotations"]), [])
    by_id = {int(example["id"]): example for example in read(tmp_path / "val", masks=True)}
    assert Counter(a["image_id"] for a in truth["annotations"]) == Counter(
        {key: len(e["labels"]) for key, e in by_id.items() if len(e["labels"])}
    )
    oracle = COCO(str(annotations))
    for key in list(by_id)[:5]:
        for ann, png in zip(oracle.imgToAnns[key], by_id[key]["masks"].numpy(), strict=True):
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(png))), oracle.annToMask(ann)
            )


def test_the_annotations_are_never_overwritten(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="would overwrite the annotations"):
        coco.convert(str(tmp_path), str(path), str(tmp_path / "train"), num_shards=1)
    assert path.read_text() == "{}"
