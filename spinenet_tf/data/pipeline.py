"""TFRecord shards -> batches. The host reads, decodes and pads; everything else is the device's.

A batch is the only thing that the rest of the package knows of the data. n is `Data.max_boxes`:

    image        [b, s, s, 3] uint8    RGB, top left on a black square of s = `Data.canvas` pixels
    image_size   [b, 2]       int32    height and width of the image on the canvas
    source_size  [b, 2]       int32    height and width of the image in its file
    id           [b]          int64    COCO image id; -1 marks a padding row of the last eval batch
    boxes        [b, n, 4]    float32  ymin, xmin, ymax, xmax, canvas pixels; padded with 0
    classes      [b, n]       int32    0 is padding
    crowd        [b, n]       bool     iscrowd
    area         [b, n]       float32  of the object, source pixels
    draws        [b, 4]       float32  uniform [0, 1): the image's luck for random augmentation
"""

import dataclasses
import json
import re

import gin
import tensorflow as tf
from absl import logging

from spinenet_tf.data import records

AUTOTUNE = tf.data.AUTOTUNE
Batch = dict[str, tf.Tensor]


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from and how they are batched. Used in gin scopes `train` and `eval`.

    Attributes:
      pattern: glob of TFRecord shards, or several separated by commas; gs:// works.
      batch_size: images of one step, over all replicas.
      canvas: side of the square that images are decoded onto; larger ones are reduced to it.
      max_boxes: boxes kept of an image. More are an error in evaluation, and cut in training.
      shuffle: encoded images in the shuffle buffer (COCO: about 150 kB each).
      seed: of file order, shuffling and augmentation draws.
      deterministic: the same order in every run, so that a resumed run is exactly the
        uninterrupted one. Costs little unless decode times differ wildly.
      annotations: COCO instances JSON to evaluate against; by default the records' own boxes.
    """

    pattern: str = ""
    batch_size: int = 256
    canvas: int = 640
    max_boxes: int = 100
    shuffle: int = 2048
    seed: int = 0
    deterministic: bool = True
    annotations: str = ""

    def files(self) -> list[str]:
        """The shards, sorted.

        Raises:
          FileNotFoundError: the pattern is empty or matches nothing.
        """
        if not self.pattern:
            raise FileNotFoundError("no data: set train/Data.pattern or eval/Data.pattern (a glob)")
        found = [f for p in self.pattern.split(",") for f in tf.io.gfile.glob(p.strip())]
        if not found:
            raise FileNotFoundError(f"Data.pattern={self.pattern!r} matches no file")
        return sorted(found)

    def sidecars(self) -> dict[str, dict]:
        """What `make_coco_records.py` wrote beside the shards: {path: its JSON}; foreign: {}."""
        paths = {re.sub(r"-\d{5}-of-\d{5}[^/]*$", ".json", f) for f in self.files()}
        paths = sorted(p for p in paths if p.endswith(".json") and tf.io.gfile.exists(p))
        return {path: json.loads(tf.io.gfile.GFile(path).read()) for path in paths}

    def categories(self) -> list[dict]:
        """[{'id', 'name', 'label'}] of the data set, if its sidecar says; else []."""
        by_label = {c["label"]: c for s in self.sidecars().values() for c in s["categories"]}
        return [by_label[label] for label in sorted(by_label)]

    def num_examples(self) -> int:
        """Images of all shards.

        Raises:
          ValueError: there is none.
        """
        total = sum(_counts(self, self.files()))
        if not total:
            raise ValueError(f"Data.pattern={self.pattern!r}: the shards hold no record")
        return total

    def some_labels(self, images: int = 512) -> list[int]:
        """Labels of the first images, for shards whose sidecar does not list them."""
        stream = tf.data.TFRecordDataset(self.files()).take(images)
        labels = stream.map(lambda record: records.parse_example(record)["labels"])
        return [int(label) for row in labels.as_numpy_iterator() for label in row]


def train_batches(
    data: Data, *, step: int = 0, pipeline: int = 0, pipelines: int = 1, replicas: int = 1
) -> tf.data.Dataset:
    """Endless shuffled batches of one replica, from the one that training step `step` needs.

    Args:
      pipeline: which of `pipelines` hosts this is; each streams its own files.
      replicas: all replicas; a host's batches go to its replicas in turn.

    Raises:
      ValueError: the batch size does not divide by the number of replicas.
      FileNotFoundError: no shards.
    """
    batch = _split(data, replicas)
    files = data.files()
    if len(files) >= pipelines:
        mine, part, parts = files[pipeline::pipelines], 0, 1
    else:  # too few files to go round: all hosts read all, and take every so many'th record
        mine, part, parts = files, pipeline, pipelines
    seen = step * data.batch_size // pipelines
    per_epoch = -(-(sum(_counts(data, mine)) - part) // parts) if seen else 1
    epoch, skip = divmod(seen, per_epoch)

    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(
            mine, [data.seed, tf.cast(epoch, tf.int32)]
        )
        stream = _read(tf.data.Dataset.from_tensor_slices(order), data).shard(parts, part)
        stream = stream.shuffle(data.shuffle, seed=data.seed + epoch)
        return stream.enumerate().map(lambda i, record: (epoch, i * pipelines + pipeline, record))

    stream = tf.data.Dataset.range(epoch, tf.int64.max).flat_map(one_epoch).skip(skip)

    def load(epoch, index, record):
        seed = tf.cast([data.seed * 1_000_003 + epoch, index], tf.int64)
        return decode_record(record, data) | {"draws": tf.random.stateless_uniform([4], seed)}

    stream = stream.map(load, num_parallel_calls=AUTOTUNE, deterministic=data.deterministic)
    return stream.batch(batch, drop_remainder=True).prefetch(AUTOTUNE)


def eval_batches(
    data: Data, *, pipeline: int = 0, pipelines: int = 1, replicas: int = 1
) -> tf.data.Dataset:
    """Every image once; the last batch is filled with rows of id -1, so shapes are static.

    All hosts get the same number of batches: each reads all records and decodes its part of every
    global batch.
    """
    batch, part = _split(data, replicas), data.batch_size // pipelines
    stream = _read(tf.data.Dataset.from_tensor_slices(data.files()), data)
    stream = stream.batch(data.batch_size).map(
        lambda r: tf.pad(r, [[0, data.batch_size - tf.shape(r)[0]]])[pipeline * part :][:part]
    )
    blank = _blank(data)

    def load(record):
        row = tf.cond(record == "", lambda: blank, lambda: decode_record(record, data, strict=True))
        return row | {"draws": tf.zeros([4])}

    stream = stream.unbatch().map(load, num_parallel_calls=AUTOTUNE)
    return stream.batch(batch, drop_remainder=True).prefetch(AUTOTUNE)


def decode_record(record: tf.Tensor, data: Data, *, strict: bool = False) -> Batch:
    """A serialized tf.Example -> one row of a batch, without its draws.

    `strict` makes more than `max_boxes` objects an error.
    """
    example = records.parse_example(record)
    row = place(decode_image(example["encoded"]), data.canvas)
    count = tf.shape(example["labels"])[0]
    if strict:
        message = tf.strings.format(
            "image {} has {} objects; raise Data.max_boxes", (example["id"], count)
        )
        with tf.control_dependencies([tf.debugging.Assert(count <= data.max_boxes, [message])]):
            count = tf.identity(count)
    size = tf.cast(row["image_size"], tf.float32)
    labels = {
        "boxes": example["boxes"] * tf.tile(size, [2]),
        "classes": example["labels"],
        "crowd": example["crowd"],
        "area": example["area"],
    }
    labels = {k: _pad_rows(v, count, data.max_boxes) for k, v in labels.items()}
    return row | labels | {"id": example["id"]}


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """Encoded JPEG, PNG, GIF (first frame) or BMP -> [h, w, 3] uint8.

    JPEG goes through the accurate DCT, so that training and serving see the same pixels.
    """
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )


def place(image: tf.Tensor, canvas: int) -> Batch:
    """Puts [h, w, 3] uint8 on a square canvas: image, image_size and source_size of a row."""
    source_size = tf.shape(image)[:2]
    ratio = canvas / tf.reduce_max(source_size)
    small = tf.cast(tf.round(tf.cast(source_size, tf.float64) * ratio), tf.int32)
    size = tf.where(ratio < 1.0, tf.maximum(small, 1), source_size)
    image = tf.cond(ratio < 1.0, lambda: _reduce(image, size), lambda: image)
    padding = [[0, canvas - size[0]], [0, canvas - size[1]], [0, 0]]
    image = tf.ensure_shape(tf.pad(image, padding), [canvas, canvas, 3])
    return {"image": image, "image_size": size, "source_size": source_size}


def _reduce(image: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    return tf.saturate_cast(tf.round(tf.image.resize(image, size, antialias=True)), tf.uint8)


def _read(files: tf.data.Dataset, data: Data) -> tf.data.Dataset:
    return files.interleave(
        tf.data.TFRecordDataset,
        cycle_length=16,
        num_parallel_calls=AUTOTUNE,
        deterministic=data.deterministic,
    )


def _pad_rows(values: tf.Tensor, count: tf.Tensor, rows: int) -> tf.Tensor:
    values = values[:rows]
    padding = [[0, rows - tf.minimum(count, rows)]] + [[0, 0]] * (values.shape.rank - 1)
    return tf.ensure_shape(tf.pad(values, padding), [rows, *values.shape[1:]])


def _blank(data: Data) -> Batch:
    """A padding row: no image, id -1."""
    n = data.max_boxes
    return {
        "image": tf.zeros([data.canvas, data.canvas, 3], tf.uint8),
        "image_size": tf.ones([2], tf.int32),
        "source_size": tf.ones([2], tf.int32),
        "boxes": tf.zeros([n, 4]),
        "classes": tf.zeros([n], tf.int32),
        "crowd": tf.zeros([n], tf.bool),
        "area": tf.zeros([n]),
        "id": tf.constant(-1, tf.int64),
    }


def _split(data: Data, replicas: int) -> int:
    if data.batch_size % replicas:
        raise ValueError(
            f"Data.batch_size={data.batch_size} does not divide by {replicas} replicas"
        )
    return data.batch_size // replicas


def _counts(data: Data, files: list[str]) -> list[int]:
    """Records per shard: from the sidecars, or by reading the shards that none covers."""
    known = {
        f"{path.rpartition('/')[0]}/{name}": number
        for path, sidecar in data.sidecars().items()
        for name, number in sidecar["shards"].items()
    }
    counts = [known.get(f if "/" in f else f"/{f}") for f in files]
    return [_count_records(f) if n is None else n for f, n in zip(files, counts, strict=True)]


def _count_records(path: str) -> int:
    logging.warning("counting the records of %s, which has no sidecar", path)
    return int(tf.data.TFRecordDataset(path).reduce(tf.constant(0, tf.int64), lambda n, _: n + 1))
