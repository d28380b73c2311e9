"""Sets prepared by TensorFlow Datasets: small real ones, written in a temporary folder."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import test_pipeline

from spinenet_tf.data import pipeline, tfds_source
from spinenet_tf.data.pipeline import Data

tfds = pytest.importorskip("tensorflow_datasets")
NAMES = ["ant", "bee", "cicada"]
COUNT = 13


def store(folder, name="tiny_classes", features=None, rows=None, file_format="tfrecord"):
    """A set as `tfds build` leaves it. Its ad-hoc builders need more than our requirements have."""
    features = features or {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=NAMES),
    }
    # All pixels of image i are i; its label is i % 3.
    rows = rows or [
        {"image": np.full((20, 30, 3), i, np.uint8), "label": i % 3} for i in range(COUNT)
    ]
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=f"{folder}/{name}/1.0.0",
        module_name="",
    )  # fmt: skip
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    (folder / name / "1.0.0").mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, 5, file_format=file_format)
    splits = {"train": rows, "validation": rows[:4]}
    writer.initialize_splits(splits)
    for split, examples in splits.items():
        writer.add_examples({split: examples})
    writer.close_splits(list(splits))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    store(folder)
    return folder


def data(folder, **kwargs):
    defaults = dict(
        pattern="tfds:tiny_classes:train", tfds_dir=str(folder), batch_size=4, canvas=8, shuffle=5
    )
    return Data(**(defaults | kwargs))


def test_files_counts_and_classes(folder):
    train = data(folder)
    assert len(train.files()) == 3 and train.num_examples() == COUNT
    assert data(folder, pattern="tfds:tiny_classes:validation").num_examples() == 4
    assert data(folder, pattern="tfds:tiny_classes:1.0.0:train").num_examples() == COUNT
    categories = [{"id": i, "label": i + 1, "name": n} for i, n in enumerate(NAMES)]
    assert train.categories() == categories
    assert set(train.some_labels()) == {1, 2, 3}


def test_counts_are_those_of_the_files(folder):
    counts = [len(list(tf.data.TFRecordDataset(f))) for f in data(folder).files()]
    assert data(folder).counts(data(folder).files()) == counts and len(counts) == 3


def test_every_image_comes_once_with_its_label(folder):
    batches = test_pipeline.take(pipeline.eval_batches(data(folder), labels="class"), 5)
    rows = [(int(i), v[0, 0, 0], n) for b in batches for i, v, n in zip(b["id"], b["image"],
            b["label"], strict=True)]  # fmt: skip
    real = [row for row in rows if row[0] >= 0]
    assert len(rows) == 16 and len({row[0] for row in real}) == COUNT
    assert sorted(int(value) for _, value, _ in real) == list(range(COUNT))
    assert all(label == value % 3 + 1 for _, value, label in real)


def test_resume_is_exact(folder):
    expected = test_pipeline.take(pipeline.train_batches(data(folder), labels="class"), 9)[5:]
    actual = test_pipeline.take(pipeline.train_batches(data(folder), labels="class", step=5), 4)
    for a, b in zip(expected, actual, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_hosts_stream_different_files(folder):
    where = dict(labels="class", pipelines=2, replicas=2)
    hosts = [
        test_pipeline.take(pipeline.train_batches(data(folder), pipeline=i, **where), 12)
        for i in range(2)
    ]
    ids = [set(test_pipeline.ids(host)) for host in hosts]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == COUNT


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("tfds:tiny_classes", ValueError, "is not 'tfds:<name>:<split>'"),
        ("tfds:tiny_classes:test", ValueError, "split 'test' is not of"),
        ("tfds:tiny_classes:train[:5]", ValueError, "of a whole split"),
        ("tfds:no_such_set_at_all:train", ValueError, "no such data set"),
        ("tfds:i_naturalist2017:train", FileNotFoundError, "run  tfds build i_naturalist2017 --d"),
        ("tfds:imagenet2012:train", FileNotFoundError, "manual_dir=FOLDER\n(.|\n)*ILSVRC2012_img"),
    ],
)
def test_what_is_missing_is_said(folder, pattern, error, message):
    with pytest.raises(error, match=message) as raised:
        data(folder, pattern=pattern).files()
    assert f"Data.pattern={pattern!r}" in str(raised.value)


def test_other_file_formats_and_other_kinds_of_sets_are_refused(tmp_path):
    rows = [{"text": "x", "label": 0}]
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=NAMES)}
    store(tmp_path, "tiny_text", features, rows)
    with pytest.raises(ValueError, match="no feature 'image'.*'label', 'text'"):
        data(tmp_path, pattern="tfds:tiny_text:train").files()
    store(tmp_path, "tiny_riegeli", file_format="array_record")
    with pytest.raises(ValueError, match="stored as array_record"):
        data(tmp_path, pattern="tfds:tiny_riegeli:train").files()


def test_the_library_is_not_imported_for_plain_shards_and_its_absence_is_said(monkeypatch):
    code = "import sys, spinenet_tf.data.pipeline; assert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        tfds_source.files("tfds:another:train")
