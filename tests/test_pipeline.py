"""The input pipeline on records made in the test."""

import io
import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from spinenet_tf.data import pipeline, records
from spinenet_tf.data.pipeline import Data

RNG = np.random.default_rng(0)


def png(height, width, value=None):
    pixels = np.full((height, width, 3), value, np.uint8) if value is not None else None
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8) if pixels is None else pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), pixels


def instance(box, label=1, crowd=False):
    return records.Instance(tuple(map(float, box)), label, str(label), crowd, box[2] * box[3])


def write(path, examples):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example)


@pytest.fixture
def shards(tmp_path):
    """23 images of 30 x 40 in 3 shards; image i has i % 4 objects, the last one a crowd."""
    for shard in range(3):
        examples = []
        for i in range(shard, 23, 3):
            objects = [instance((k, 2, 10, 5), k + 1, k == 2) for k in range(i % 4)]
            examples.append(records.encode_example(png(30, 40, i)[0], 30, 40, "x.png", i, objects))
        write(tmp_path / f"set-0000{shard}-of-00003.tfrecord", examples)
    return tmp_path


def data(shards, **kwargs):
    defaults = dict(pattern=f"{shards}/set-*", batch_size=4, canvas=48, max_boxes=5, shuffle=8)
    return Data(**(defaults | kwargs))


def ids(batches):
    return np.concatenate([b["id"] for b in batches]).tolist()


def take(dataset, n):
    return list(itertools.islice(dataset.as_numpy_iterator(), n))


def test_the_batch_contract(shards):
    batch = take(pipeline.eval_batches(data(shards)), 1)[0]
    expected = {
        "image": ((4, 48, 48, 3), "uint8"), "image_size": ((4, 2), "int32"),
        "source_size": ((4, 2), "int32"), "id": ((4,), "int64"), "boxes": ((4, 5, 4), "float32"),
        "classes": ((4, 5), "int32"), "crowd": ((4, 5), "bool"), "area": ((4, 5), "float32"),
        "draws": ((4, 4), "float32"),
    }  # fmt: skip
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == expected
    spec = pipeline.train_batches(data(shards)).element_spec
    assert {k: (tuple(v.shape), v.dtype.name) for k, v in spec.items()} == expected


def test_labels_and_pixels_are_where_they_belong(shards):
    batches = take(pipeline.eval_batches(data(shards)), 6)
    rows = {int(b["id"][i]): {k: v[i] for k, v in b.items()} for b in batches for i in range(4)}
    row = rows[7]  # three objects, value 7
    assert (row["image"][:30, :40] == 7).all()
    assert not row["image"][30:].any() and not row["image"][:, 40:].any()
    np.testing.assert_allclose(
        row["boxes"][:3], [[2, 0, 7, 10], [2, 1, 7, 11], [2, 2, 7, 12]], atol=1e-4
    )
    assert row["classes"].tolist() == [1, 2, 3, 0, 0]
    assert row["crowd"].tolist() == [False, False, True, False, False]
    np.testing.assert_allclose(row["area"], [50, 50, 50, 0, 0])


def test_eval_sees_every_image_once_and_fills_the_last_batch(shards):
    batches = list(pipeline.eval_batches(data(shards)).as_numpy_iterator())
    assert len(batches) == 6
    assert sorted(ids(batches)) == [-1] + list(range(23))
    hosts = [
        list(
            pipeline.eval_batches(
                data(shards), pipeline=i, pipelines=2, replicas=2
            ).as_numpy_iterator()
        )
        for i in range(2)
    ]
    assert [len(host) for host in hosts] == [6, 6]  # collectives need equally many
    assert sorted(ids(hosts[0] + hosts[1])) == [-1] + list(range(23))


def test_training_sees_every_image_once_an_epoch_in_new_orders(shards):
    seen = ids(take(pipeline.train_batches(data(shards, batch_size=1)), 46))
    assert sorted(seen[:23]) == sorted(seen[23:]) == list(range(23))
    assert seen[:23] != seen[23:]
    again = ids(take(pipeline.train_batches(data(shards, batch_size=1)), 46))
    assert seen == again
    other = ids(take(pipeline.train_batches(data(shards, batch_size=1, seed=1)), 46))
    assert seen != other


def test_the_callers_global_seed_changes_no_order(shards):
    """With a seed of 0 TensorFlow compares it with the epoch's, a tensor: an error."""
    orders = []
    for seed in (None, 0, 7):
        tf.random.set_seed(seed)
        orders.append(ids(take(pipeline.train_batches(data(shards, batch_size=1)), 46)))
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("step", [1, 5, 6, 20])
def test_starting_at_a_step_gives_what_would_have_come(shards, step):
    expected = take(pipeline.train_batches(data(shards)), step + 3)[step:]
    actual = take(pipeline.train_batches(data(shards), step=step), 3)
    for a, b in zip(expected, actual, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_hosts_stream_different_files_with_different_luck(shards):
    hosts = [
        take(
            pipeline.train_batches(data(shards, batch_size=2), pipeline=i, pipelines=2, replicas=2),
            40,
        )
        for i in range(2)
    ]
    assert not set(ids(hosts[0])) & set(ids(hosts[1]))
    assert set(ids(hosts[0])) | set(ids(hosts[1])) == set(range(23))
    draws = np.concatenate([b["draws"] for host in hosts for b in host])
    assert len(np.unique(draws[:, 0])) == len(draws)
    assert 0 <= draws.min() and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.05


def test_more_hosts_than_files_share_the_records(shards):
    """23 records on 5 hosts: three take 5, two take 4. A restart at step 7 goes on exactly."""
    wide = data(shards, batch_size=5)
    hosts = [dict(pipeline=i, pipelines=5, replicas=5) for i in range(5)]
    streams = [take(pipeline.train_batches(wide, **host), 12) for host in hosts]
    first_epoch = [ids(s[: 5 if i < 3 else 4]) for i, s in enumerate(streams)]
    assert sorted(sum(first_epoch, [])) == list(range(23))
    resumed = [take(pipeline.train_batches(wide, step=7, **host), 5) for host in hosts]
    assert [ids(s[7:]) for s in streams] == [ids(s) for s in resumed]


def test_a_large_image_is_reduced_a_small_one_is_not():
    encoded, pixels = png(200, 100)
    row = pipeline.place(pipeline.decode_image(encoded), 50)
    assert row["image_size"].numpy().tolist() == [50, 25]
    assert row["source_size"].numpy().tolist() == [200, 100]
    expected = tf.image.resize(pixels, [50, 25], antialias=True)
    assert np.abs(row["image"][:50, :25].numpy() - expected).max() <= 0.51
    small = pipeline.place(pipeline.decode_image(png(20, 50)[0]), 50)
    assert small["image_size"].numpy().tolist() == [20, 50]


def test_grey_jpeg_becomes_rgb_and_eager_equals_tf_data():
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (16, 16), np.uint8)).save(buffer, "JPEG")
    image = pipeline.decode_image(buffer.getvalue())
    assert image.shape == (16, 16, 3)
    mapped = tf.data.Dataset.from_tensors(buffer.getvalue()).map(pipeline.decode_image)
    np.testing.assert_array_equal(image, next(iter(mapped)))


def test_too_many_objects_are_cut_in_training_and_refused_in_evaluation(tmp_path):
    objects = [instance((k, 2, 10, 5)) for k in range(6)]
    example = records.encode_example(png(30, 40)[0], 30, 40, "x", 12, objects)
    write(tmp_path / "set-00000-of-00001.tfrecord", [example])
    batch = take(pipeline.train_batches(data(tmp_path, batch_size=1)), 1)[0]
    assert (batch["classes"] > 0).sum() == 5
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="image 12 has 6 objects; raise Data.max"
    ):
        take(pipeline.eval_batches(data(tmp_path, batch_size=1)), 1)


def mask_instance(box, mask):
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    area = float(mask.sum())
    return records.Instance(tuple(map(float, box)), 1, "1", False, area, buffer.getvalue())


@pytest.fixture
def mask_shards(tmp_path):
    """5 images of 60 x 80; image i has i full objects: 10 x 5 boxes, their left half covered."""
    examples = []
    for i in range(5):
        objects = []
        for k in range(i):
            mask = np.zeros([60, 80])
            mask[4:24, 10 * k : 10 * k + 5] = 1
            objects.append(mask_instance((10 * k, 4, 10, 20), mask))
        examples.append(records.encode_example(png(60, 80)[0], 60, 80, "x.png", i, objects))
    write(tmp_path / "set-00000-of-00001.tfrecord", examples)
    return tmp_path


def test_masks_come_with_their_boxes(mask_shards):
    """The canvas is smaller than the image, and one image has more objects than rows."""
    cut = data(mask_shards, batch_size=1, canvas=40, max_boxes=3, mask_size=10, shuffle=1)
    spec = pipeline.train_batches(cut, labels="masks").element_spec
    assert spec["masks"].shape == (1, 3, 10, 10) and spec["masks"].dtype == tf.uint8
    rows = {int(b["id"][0]): b for b in take(pipeline.train_batches(cut, labels="masks"), 5)}
    for i, row in rows.items():
        assert row["masks"].shape == (1, 3, 10, 10)
        count = min(i, 3)
        assert (row["classes"][0] > 0).sum() == count
        assert not row["masks"][0, count:].any()
        if count > 1:  # the first object touches the image's edge
            assert (row["masks"][0, 1:count, :, :5] == 255).all()
            assert not row["masks"][0, 1:count, :, 5:].any()
            np.testing.assert_allclose(row["boxes"][0, 1], [2, 5, 12, 10], atol=1e-4)


def test_masks_of_padding_rows_are_blank_and_the_rest_is_as_without(mask_shards):
    kwargs = dict(batch_size=3, max_boxes=5, mask_size=8)
    with_masks = take(pipeline.eval_batches(data(mask_shards, **kwargs), labels="masks"), 2)
    without = take(pipeline.eval_batches(data(mask_shards, **kwargs)), 2)
    assert with_masks[1]["id"].tolist() == [3, 4, -1]
    assert with_masks[1]["masks"][0, :3].any() and not with_masks[1]["masks"][2].any()
    for a, b in zip(with_masks, without, strict=True):
        assert a.keys() - b.keys() == {"masks"}
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("batches", [pipeline.train_batches, pipeline.eval_batches])
def test_records_without_masks_are_named(shards, batches):
    only = data(shards, batch_size=1, shuffle=1, max_boxes=5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="image [0-9]+ has objects without ma"):
        take(batches(only, labels="masks"), 23)


def test_unknown_labels_are_refused(shards):
    for batches in (pipeline.train_batches, pipeline.eval_batches):
        with pytest.raises(ValueError, match="labels='mask' is not one of"):
            batches(data(shards), labels="mask")


@pytest.fixture
def class_shards(tmp_path):
    """23 images of 30 x 40 in 3 shards; image i is of class i % 5 + 1."""
    for shard in range(3):
        examples = [
            records.encode_class_example(png(30, 40)[0], 30, 40, "x.png", i, i % 5 + 1, "x")
            for i in range(shard, 23, 3)
        ]
        write(tmp_path / f"set-0000{shard}-of-00003.tfrecord", examples)
    return tmp_path


def test_the_batch_contract_of_classes(class_shards):
    expected = {
        "image": ((4, 24, 24, 3), "uint8"), "id": ((4,), "int64"), "label": ((4,), "int32"),
        "draws": ((4, 4), "float32"),
    }  # fmt: skip
    for batches in (pipeline.train_batches, pipeline.eval_batches):
        spec = batches(data(class_shards, canvas=24), labels="class").element_spec
        assert {k: (tuple(v.shape), v.dtype.name) for k, v in spec.items()} == expected


def test_evaluation_of_classes_sees_every_image_once(class_shards):
    batches = take(pipeline.eval_batches(data(class_shards), labels="class"), 7)
    assert sorted(ids(batches)) == [-1, *range(23)]
    for batch in batches:
        for number, label in zip(batch["id"], batch["label"], strict=True):
            assert label == (number % 5 + 1 if number >= 0 else 0)
    assert not batches[-1]["image"][-1].any()


@pytest.mark.parametrize("step", [1, 6, 11])
def test_classes_resume_exactly_with_the_same_views(class_shards, step):
    expected = take(pipeline.train_batches(data(class_shards), labels="class"), step + 3)[step:]
    actual = take(pipeline.train_batches(data(class_shards), labels="class", step=step), 3)
    for a, b in zip(expected, actual, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_an_image_is_seen_differently_each_epoch(class_shards):
    rows = take(pipeline.train_batches(data(class_shards, batch_size=1), labels="class"), 46)
    views = {}
    for row in rows:
        views.setdefault(int(row["id"][0]), []).append(row["image"])
    assert len(views) == 23
    assert all((first != second).any() for first, second in views.values())


def test_some_labels_of_classes(class_shards):
    assert set(data(class_shards).some_labels()) == {1, 2, 3, 4, 5}


def test_some_labels_of_objects(shards):
    assert set(data(shards).some_labels()) == {1, 2, 3}


@pytest.mark.parametrize(
    "bad",
    [
        {"crop_area": (0.0, 1.0)}, {"crop_area": (0.5, 1.1)}, {"crop_area": (0.9, 0.8)},
        {"crop_ratio": (0.0, 1.0)}, {"crop_ratio": (2.0, 1.0)},
    ],
)  # fmt: skip
def test_crops_that_cannot_be_are_refused(bad):
    (field,) = bad
    with pytest.raises(ValueError, match=rf"Data.{field}=\({bad[field][0]}"):
        Data(**bad)


def test_missing_data_says_what_to_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="train/Data.pattern"):
        Data().files()
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        Data(pattern=f"{tmp_path}/nothing-here*").files()
    with pytest.raises(ValueError, match="batch_size=4 does not divide by 3 replicas"):
        pipeline.train_batches(Data(pattern="x", batch_size=4), replicas=3)


def test_the_sidecar_names_classes_and_saves_counting(shards):
    assert data(shards).num_examples() == 23
    sidecar = {
        "categories": [{"id": 9, "name": "nine", "label": 1}],
        "shards": {f"set-0000{i}-of-00003.tfrecord": 100 for i in range(3)},
    }
    (shards / "set.json").write_text(json.dumps(sidecar))
    assert data(shards).num_examples() == 300
    assert data(shards).categories() == sidecar["categories"]


def test_equal_names_in_two_folders_are_counted_apart(tmp_path):
    for name, count in (("x", 3), ("y", 5)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train-00000-of-00001.tfrecord", [b""] * count)
        sidecar = {"categories": [], "shards": {"train-00000-of-00001.tfrecord": count}}
        (tmp_path / name / "train.json").write_text(json.dumps(sidecar))
    both = Data(pattern=f"{tmp_path}/x/train-*.tfrecord,{tmp_path}/y/train-*.tfrecord")
    assert both.num_examples() == 8


def test_empty_shards_are_an_error(tmp_path):
    write(tmp_path / "set-00000-of-00001.tfrecord", [])
    with pytest.raises(ValueError, match="the shards hold no record"):
        data(tmp_path).num_examples()


def photo(height, width):
    """A smooth picture with some detail, as a JPEG."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17 + c) * np.cos(y / 23 - c) for c in range(3)]
    pixels = (127 + 100 * np.stack(waves, -1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), pixels


@pytest.mark.parametrize("sides", [(100, 160), (330, 400), (480, 641), (1300, 400), (80, 2000)])
def test_large_jpegs_are_decoded_reduced(sides):
    """Close to decoding all and resizing; 1, 2, 4, 8 and 16 times the canvas."""
    encoded, pixels = photo(*sides)
    row = pipeline.place(tf.constant(encoded), 100)
    whole = pipeline.place(tf.constant(pixels), 100)
    for key in ("image_size", "source_size"):
        np.testing.assert_array_equal(row[key], whole[key])
    assert row["source_size"].numpy().tolist() == list(sides)
    difference = np.abs(row["image"].numpy().astype(int) - whole["image"].numpy())
    assert difference.mean() < 0.8


def test_no_more_is_decoded_than_an_eighth_of_a_huge_jpeg(monkeypatch):
    ratios = []
    decode = tf.io.decode_jpeg

    def noted(*args, ratio=1, **kwargs):
        ratios.append(ratio)
        return decode(*args, ratio=ratio, **kwargs)

    monkeypatch.setattr(tf.io, "decode_jpeg", noted)
    for side, ratio in ((199, 1), (200, 2), (399, 2), (400, 4), (1600, 8)):
        ratios.clear()
        pipeline.place(tf.constant(photo(20, side)[0]), 100)
        assert ratios == [ratio], side


def test_the_shuffle_buffer_is_bounded_in_bytes(shards):
    source = data(shards, shuffle=1000)
    mean = np.mean([len(r.numpy()) for r in tf.data.TFRecordDataset(source.files()[:1])])
    assert source.buffer(source.files()) == 1000
    small = data(shards, shuffle=1000, shuffle_bytes=int(5.5 * mean))
    assert small.buffer(small.files()) == 5
    assert data(shards, shuffle_bytes=1).buffer(source.files()) == 1
    seen = ids(take(pipeline.train_batches(small), 23))
    assert sorted(seen) == sorted(4 * list(range(23)))
