"""Every kind of bad input: an error that names its record, or left out, counted and reported."""

import io
import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image

from spinenet_tf import modes
from spinenet_tf.data import check, pipeline, records, rows
from spinenet_tf.data.pipeline import Data
from spinenet_tf.data.report import Report

RNG = np.random.default_rng(5)
PIXELS = np.kron(RNG.integers(0, 256, (8, 10, 3), np.uint8), np.ones([4, 4, 1], np.uint8))
HEIGHT, WIDTH = PIXELS.shape[:2]


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = encode(Image.fromarray(PIXELS), quality=95)


def example(encoded=GOOD, boxes=((4, 4, 10, 10),), labels=None, number=7, **lists) -> bytes:
    """A record; `lists` replace features, which our writer would not let be wrong."""
    labels = labels or [1] * len(boxes)
    objects = [
        records.Instance(tuple(map(float, box)), label, "x", False, 1.0)
        for box, label in zip(boxes, labels, strict=True)
    ]
    record = records.encode_example(encoded, HEIGHT, WIDTH, "x.jpg", number, objects)
    parsed = tf.train.Example.FromString(record)
    for key, values in lists.items():
        feature = parsed.features.feature[f"image/object/{key.replace('__', '/')}"]
        feature.float_list.value[:] = values
    return parsed.SerializeToString()


def corner(**corners) -> bytes:
    return example(**{f"bbox__{side}": [value] for side, value in corners.items()})


RECORDS = {
    "truncated JPEG": (example(GOOD[: len(GOOD) // 2]), "JPEG"),
    "no image": (example(b"not an image"), "Unknown image|image file format"),
    "empty image": (example(b""), "empty|Unknown image|image file format"),
    "zero-byte record": (b"", "image/encoded"),
    "garbage": (b"\x00\xff garbage", "parse"),
    "truncated PNG": (example(encode(Image.fromarray(PIXELS), "PNG")[:200]), "PNG"),
}
OBJECTS = {
    "NaN": (corner(ymin=float("nan")), "NaN or infinite box"),
    "infinite": (corner(xmax=float("inf")), "NaN or infinite box"),
    "swapped corners": (corner(ymin=0.9, ymax=0.2), "swapped corners"),
    "no width": (corner(xmin=0.2, xmax=0.2), "without height or width"),
    "outside": (corner(xmin=1.2, xmax=1.4), "entirely outside"),
    "unknown class": (example(labels=[5]), "unknown class: label 5"),
    "background as class": (example(labels=[0]), "unknown class: label 0"),
    "lists of unequal length": (example(bbox__ymin=[0.1, 0.2]), "not equally long"),
}
BAD = RECORDS | OBJECTS


def write(folder, bad: bytes | None, name="set-00000-of-00001.tfrecord"):
    """Good records 0..4, the bad one in place 2."""
    with tf.io.TFRecordWriter(str(folder / name)) as writer:
        for i in range(5):
            if i == 2 and bad is not None:
                writer.write(bad)
            writer.write(example(number=i))
    return folder / name


def data(folder, **kwargs) -> Data:
    defaults = dict(pattern=f"{folder}/set-*", batch_size=1, canvas=48, max_boxes=5, shuffle=4)
    return Data(**(defaults | kwargs))


def read(source: Data, report: Report, **kwargs) -> list[dict]:
    batches = pipeline.eval_batches(source, num_classes=4, report=report, **kwargs)
    return list(batches.as_numpy_iterator())


@pytest.mark.parametrize("kind", ["truncated JPEG", "zero-byte record", "NaN"])
def test_a_bad_record_is_an_error_that_names_it(tmp_path, kind):
    bad, reason = BAD[kind]
    file = write(tmp_path, bad)
    with pytest.raises(ValueError, match=f"{file}: record 2: .*({reason}).*Data.bad_records"):
        with check.named_errors(data(tmp_path), "boxes", 4):
            read(data(tmp_path), Report(0))


def test_an_error_that_is_not_of_the_input_is_passed_on(tmp_path, capsys):
    """Such as the TPU compiler's; there may be no data to look through."""
    with pytest.raises(tf.errors.InvalidArgumentError, match="Compilation failure"):
        with check.named_errors(data(tmp_path / "none"), "boxes", 4):
            raise tf.errors.InvalidArgumentError(None, None, "Compilation failure: no memory")
    assert "Looking for the record" not in capsys.readouterr().out


def test_every_bad_record_is_left_out_and_reported_if_so_configured(tmp_path):
    """One file a kind; good records 0..4 in each."""
    for i, (bad, _) in enumerate(BAD.values()):
        write(tmp_path, bad, f"set-{i:05}-of-00099.tfrecord")
    allowed = len(BAD) + 1  # unequal lists make two objects
    report = Report(allowed)
    batches = read(data(tmp_path, bad_records=allowed), report)
    ids = [int(batch["id"][0]) for batch in batches]
    assert [ids.count(i) for i in range(5)] == [len(BAD)] * 5
    assert (ids.count(-1), ids.count(7)) == (len(RECORDS), len(OBJECTS))
    assert report.counts == {"record": len(RECORDS), "object": len(OBJECTS) + 1}
    for batch in batches:
        good = 0 <= batch["id"][0] < 5
        assert (batch["classes"] > 0).sum() == good and (batch["boxes"] != 0).any() == good
    for i, (kind, (_, reason)) in enumerate(BAD.items()):
        mine = [p for p in report.problems if f"set-{i:05}" in p]
        assert mine and all(": record 2: " in p and re.search(reason, p) for p in mine), kind


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_bad_object_is_an_error_of_the_batch_itself(tmp_path, kind):
    bad, reason = OBJECTS[kind]
    file = write(tmp_path, bad)
    with pytest.raises(tf.errors.OpError, match=f"{file}: record 2: image 7, object 0: .*{reason}"):
        read(data(tmp_path), Report(0))


def graph(batches: tf.data.Dataset) -> bytes:
    return tf.raw_ops.DatasetToGraphV2(input_dataset=batches._variant_tensor).numpy()


@pytest.mark.parametrize("make", [pipeline.train_batches, pipeline.eval_batches])
def test_on_other_hosts_no_python_is_called(tmp_path, make):
    """Which they lack: those of a TPU slice that is not the machine's own."""
    write(tmp_path, None)
    for labels in ("boxes", "masks"):
        made = (make(data(tmp_path), labels=labels, python=here) for here in (True, False))
        assert [b"PyFunc" in graph(batches) for batches in made] == [True, False]
    with pytest.raises(ValueError, match="Data.bad_records=1: hosts of a TPU"):
        make(data(tmp_path, bad_records=1), python=False)


def test_on_other_hosts_bad_objects_are_named_too(tmp_path, capfd):
    file = write(tmp_path, BAD["NaN"][0])
    with pytest.raises(ValueError, match=f"{file}: record 2: image 7, object 0: NaN or infinite"):
        with check.named_errors(data(tmp_path), "boxes", 4):
            read(data(tmp_path), None, python=False)
    write(tmp_path, example(boxes=[(4, 4, 10, 10)] * 2))
    few = data(tmp_path, max_boxes=1)
    with pytest.raises(tf.errors.OpError, match="more than Data.max_boxes objects"):
        read(few, None, python=False)
    assert len(read(few, None, python=False, strict=False)) == 6
    said = f'more than Data.max_boxes objects, of which the last are left out: ["{file}"] [2] [7]'
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["truncated JPEG", "NaN"])
def test_training_goes_on_without_it(tmp_path, kind):
    write(tmp_path, BAD[kind][0])
    report = Report(1)
    stream = pipeline.train_batches(
        data(tmp_path, bad_records=1), num_classes=4, report=report
    ).take(30)
    ids = [int(batch["id"][0]) for batch in stream.as_numpy_iterator()]
    assert set(ids) - {7} == {0, 1, 2, 3, 4} and -1 not in ids
    assert sum(report.counts.values()) == 1  # however many epochs


def test_more_bad_records_than_allowed_are_an_error(tmp_path):
    for i in range(3):
        write(tmp_path, RECORDS["no image"][0], f"set-0000{i}-of-00003.tfrecord")
    with pytest.raises(tf.errors.OpError, match="Data.bad_records=2 says how many"):
        read(data(tmp_path, bad_records=2), Report(2))
    read(data(tmp_path, bad_records=3), Report(3))


def test_a_set_of_only_bad_records_ends_in_an_error_and_no_endless_loop(tmp_path):
    with tf.io.TFRecordWriter(f"{tmp_path}/set-00000-of-00001.tfrecord") as writer:
        for _ in range(6):
            writer.write(b"")
    with pytest.raises(tf.errors.OpError, match="image/encoded"):
        next(iter(pipeline.train_batches(data(tmp_path, bad_records=5), report=Report(5))))
    with pytest.raises(ValueError, match="bad_records=6, but there are 6 records"):
        pipeline.train_batches(data(tmp_path, bad_records=6))


def break_checksum(file, number):
    content, place = bytearray(file.read_bytes()), 0
    for _ in range(number):
        place += struct.unpack_from("<Q", content, place)[0] + 16
    content[place + 20] ^= 1
    file.write_bytes(content)


def test_a_wrong_checksum_names_its_record_and_costs_the_rest_of_its_file(tmp_path):
    file = write(tmp_path, None, "set-00000-of-00002.tfrecord")
    write(tmp_path, None, "set-00001-of-00002.tfrecord")
    break_checksum(file, 3)
    text = f"{file}: record 3: wrong checksum or cut off; the 1 records behind it"
    with pytest.raises(ValueError, match=text):
        with check.named_errors(data(tmp_path), "boxes", 4):
            read(data(tmp_path), Report(0))
    report = Report(2)
    ids = [int(b["id"][0]) for b in read(data(tmp_path, bad_records=2), report)]
    assert sorted(ids) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert report.counts == {"record": 2} and text in report.problems[0]


def test_a_file_that_was_cut_off_is_found(tmp_path):
    file = write(tmp_path, None)
    file.write_bytes(file.read_bytes()[:-30])
    report = Report(1)
    ids = [int(b["id"][0]) for b in read(data(tmp_path, bad_records=1), report)]
    assert ids == [0, 1, 2, 3] and f"{file}: record 4: wrong checksum" in report.problems[0]


ODD = {
    "CMYK JPEG": (Image.fromarray(PIXELS).convert("CMYK"), "JPEG"),
    "grey JPEG": (Image.fromarray(PIXELS).convert("L"), "JPEG"),
    "grey PNG": (Image.fromarray(PIXELS).convert("L"), "PNG"),
    "16-bit PNG": (Image.fromarray(np.uint16(PIXELS[..., 0]) * 257), "PNG"),
    "palette PNG": (Image.fromarray(PIXELS).quantize(16), "PNG"),
    "PNG with alpha": (Image.fromarray(PIXELS).convert("RGBA"), "PNG"),
    "GIF": (Image.fromarray(PIXELS).convert("L"), "GIF"),
    "BMP": (Image.fromarray(PIXELS), "BMP"),
}


def test_odd_images_are_read_as_they_look(tmp_path):
    with tf.io.TFRecordWriter(f"{tmp_path}/set-00000-of-00001.tfrecord") as writer:
        for number, (picture, form) in enumerate(ODD.values()):
            options = {"quality": 95} if form == "JPEG" else {}
            writer.write(example(encode(picture, form, **options), number=number))
    batches = read(data(tmp_path), report := Report(0))
    assert not report.counts and len(batches) == len(ODD)
    for batch, (kind, (picture, form)) in zip(batches, ODD.items(), strict=True):
        shown = batch["image"][0, :HEIGHT, :WIDTH].astype(int)
        looks = PIXELS[..., :1] if "16" in kind else np.asarray(picture.convert("RGB"), int)
        assert np.abs(shown - looks).mean() < (6 if form == "JPEG" else 0.6), kind


@pytest.mark.parametrize("objects", [0, 5, 130])
def test_any_number_of_objects(tmp_path, objects):
    """Data.max_boxes is 5: the rest is cut and counted in training, an error in evaluation."""
    write(tmp_path, example(boxes=[(k % 20, 4, 10, 10) for k in range(objects)]))
    report = Report(0)
    stream = pipeline.train_batches(data(tmp_path), num_classes=4, report=report).take(12)
    rows = {int(b["id"][0]): b for b in stream.as_numpy_iterator()}
    assert (rows[7]["classes"] > 0).sum() == min(objects, 5)
    assert report.counts == ({"cut": objects - 5} if objects > 5 else {})
    if objects > 5:
        assert f"image 7 has {objects} objects; raise Data.max_boxes=5" in report.problems[0]
        with pytest.raises(tf.errors.OpError, match="raise Data.max_boxes"):
            read(data(tmp_path), Report(0))


def test_a_box_that_sticks_out_is_clipped(tmp_path):
    write(tmp_path, corner(xmin=-0.5, xmax=0.5, ymin=0.5, ymax=1.5))
    box = read(data(tmp_path), Report(0))[2]["boxes"][0, 0]
    np.testing.assert_allclose(box, [16, 0, 32, 20], atol=1e-4)


def class_example(number, label, encoded=GOOD):
    record = records.encode_class_example(encoded, HEIGHT, WIDTH, "x.jpg", number, 1, "x")
    parsed = tf.train.Example.FromString(record)
    parsed.features.feature["image/class/label"].int64_list.value[:] = [label]
    return parsed.SerializeToString()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (class_example(7, 9), r"label 9 is not in 1\.\.3"),
        (class_example(7, 0), r"label 0 is not in 1\.\.3"),
        (class_example(7, 1, GOOD[:300]), "JPEG"),
        (b"", "image/"),
    ],
)
def test_bad_records_of_classes(tmp_path, bad, reason):
    file = tmp_path / "set-00000-of-00001.tfrecord"
    with tf.io.TFRecordWriter(str(file)) as writer:
        for record in (class_example(0, 1), bad, class_example(1, 3)):
            writer.write(record)
    with pytest.raises(ValueError, match=f"{file}: record 1: .*{reason}"):
        with check.named_errors(data(tmp_path), "class", 4):
            read(data(tmp_path), Report(0), labels="class")
    batches = read(data(tmp_path, bad_records=1), Report(1), labels="class")
    assert [int(b["id"][0]) for b in batches] == [0, -1, 1]
    stream = pipeline.train_batches(
        data(tmp_path, bad_records=1), labels="class", num_classes=4, report=Report(1)
    )
    assert {int(b["id"][0]) for b in stream.take(8).as_numpy_iterator()} == {0, 1}


@pytest.fixture
def one_bad(tmp_path):
    """The folder of a recipe's shards, in the first of which record 3 is no JPEG."""
    shards = tiny.make_records(tmp_path)
    first = sorted(shards.glob("set-*.tfrecord"))[0]
    lines = [bytes(r.numpy()) for r in tf.data.TFRecordDataset(str(first))]
    with tf.io.TFRecordWriter(str(first)) as writer:
        for line in [*lines[:3], example(GOOD[:300]), *lines[4:]]:
            writer.write(line)
    return shards


def test_training_names_the_record_that_stopped_it(one_bad, tmp_path):
    """The whole way: recipe, trainer, error."""
    tiny.bind(one_bad)
    first = sorted(one_bad.glob("set-*.tfrecord"))[0]
    with pytest.raises(ValueError, match=f"{first}: record 3: .*JPEG"):
        modes.train(f"{tmp_path}/model")


def test_training_skips_the_records_that_it_may(one_bad, tmp_path, eagerly):
    tiny.bind(one_bad, "Data.bad_records = 1", "Training.steps = 4")
    modes.train(f"{tmp_path}/model")
    assert tf.train.latest_checkpoint(f"{tmp_path}/model").endswith("-4")


def lint(*arguments):
    command = [sys.executable, str(tiny.ROOT / "scripts/check_records.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=tiny.environment()
    )


def test_check_records_lists_what_is_bad_and_draws_the_rest(tmp_path):
    file = write(tmp_path, RECORDS["truncated JPEG"][0], "set-00000-of-00002.tfrecord")
    write(tmp_path, OBJECTS["unknown class"][0], "set-00001-of-00002.tfrecord")
    arguments = [f"--pattern={tmp_path}/set-*", "--num_classes=4", "--side=64", "--columns=3"]
    done = lint(*arguments, f"--sheet={tmp_path}/sheet.png")
    assert done.returncode == 1, done.stderr
    assert "cannot be used: 1 records, 1 objects" in done.stdout
    assert f"{file}: record 2: " in done.stdout and "unknown class: label 5" in done.stdout
    assert "11 good records" in done.stdout
    assert Image.open(tmp_path / "sheet.png").size == (192, 256)  # 11 of 3 a row
    file.unlink()
    figures = json.loads(lint(*arguments[:1], "--json").stdout)
    assert figures["images"] == 6 and figures["classes"] == {"1": 5, "5": 1}
    missing = lint(f"--pattern={tmp_path}/absent-*")
    assert missing.returncode == 1 and "matches no file" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_record_that_only_its_own_random_view_breaks_is_reported():
    def load(source, luck):
        file, number, record = source
        fine = tf.debugging.Assert(luck[1] != 3, ["bad luck"])
        with tf.control_dependencies([fine]):
            return {"file": file, "number": tf.identity(number), "there": tf.constant(True)} | {
                "image": tf.zeros([2, 2, 3], tf.uint8)
            }

    numbers = tf.data.Dataset.range(5)
    stream = numbers.map(lambda n: (("shard", n, "record"), (tf.constant(0, tf.int64), n)))
    report = Report(1)
    found = [bool(row["there"]) for row in rows.guarded(stream, load, report)]
    assert found == [True, True, True, False, True]
    assert report.problems == ["shard: record 3: could not be read with its own random view"]


def test_memory_does_not_grow_over_epochs(tmp_path):
    """Resident memory of a process that reads 3, then 12 epochs of large images."""
    image = Image.fromarray(np.kron(PIXELS, np.ones([16, 16, 1], np.uint8)))
    with tf.io.TFRecordWriter(str(tmp_path / "set-00000-of-00001")) as writer:
        for number in range(32):
            writer.write(example(encode(image), number=number + 1))
    code = f"""
from spinenet_tf.data.pipeline import Data, train_batches
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
data = Data(pattern={str(tmp_path / "set-*")!r}, batch_size=4, canvas=640, shuffle=16)
batches, seen = iter(train_batches(data)), []
for epochs in (3, 12):
    for _ in range(8 * epochs):
        next(batches)
    seen.append(resident())
print(*seen)
"""
    run = tiny.run([sys.executable, "-c", code])
    after_3, after_15 = map(float, run.stdout.split()[-2:])
    assert after_15 < after_3 + 40, run.stderr  # MiB; the images of an epoch are 38
