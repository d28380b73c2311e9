"""Class folders and iNaturalist's JSON to TFRecord shards."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from spinenet_tf.data import classes
from spinenet_tf.data.pipeline import Data, eval_batches
from spinenet_tf.data.shards import Rejection

ROOT = Path(__file__).parents[1]


def picture(path, value=0, size=(30, 20)):
    """An image of one grey value; size is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def features(prefix):
    files = sorted(tf.io.gfile.glob(f"{prefix}-*.tfrecord"))
    for record in tf.data.TFRecordDataset(files).as_numpy_iterator():
        feature = tf.train.Example.FromString(record).features.feature
        yield {k.removeprefix("image/"): v for k, v in feature.items()}


def rows(prefix):
    """{file name: (label, name, id)}"""
    return {
        f["filename"].bytes_list.value[0].decode(): (
            f["class/label"].int64_list.value[0],
            f["class/text"].bytes_list.value[0].decode(),
            int(f["source_id"].bytes_list.value[0]),
        )
        for f in features(prefix)
    }


def run(images, prefix, **options):
    options = {"num_shards": 2} | options
    return classes.convert(str(images), str(prefix), **options)


@pytest.fixture
def folders(tmp_path):
    """Classes n03, n01 and n02 of 1, 2 and 3 images, made in no order."""
    for name, count in (("n03", 1), ("n01", 2), ("n02", 3)):
        for i in range(count):
            picture(tmp_path / "in" / name / f"{i}.png", 10 * int(name[1:]))
    (tmp_path / "in" / "readme.txt").write_text("not a class")
    return tmp_path / "in"


def test_class_folders_are_numbered_by_name(folders, tmp_path):
    summary = run(folders, tmp_path / "set")
    assert (summary.num_examples, summary.num_classes, summary.used_classes) == (6, 4, 3)
    names = ["n01", "n02", "n03"]
    categories = [{"id": i, "name": n, "label": i} for i, n in enumerate(names, 1)]
    assert summary.categories == categories and summary.rejected == []
    found = rows(tmp_path / "set")
    assert found["n01/1.png"] == (1, "n01", 2) and found["n03/0.png"] == (3, "n03", 6)
    assert sorted(number for _, _, number in found.values()) == [1, 2, 3, 4, 5, 6]
    data = Data(pattern=f"{tmp_path}/set-*", batch_size=6, canvas=8)
    assert data.categories() == categories and data.num_examples() == 6
    (batch,) = eval_batches(data, labels="class").as_numpy_iterator()
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 10 * batch["label"])


def test_a_list_fixes_the_order_and_leaves_out(folders, tmp_path):
    (tmp_path / "names").write_text("n03\nn01\n\n")
    summary = run(folders, tmp_path / "set", classes=str(tmp_path / "names"))
    assert [c["name"] for c in summary.categories] == ["n03", "n01"]
    found = rows(tmp_path / "set")
    assert {k: v[0] for k, v in found.items()} == {"n03/0.png": 1, "n01/0.png": 2, "n01/1.png": 2}
    assert [(e["image_id"], e["field"]) for e in summary.rejected] == [("n02", "classes")]
    for text, message in (("n01\nn01\n", "'n01' comes twice"), ("n09\n", "'n09' is no subfolder")):
        (tmp_path / "names").write_text(text)
        with pytest.raises(ValueError, match=message):
            run(folders, tmp_path / "x", classes=str(tmp_path / "names"))


def test_a_broken_image_is_listed_and_taken_once_it_is_whole(folders, tmp_path):
    broken = folders / "n02" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    summary = run(folders, tmp_path / "set")
    assert summary.num_examples == 5
    ((entry),) = summary.rejected
    assert entry["field"] == "file_name" and "n02/1.png" in entry["value"]
    picture(broken)
    assert run(folders, tmp_path / "set").num_examples == 6


def test_other_inputs_do_not_mix_with_old_shards(folders, tmp_path):
    run(folders, tmp_path / "set")
    before = (tmp_path / "set-00000-of-00002.tfrecord").read_bytes()
    run(folders, tmp_path / "set")
    assert (tmp_path / "set-00000-of-00002.tfrecord").read_bytes() == before
    picture(folders / "n01" / "new.png")
    with pytest.raises(FileExistsError, match="other inputs"):
        run(folders, tmp_path / "set")
    assert run(folders, tmp_path / "set", overwrite=True).num_examples == 7


CATEGORIES = [{"id": 7, "name": "seven"}, {"id": 0, "name": "zero"}, {"id": 3, "name": "three"}]


def annotated(folder, annotations, **image):
    """Images 1..4, 30 x 20, of rising columns; the JSON's path."""
    folder.mkdir(exist_ok=True)
    columns = np.tile(np.arange(30, dtype=np.uint8)[None, :, None] * 8, (20, 1, 3))
    images = []
    for i in range(1, 5):
        Image.fromarray(columns).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} | image)
    value = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "set.json").write_text(json.dumps(value))
    return str(folder / "set.json")


def entry(number, image_id, category_id, **more):
    return {"id": number, "image_id": image_id, "category_id": category_id} | more


def test_category_ids_from_0_become_labels_from_1(tmp_path):
    path = annotated(
        tmp_path / "in",
        [entry(10, 1, 0), entry(11, 2, 7), entry(12, 2, 7), entry(13, 3, 0), entry(14, 3, 7),
         entry(15, 9, 0)],
    )  # fmt: skip
    summary = run(tmp_path / "in", tmp_path / "set", annotations=path)
    assert rows(tmp_path / "set") == {"1.png": (1, "zero", 1), "2.png": (3, "seven", 2)}
    assert summary.num_classes == 4 and summary.used_classes == 2
    assert [c["label"] for c in summary.categories] == [1, 2, 3]
    reasons = {e["image_id"]: e["reason"] for e in summary.rejected}
    assert reasons == {
        3: "the image has several classes", 4: "the image has no annotation, so no class",
        9: "unknown image id",
    }  # fmt: skip


def test_an_unknown_category_is_listed(tmp_path):
    path = annotated(tmp_path / "in", [entry(i, i, 0 if i > 1 else 5) for i in range(1, 5)])
    summary = run(tmp_path / "in", tmp_path / "set", annotations=path)
    assert [(e["image_id"], e["reason"]) for e in summary.rejected] == [(1, "unknown category id")]


@pytest.mark.parametrize(
    ("box", "crop"),
    [
        ((10, 8, 8, 4), (8, 7, 20, 13)),  # 12 x 6 about (14, 10)
        ((0, 0, 8, 4), (0, 0, 10, 5)),  # clipped
        ((26, 16, 4, 4), (25, 15, 30, 20)),
        ((10.5, 8.5, 2, 2), (10, 8, 13, 11)),  # 3 x 3 about (11.5, 9.5): whole pixels
        ((5, 5, 1, 1), (4, 4, 7, 7)),  # parts of pixels
        ((-4, -4, 40, 40), (0, 0, 30, 20)),
    ],
)
def test_crops_are_the_box_one_and_a_half_times_as_large(box, crop):
    assert classes.crop_of(list(box), 20, 30) == crop


@pytest.mark.parametrize("box", [[1, 2, 0, 4], [1, 2, 3], None, [40, 2, 3, 4], [1, 2, 3, "x"]])
def test_boxes_that_are_none(box):
    with pytest.raises(Rejection):
        classes.crop_of(box, 20, 30)


def test_box_crops(tmp_path):
    """Two boxes of one image, an empty one, one of no box; class 3 has none left."""
    path = annotated(
        tmp_path / "in",
        [entry(20, 1, 0, bbox=[10, 8, 8, 4]), entry(21, 1, 7, bbox=[0, 0, 8, 4]),
         entry(22, 2, 3, bbox=[1, 1, 0, 3]), entry(23, 3, 0)],
    )  # fmt: skip
    summary = run(tmp_path / "in", tmp_path / "set", annotations=path, bbox_crops=True)
    found = {int(f["source_id"].bytes_list.value[0]): f for f in features(tmp_path / "set")}
    assert found.keys() == {20, 21}
    crop = found[20]
    assert (crop["width"].int64_list.value[0], crop["height"].int64_list.value[0]) == (12, 6)
    pixels = tf.io.decode_jpeg(crop["encoded"].bytes_list.value[0]).numpy()
    np.testing.assert_allclose(pixels[3, :, 0], 8 * np.arange(8, 20), atol=4)
    assert [f["class/label"].int64_list.value[0] for f in (crop, found[21])] == [1, 3]
    assert summary.num_classes == 4 and summary.used_classes == 2
    assert [(e["annotation_id"], e["field"]) for e in summary.rejected] == [(22, "bbox")]


def test_a_box_in_an_image_of_another_size_is_rejected(tmp_path):
    path = annotated(tmp_path / "in", [entry(20, 1, 0, bbox=[1, 1, 5, 5])], width=60)
    summary = run(tmp_path / "in", tmp_path / "set", annotations=path, bbox_crops=True)
    assert [e["field"] for e in summary.rejected] == ["width, height"]
    assert run(tmp_path / "in", tmp_path / "whole", annotations=path).num_examples == 1
    path = annotated(tmp_path / "in", [entry(20, 1, 0, bbox=[1, 1, 5, 5])], width=None)
    with pytest.raises(ValueError, match="no image to convert.*two positive whole numbers"):
        run(tmp_path / "in", tmp_path / "none", annotations=path, bbox_crops=True)


def test_contradictions_are_errors(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: no such folder"):
        run(tmp_path / "missing", tmp_path / "set")
    with pytest.raises(ValueError, match="needs --annotations"):
        run(folders, tmp_path / "set", bbox_crops=True)
    with pytest.raises(ValueError, match="an order of their own"):
        run(folders, tmp_path / "set", classes="x", annotations="y")
    with pytest.raises(ValueError, match="would overwrite"):
        run(folders, tmp_path / "set", annotations=f"{tmp_path}/set.json")
    with pytest.raises(ValueError, match="has no subfolders"):
        run(folders / "n01", tmp_path / "set")


def test_the_scripts(tmp_path):
    def call(name, *flags, check=True):
        command = [sys.executable, f"scripts/{name}.py", *flags]
        done = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True)
        assert not check or not done.returncode, done.stderr
        return done

    sizes = ("--train_images=21", "--val_images=20", "--image_size=48")
    call("make_synthetic_classes", f"--output={tmp_path}", *sizes)
    source = (f"--images={tmp_path}", f"--annotations={tmp_path}/train.json", "--num_shards=2")
    done = call("make_classification_records", *source, f"--output={tmp_path}/r/train")
    assert "21 examples of 20 classes" in done.stdout and "num_classes=21" in done.stdout
    done = call(
        "make_classification_records", *source, f"--output={tmp_path}/r/boxes", "--bbox_crops"
    )
    assert "21 examples" in done.stdout
    done = call("make_classification_records", "--images=/none", "--output=/tmp/x", check=False)
    assert done.returncode == 1 and "error: /none: no such folder" in done.stderr
