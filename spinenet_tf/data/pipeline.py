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

and with labels='masks', m being `Data.mask_size`:

    masks        [b, n, m, m] uint8    255 in the object; in its box's frame: `images.crop_masks`

labels='class' has rows of their own:

    image        [b, s, s, 3] uint8    RGB; a random crop in training, the centre in evaluation
    id           [b]          int64    -1 marks a padding row of the last eval batch
    label        [b]          int32    from 1; 0 is the background and padding
    draws        [b, 4]       float32  as above
"""

import dataclasses
import json
import re

import gin
import tensorflow as tf
from absl import logging

from spinenet_tf.data import records, tfds_source
from spinenet_tf.data.images import central_view, crop_masks, decode_image, place, random_view

AUTOTUNE = tf.data.AUTOTUNE
Batch = dict[str, tf.Tensor]
LABELS = ("boxes", "masks", "class")


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from and how they are batched. Used in gin scopes `train` and `eval`.

    Attributes:
      pattern: glob of TFRecord shards, or several separated by commas; gs:// works. Or
        'tfds:<name>:<split>' for classes, such as 'tfds:imagenet2012:train'; see `tfds_source`.
      batch_size: images of one step, over all replicas.
      canvas: side of the square that images are decoded onto; larger ones are reduced to it. With
        classes, the side of the views.
      max_boxes: boxes kept of an image. More are an error in evaluation, and cut in training.
      mask_size: cells of a side of an object's mask; the official code's figure.
      shuffle: encoded images in the shuffle buffer (COCO: about 150 kB each).
      seed: of file order, shuffling and augmentation draws.
      deterministic: the same order in every run, so that a resumed run is exactly the
        uninterrupted one. Costs little unless decode times differ wildly.
      annotations: COCO instances JSON to evaluate against; by default the records' own boxes.
      crop_area: with classes, the least and greatest share of the image in a training view.
      crop_ratio: least and greatest width / height of it.
      flip: with classes, mirrors half of the training views.
      tfds_dir: data_dir of TensorFlow Datasets; '' is its default.
    """

    pattern: str = ""
    batch_size: int = 256
    canvas: int = 640
    max_boxes: int = 100
    mask_size: int = 112
    shuffle: int = 2048
    seed: int = 0
    deterministic: bool = True
    annotations: str = ""
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    tfds_dir: str = ""

    def __post_init__(self):
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"Data.crop_area={self.crop_area} is not 0 < least <= greatest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"Data.crop_ratio={self.crop_ratio} is not 0 < least <= greatest")

    def files(self) -> list[str]:
        """The shards, sorted.

        Raises:
          FileNotFoundError: the pattern is empty or matches nothing.
        """
        if tfds_source.is_tfds(self.pattern):
            return tfds_source.files(self.pattern, self.tfds_dir)
        if not self.pattern:
            raise FileNotFoundError("no data: set train/Data.pattern or eval/Data.pattern (a glob)")
        found = [f for p in self.pattern.split(",") for f in tf.io.gfile.glob(p.strip())]
        if not found:
            raise FileNotFoundError(f"Data.pattern={self.pattern!r} matches no file")
        return sorted(found)

    def sidecars(self) -> dict[str, dict]:
        """What the conversion wrote beside the shards: {path: its JSON}; foreign ones: {}."""
        if tfds_source.is_tfds(self.pattern):
            return tfds_source.sidecars(self.pattern, self.tfds_dir)
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
        if tfds_source.is_tfds(self.pattern):
            labels = stream.map(lambda record: [_class_example(record, self)["label"]])
        else:
            labels = stream.map(records.parse_labels)
        return [int(label) for row in labels.as_numpy_iterator() for label in row]


def train_batches(
    data: Data,
    *,
    labels: str = "boxes",
    step: int = 0,
    pipeline: int = 0,
    pipelines: int = 1,
    replicas: int = 1,
) -> tf.data.Dataset:
    """Endless shuffled batches of one replica, from the one that training step `step` needs.

    Args:
      labels: one of `LABELS`: what a row carries besides its image.
      pipeline: which of `pipelines` hosts this is; each streams its own files.
      replicas: all replicas; a host's batches go to its replicas in turn.

    Raises:
      ValueError: the batch size does not divide by the number of replicas, or other `labels`.
      FileNotFoundError: no shards.
    """
    batch = _split(data, replicas)
    _check_labels(labels)
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
        row = decode_record(record, data, labels=labels, seed=seed)
        return row | {"draws": tf.random.stateless_uniform([4], seed)}

    stream = stream.map(load, num_parallel_calls=AUTOTUNE, deterministic=data.deterministic)
    return stream.batch(batch, drop_remainder=True).prefetch(AUTOTUNE)


def eval_batches(
    data: Data,
    *,
    labels: str = "boxes",
    pipeline: int = 0,
    pipelines: int = 1,
    replicas: int = 1,
) -> tf.data.Dataset:
    """Every image once; the last batch is filled with rows of id -1, so shapes are static.

    All hosts get the same number of batches: each reads all records and decodes its part of every
    global batch.
    """
    batch, part = _split(data, replicas), data.batch_size // pipelines
    _check_labels(labels)
    stream = _read(tf.data.Dataset.from_tensor_slices(data.files()), data)
    stream = stream.batch(data.batch_size).map(
        lambda r: tf.pad(r, [[0, data.batch_size - tf.shape(r)[0]]])[pipeline * part :][:part]
    )
    blank = _blank(data, labels)

    def load(record):
        row = tf.cond(
            record == "",
            lambda: blank,
            lambda: decode_record(record, data, labels=labels, strict=True),
        )
        return row | {"draws": tf.zeros([4])}

    stream = stream.unbatch().map(load, num_parallel_calls=AUTOTUNE)
    return stream.batch(batch, drop_remainder=True).prefetch(AUTOTUNE)


def decode_record(
    record: tf.Tensor,
    data: Data,
    *,
    labels: str = "boxes",
    strict: bool = False,
    seed: tf.Tensor | None = None,
) -> Batch:
    """A serialized tf.Example -> one row of a batch, without its draws.

    Args:
      labels: one of `LABELS`. With 'masks' it is an error to have objects and no masks.
      strict: makes more than `max_boxes` objects an error.
      seed: [2] integer, the luck of the view that 'class' takes of the image; None: the centre.
    """
    if labels == "class":
        return _class_row(record, data, seed)
    example = records.parse_example(record, masks=labels == "masks")
    row = place(decode_image(example["encoded"]), data.canvas)
    count = tf.shape(example["labels"])[0]
    if strict:
        message = tf.strings.format(
            "image {} has {} objects; raise Data.max_boxes", (example["id"], count)
        )
        with tf.control_dependencies([tf.debugging.Assert(count <= data.max_boxes, [message])]):
            count = tf.identity(count)
    size = tf.cast(row["image_size"], tf.float32)
    columns = {
        "boxes": example["boxes"] * tf.tile(size, [2]),
        "classes": example["labels"],
        "crowd": example["crowd"],
        "area": example["area"],
    }
    if labels == "masks":
        columns["masks"] = _masks(example, data)
    columns = {k: _pad_rows(v, count, data.max_boxes) for k, v in columns.items()}
    return row | columns | {"id": example["id"]}


def _class_row(record: tf.Tensor, data: Data, seed: tf.Tensor | None) -> Batch:
    example = _class_example(record, data)
    encoded = example.pop("encoded")
    if seed is None:
        return example | {"image": central_view(encoded, data.canvas)}
    luck = dict(area=data.crop_area, ratio=data.crop_ratio, flip=data.flip, seed=seed)
    return example | {"image": random_view(encoded, data.canvas, **luck)}


def _class_example(record: tf.Tensor, data: Data) -> Batch:
    if tfds_source.is_tfds(data.pattern):
        return tfds_source.parse(record, data.pattern, data.tfds_dir)
    return records.parse_class_example(record)


def _masks(example: Batch, data: Data) -> tf.Tensor:
    masks, boxes = example["masks"][: data.max_boxes], example["boxes"][: data.max_boxes]
    message = tf.strings.format(
        "image {} has objects without masks: convert again, make_coco_records.py with --masks",
        example["id"],
    )
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(masks != ""), [message])]):
        return crop_masks(tf.identity(masks), boxes, data.mask_size)


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


def _blank(data: Data, labels: str) -> Batch:
    """A padding row: no image, id -1."""
    n, m = data.max_boxes, data.mask_size
    row = {
        "image": tf.zeros([data.canvas, data.canvas, 3], tf.uint8),
        "id": tf.constant(-1, tf.int64),
    }
    if labels == "class":
        return row | {"label": tf.constant(0)}
    row |= {
        "image_size": tf.ones([2], tf.int32),
        "source_size": tf.ones([2], tf.int32),
        "boxes": tf.zeros([n, 4]),
        "classes": tf.zeros([n], tf.int32),
        "crowd": tf.zeros([n], tf.bool),
        "area": tf.zeros([n]),
    }
    return row | ({"masks": tf.zeros([n, m, m], tf.uint8)} if labels == "masks" else {})


def _split(data: Data, replicas: int) -> int:
    if data.batch_size % replicas:
        raise ValueError(
            f"Data.batch_size={data.batch_size} does not divide by {replicas} replicas"
        )
    return data.batch_size // replicas


def _check_labels(labels: str) -> None:
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r} is not one of {LABELS}")


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
