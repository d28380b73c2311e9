"""TFRecord shards -> batches. The host reads, decodes and pads; everything else is the device's.

A batch is the only thing that the rest of the package knows of the data. With labels='boxes' or
'masks', n being `Data.max_boxes`:

    image        [b, s, s, 3] uint8    RGB, top left on a black square of s = `Data.canvas` pixels
    image_size   [b, 2]       int32    height and width of the image on the canvas
    source_size  [b, 2]       int32    height and width of the image in its file
    id           [b]          int64    COCO image id; -1 marks a padding row of the last eval batch
    boxes        [b, n, 4]    float32  ymin, xmin, ymax, xmax, canvas pixels; padded with 0
    classes      [b, n]       int32    0 is padding
    crowd        [b, n]       bool     iscrowd
    area         [b, n]       float32  of the object, source pixels
    draws        [b, 4]       float32  uniform [0, 1): the image's luck for random augmentation
    viewed       [b]          bool     only with Data.augment='host', True: the image is the random
                                       view already, of the network's size, and `image_size` what
                                       of it is no padding; boxes may stick out, as on the device

Bad objects are reported and become padding, so padding may lie between objects. With
labels='masks', m being `Data.mask_size`, there are also

    masks        [b, n, m, m] uint8    255 in the object; in its box's frame: `images.crop_masks`

labels='class' has rows of their own:

    image        [b, s, s, 3] uint8    RGB; a random crop in training, the centre in evaluation
    id           [b]          int64    -1 marks a padding row of the last eval batch
    label        [b]          int32    from 1; 0 is the background and padding
    draws        [b, 4]       float32  as above
"""

import functools
from collections.abc import Callable

import tensorflow as tf

from spinenet_tf.data import rows
from spinenet_tf.data.images import decode_image, place  # noqa: F401 - their public place
from spinenet_tf.data.report import PADDING, Report
from spinenet_tf.data.rows import AUTOTUNE, Row
from spinenet_tf.data.source import Data
from spinenet_tf.ops.augment import Augmentation

Batch = Row
LABELS = ("boxes", "masks", "class")
READERS = 16  # files that are read side by side

# AutoGraph would take 3 s to convert what has nothing to convert.
as_written = tf.autograph.experimental.do_not_convert


def train_batches(
    data: Data,
    *,
    labels: str = "boxes",
    step: int = 0,
    pipeline: int = 0,
    pipelines: int = 1,
    replicas: int = 1,
    num_classes: int | None = None,
    augmentation: Augmentation | None = None,
    report: Report | None = None,
    python: bool = True,
) -> tf.data.Dataset:
    """Endless shuffled batches of one replica, from the one that training step `step` needs.

    Args:
      labels: one of `LABELS`: what a row carries besides its image.
      pipeline: which of `pipelines` hosts this is; each streams its own files.
      replicas: all replicas; a host's batches go to its replicas in turn.
      num_classes: with the background: labels from it on are errors; None: labels are not checked.
      augmentation: the random views, for data.augment='host'.
      report: where to note what is left out.
      python: whether the data set runs in this process. Where not, on a TPU's other hosts, a bad
        object is an error that does not name its record.

    Raises:
      ValueError: the batch size does not divide by the number of replicas, other `labels`,
        data.augment='host' without `augmentation`, `Data.bad_records` without `python`, or more bad
        records allowed than there are.
      FileNotFoundError: no shards.
    """
    batch, report = _split(data, replicas), _report(data, report, python)
    _check_labels(labels)
    if data.augment == "host" and labels != "class" and not augmentation:
        raise ValueError("Data.augment='host' needs the task's augmentation")
    files = data.files()
    if len(files) >= pipelines:
        mine, part, parts = files[pipeline::pipelines], 0, 1
    else:  # too few files to go round: all hosts read all, and take every so many'th record
        mine, part, parts = files, pipeline, pipelines
    seen = step * data.batch_size // pipelines
    counted = seen or data.bad_records
    per_epoch = -(-(sum(data.counts(mine)) - part) // parts) if counted else 1
    if data.bad_records and data.bad_records >= per_epoch:
        raise ValueError(f"Data.bad_records={data.bad_records}, but there are {per_epoch} records")
    epoch, skip = divmod(seen, per_epoch)
    buffer = data.buffer(mine)

    @as_written
    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(
            mine, [data.seed, tf.cast(epoch, tf.int32)]
        )
        stream = _read(tf.data.Dataset.from_tensor_slices(order), data, report)
        # Else the caller's tf.random.set_seed would mix in, and one of 0 would fail.
        tf.compat.v1.set_random_seed(1)
        stream = stream.shard(parts, part).shuffle(buffer, seed=data.seed + epoch)
        places = tf.data.Dataset.range(pipeline, tf.int64.max, pipelines)
        # Zipped, as a map would call a function for every record.
        return tf.data.Dataset.zip(stream, (tf.data.Dataset.from_tensors(epoch).repeat(), places))

    stream = tf.data.Dataset.range(epoch, tf.int64.max).flat_map(one_epoch).skip(skip)
    view = augmentation if data.augment == "host" and labels != "class" else None
    load = _loader(data, labels, num_classes, view)
    if data.bad_records:
        stream = rows.guarded(stream, load, report).filter(lambda row: row["there"])
    else:
        stream = stream.map(load, num_parallel_calls=AUTOTUNE, deterministic=data.deterministic)
    return _batches(stream, batch, data, labels, report, num_classes, augmentation=view)


def eval_batches(
    data: Data,
    *,
    labels: str = "boxes",
    pipeline: int = 0,
    pipelines: int = 1,
    replicas: int = 1,
    num_classes: int | None = None,
    report: Report | None = None,
    python: bool = True,
    strict: bool = True,
) -> tf.data.Dataset:
    """Every image once; the last batch is filled with rows of id -1, so shapes are static.

    All hosts get the same number of batches: each reads all records and decodes its part of every
    global batch. A record that is left out (`Data.bad_records`) is a row of id -1 too.

    Args:
      strict: more than `Data.max_boxes` objects are an error, since truth would be lost.
      For the others see `train_batches`.
    """
    batch, part = _split(data, replicas), data.batch_size // pipelines
    _check_labels(labels)
    report = _report(data, report, python)
    stream = _read(tf.data.Dataset.from_tensor_slices(data.files()), data, report)

    def my_part(*columns):
        missing = [[0, data.batch_size - tf.shape(columns[0])[0]]]
        return tuple(tf.pad(v, missing)[pipeline * part :][:part] for v in columns)

    stream = stream.batch(data.batch_size).map(my_part).unbatch().map(lambda *source: (source, ()))
    load = _loader(data, labels, num_classes)
    if data.bad_records:
        stream = rows.guarded(stream, load, report)
    else:
        blank = rows.blank(stream.map(load).element_spec)
        stream = stream.map(
            lambda source, luck: tf.cond(
                source[0] == PADDING, lambda: blank, lambda: load(source, luck)
            ),
            num_parallel_calls=AUTOTUNE,
        )
    return _batches(stream, batch, data, labels, report, num_classes, strict=strict)


def batch_spec(data: Data, batch: int, labels: str) -> dict[str, tf.TensorSpec]:
    """What `train_batches` gives a replica of `batch` images (augment='device'), unread."""
    _check_labels(labels)
    side, n, m = data.canvas, data.max_boxes, data.mask_size
    columns = {
        "image": ([side, side, 3], tf.uint8),
        "id": ([], tf.int64),
        "draws": ([4], tf.float32),
    }
    if labels == "class":
        columns["label"] = ([], tf.int32)
    else:
        columns |= {key: ([2], tf.int32) for key in ("image_size", "source_size")}
        columns |= {"boxes": ([n, 4], tf.float32), "classes": ([n], tf.int32)}
        columns |= {"crowd": ([n], tf.bool), "area": ([n], tf.float32)}
    if labels == "masks":
        columns["masks"] = ([n, m, m], tf.uint8)
    return {
        key: tf.TensorSpec([batch, *shape], dtype, key) for key, (shape, dtype) in columns.items()
    }


def _loader(
    data: Data, labels: str, num_classes: int | None, augmentation: Augmentation | None = None
) -> Callable:
    """(file, number, record), (epoch, place) -> a row; without luck in evaluation."""

    @as_written
    def load(source, luck):
        file, number, record = source
        seed = tf.cast([data.seed * 1_000_003 + luck[0], luck[1]], tf.int64) if luck else None
        draws = tf.random.stateless_uniform([4], seed) if luck else tf.zeros([4])
        if labels == "class":
            row = rows.class_row(record, data, seed=seed, num_classes=num_classes)
        else:
            row = rows.object_row(
                record, data, masks=labels == "masks", draws=draws, augmentation=augmentation
            )
        return row | {"draws": draws, "file": file, "number": number}

    return load


def _batches(
    stream: tf.data.Dataset,
    batch: int,
    data: Data,
    labels: str,
    report: Report | None,
    num_classes: int | None,
    *,
    strict: bool = False,
    augmentation: Augmentation | None = None,
) -> tf.data.Dataset:
    """Rows -> batches."""
    if labels == "class":
        stream = stream.batch(batch, drop_remainder=True).map(rows.classes)
        return stream.prefetch(AUTOTUNE)
    finish = functools.partial(
        as_written(rows.objects),
        data=data,
        report=report,
        strict=strict,
        num_classes=num_classes,
        augmentation=augmentation,
    )
    side = augmentation.size if augmentation else data.canvas
    stream = rows.padded(stream, batch, data, side).map(finish, num_parallel_calls=AUTOTUNE)
    return stream.prefetch(AUTOTUNE)


def _read(files: tf.data.Dataset, data: Data, report: Report | None) -> tf.data.Dataset:
    """Records with the file they are of, and their place in it."""

    def records_of(file):
        numbers = tf.data.Dataset.range(tf.int64.max)
        names = tf.data.Dataset.from_tensors(file).repeat()
        stream = tf.data.Dataset.zip(names, numbers, tf.data.TFRecordDataset(file))
        return rows.survivors(stream, file, report) if data.bad_records else stream

    return files.interleave(
        records_of,
        cycle_length=READERS,
        num_parallel_calls=AUTOTUNE,
        deterministic=data.deterministic,
    )


def _split(data: Data, replicas: int) -> int:
    if data.batch_size % replicas:
        raise ValueError(
            f"Data.batch_size={data.batch_size} does not divide by {replicas} replicas"
        )
    return data.batch_size // replicas


def _report(data: Data, report: Report | None, python: bool) -> Report | None:
    if python:
        return report or Report(data.bad_records)
    if data.bad_records:
        raise ValueError(
            f"Data.bad_records={data.bad_records}: hosts of a TPU that is not 'local' cannot say "
            "what they leave out; make records without what scripts/check_records.py lists"
        )
    return None


def _check_labels(labels: str) -> None:
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r} is not one of {LABELS}")
