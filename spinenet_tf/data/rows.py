"""One record -> one row, and rows -> a batch; see `data/pipeline.py` for what a batch holds.

A row has what must be done image by image: pixels, and lists as they are in the record. All else
is done for a whole batch at once, which is many times cheaper.
"""

import os
from collections.abc import Callable

import tensorflow as tf

from spinenet_tf.data import images, records, tfds_source
from spinenet_tf.data.report import PADDING, Report, find_bad_objects
from spinenet_tf.data.source import Data
from spinenet_tf.ops import augment

AUTOTUNE = tf.data.AUTOTUNE
Row = dict[str, tf.Tensor]
CORNERS = [f"image/object/bbox/{side}" for side in records.SIDES]
OTHERS = ["image/object/class/label", "image/object/is_crowd", "image/object/area"]
LISTS = CORNERS + OTHERS  # one value an object


def object_row(
    record: tf.Tensor,
    data: Data,
    *,
    masks: bool,
    draws: tf.Tensor,
    augmentation: augment.Augmentation | None = None,
) -> Row:
    """Decodes one record with objects; with `augmentation` into the view that `draws` ask for."""
    parsed = records.parse(record, masks=masks)
    image, source_size = images.decode_within(parsed["image/encoded"], data.canvas)
    size = tf.shape(image)[:2]
    if augmentation:
        view = augment.random_view(size[None], augmentation, draws[None])
        image = augment.sample_view(image, size[None], view, augmentation.size)
    row = {key: parsed[key][: data.max_boxes] for key in LISTS}
    row |= {key: parsed[key] for key in ("image/source_id", "image/filename")}
    if masks:
        row["masks"] = box_masks(parsed, data)
    return row | {
        "image": image,
        "image_size": size,
        "source_size": source_size,
        "lengths": tf.stack([tf.size(parsed[key]) for key in LISTS]),
        "there": tf.constant(True),
    }


def box_masks(parsed: Row, data: Data) -> tf.Tensor:
    """[n, m, m] uint8: the masks as the record has them in the frames of the boxes, if they have
    `Data.mask_size` cells, and otherwise cut out of its PNGs."""
    size, most = data.mask_size, data.max_boxes

    def ready():
        cells = tf.io.decode_compressed(parsed[records.BOX_MASKS], "ZLIB")
        cells = tf.io.decode_raw(cells, tf.uint8)
        return tf.reshape(cells, [-1, size, size])[:most]

    def from_pngs():
        masks, boxes = (v[:most] for v in (parsed["image/object/mask"], records.boxes_of(parsed)))
        there = (tf.size(masks) == tf.size(parsed[LISTS[0]][:most])) & tf.reduce_all(masks != "")
        stored = parsed[records.BOX_MASK_SIZE]
        message = tf.strings.format(
            "image {} has objects without masks (box masks of {} cells; Data.mask_size={}): "
            "convert again, make_coco_records.py with --masks",
            (_id(parsed), stored, size),
        )
        with tf.control_dependencies([tf.debugging.Assert(there, [message])]):
            return images.crop_masks(tf.identity(masks), tf.clip_by_value(boxes, 0.0, 1.0), size)

    return tf.cond(parsed[records.BOX_MASK_SIZE] == size, ready, from_pngs)


def class_row(
    record: tf.Tensor, data: Data, *, seed: tf.Tensor | None, num_classes: int | None
) -> Row:
    """Decodes one classified image: the view that [2] integer `seed` draws, or the centre."""
    if tfds_source.is_tfds(data.pattern):
        example = tfds_source.parse(record, data.pattern, data.tfds_dir)
    else:
        example = records.parse_class_example(record)
    encoded, label = example["encoded"], example["label"]
    most = (num_classes or label.dtype.max) - 1
    good = tf.debugging.Assert(
        (label >= 1) & (label <= most),
        [tf.strings.format("label {} is not in 1..{}", (label, most))],
    )
    with tf.control_dependencies([good]):
        encoded = tf.identity(encoded)
    if seed is None:
        image = images.central_view(encoded, data.canvas)
    else:
        luck = dict(area=data.crop_area, ratio=data.crop_ratio, flip=data.flip, seed=seed)
        image = images.random_view(encoded, data.canvas, **luck)
    return {"image": image, "id": example["id"], "label": label, "there": tf.constant(True)}


def blank(spec: dict[str, tf.TensorSpec]) -> Row:
    """A row like `spec` of an image that is not there: empty lists, zeros, one black pixel."""
    row = {k: tf.zeros([n or 0 for n in s.shape], s.dtype) for k, s in spec.items()}
    if spec["image"].shape[0] is None:
        row["image"] = tf.zeros([1, 1, 3], tf.uint8)
        row |= {key: tf.ones([2], tf.int32) for key in ("image_size", "source_size")}
    return row


def guarded(stream: tf.data.Dataset, load: Callable, report: Report) -> tf.data.Dataset:
    """`stream.map(load)`, but what fails is reported and becomes a blank row.

    Costs about a fifth of the throughput, since every element is a data set of its own.
    """
    nothing = blank(stream.map(load).element_spec) | {"record": tf.constant("")}
    any_luck = tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), stream.element_spec[1])

    def attempt(source, luck):
        file, number, record = source
        instead = nothing | {"file": file, "number": number, "record": record}
        one = tf.data.Dataset.from_tensors((source, luck))
        one = one.map(lambda *element: load(*element) | {"record": ""}).ignore_errors()
        return one.concatenate(tf.data.Dataset.from_tensors(instead)).take(1)

    def tell(file, number, record):
        try:
            load((file, number, record), any_luck)
            error = ValueError("could not be read with its own random view")
        except tf.errors.OpError as found:
            error = found
        report.record(file, number, error)

    def note(row):
        failed = ~row["there"] & (row["file"] != PADDING)
        about = (row["file"], row["number"], row.pop("record"))
        told = if_any(failed, lambda: tf.py_function(tell, about, []))
        with tf.control_dependencies([told]):
            return row | {"there": tf.identity(row["there"])}

    stream = stream.interleave(
        attempt, cycle_length=os.cpu_count(), num_parallel_calls=AUTOTUNE, deterministic=True
    )
    return stream.map(note)


def survivors(stream: tf.data.Dataset, file: tf.Tensor, report: Report) -> tf.data.Dataset:
    """(file, number, record) of one file up to a wrong checksum, which ends it and is reported."""
    end = tf.data.Dataset.from_tensors((file, tf.constant(-1, tf.int64), tf.constant("")))

    def count(seen, source):
        file, number, record = source
        tell = lambda: tf.py_function(report.end, (file, seen), [])  # noqa: E731
        with tf.control_dependencies([if_any(number < 0, tell)]):
            return seen + 1, (file, number, tf.identity(record))

    stream = stream.ignore_errors().concatenate(end).scan(tf.constant(0, tf.int64), count)
    return stream.filter(lambda file, number, record: number >= 0)


def padded(stream: tf.data.Dataset, batch: int, data: Data, side: int) -> tf.data.Dataset:
    """Batches of rows of `object_row`, padded to static shapes."""
    shapes = {"image": [side, side, 3], "masks": [data.max_boxes, data.mask_size, data.mask_size]}
    shapes |= dict.fromkeys(LISTS, [data.max_boxes])
    spec = stream.element_spec
    shapes = {key: shapes.get(key, spec[key].shape) for key in spec}
    return stream.padded_batch(batch, shapes, drop_remainder=True)


def objects(
    rows: Row,
    data: Data,
    *,
    report: Report | None,
    strict: bool,
    num_classes: int | None,
    augmentation: augment.Augmentation | None = None,
) -> Row:
    """Padded rows of `object_row` -> a batch: bad objects are reported and become padding.

    Args:
      report: None where this process cannot be called: what is bad is then an error unnamed.
      strict: more than `Data.max_boxes` objects are an error.
      augmentation: as in `object_row`: boxes, masks and sizes are then those of the view.
    """
    ids = tf.where(rows["there"], _id(rows), -1)
    boxes = records.boxes_of(rows)  # [b, n, 4]
    labels, crowd, area = (rows[key] for key in OTHERS)
    labels, lengths = tf.cast(labels, tf.int32), rows["lengths"]
    # Whether it is a crowd, and its area, need not be said; all else must be.
    count, others = lengths[:, :1], lengths[:, len(CORNERS) + 1 :]
    equal = tf.reduce_all(lengths[:, : len(CORNERS) + 1] == count, -1)
    equal &= tf.reduce_all((others == count) | (others == 0), -1)
    there = tf.range(data.max_boxes) < tf.reduce_max(lengths, -1, keepdims=True)
    reasons = tf.where(there, find_bad_objects(boxes, labels, equal, num_classes), 0)
    where = (rows["file"], rows["number"], ids)
    bad, cut = reasons > 0, count > data.max_boxes
    if report:
        told = [
            _tell(report.objects, bad, (*where, reasons, boxes, labels)),
            _tell(report.cuts, cut, (*where, count, data.max_boxes, strict)),
        ]
    else:
        told = _assert_good(tf.reduce_any(bad, -1), cut[:, 0], strict, where)
    with tf.control_dependencies(told):
        good = there & (reasons == 0)
    boxes = tf.where(good[..., None], tf.clip_by_value(boxes, 0.0, 1.0), 0.0)
    sides = (boxes[..., 2:] - boxes[..., :2]) * tf.cast(rows["source_size"], tf.float32)[:, None]
    area = tf.where(lengths[:, -1:] > 0, area, tf.reduce_prod(sides, -1))
    size = tf.cast(rows["image_size"], tf.float32)
    batch = {key: rows[key] for key in ("image", "image_size", "source_size", "draws")} | {
        "id": ids,
        "boxes": boxes * tf.tile(size, [1, 2])[:, None],
        "classes": tf.where(good, labels, 0),
        "crowd": good & (crowd > 0),
        "area": tf.where(good, area, 0.0),
    }
    if "masks" in rows:
        batch["masks"] = rows["masks"] * tf.cast(good, tf.uint8)[..., None, None]
    return _viewed(batch, augmentation) if augmentation else batch


def _viewed(batch: Row, augmentation: augment.Augmentation) -> Row:
    """The labels of images that `object_row` has augmented."""
    view = augment.random_view(batch["image_size"], augmentation, batch["draws"])
    boxes = augment.view_boxes(batch["boxes"], batch["image_size"], view)
    boxes = tf.where((batch["classes"] > 0)[..., None], boxes, 0.0)
    size = tf.cast(augment.extent(view, augmentation.size), tf.int32)
    viewed = batch | {"boxes": boxes, "image_size": size, "viewed": tf.ones_like(view.flip)}
    if "masks" in batch:
        flip = view.flip[:, None, None, None]
        viewed["masks"] = tf.where(flip, batch["masks"][..., ::-1], batch["masks"])
    return viewed


def classes(rows: Row) -> Row:
    """Rows of `class_row` -> a batch."""
    ids = tf.where(rows["there"], rows["id"], -1)
    return {"id": ids} | {key: rows[key] for key in ("image", "label", "draws")}


def _id(parsed: Row) -> tf.Tensor:
    return records.numeric_id(parsed["image/source_id"], parsed["image/filename"])


def _tell(note: Callable, bad: tf.Tensor, about: tuple) -> tf.Operation:
    return if_any(bad, lambda: tf.py_function(note, about, []))


def _assert_good(bad: tf.Tensor, cut: tf.Tensor, strict: bool, where: tuple) -> list[tf.Operation]:
    """What `_tell` is without Python: an error, or else a line on the reader's stderr."""

    def found(what: str, wrong: tf.Tensor) -> list:
        return [what, *(tf.boolean_mask(value, wrong) for value in where)]

    few = found("more than Data.max_boxes objects, of which the last are left out:", cut)
    return [
        tf.debugging.Assert(~tf.reduce_any(bad), found("bad objects:", bad)),
        tf.debugging.Assert(~tf.reduce_any(cut), few)
        if strict
        else if_any(cut, lambda: tf.print(*few)),
    ]


def if_any(bad: tf.Tensor, then: Callable) -> tf.Operation:
    """Runs the operation that `then` makes where any element of `bad` holds."""

    def run():
        with tf.control_dependencies([then()]):
            return tf.constant(True)

    return tf.cond(tf.reduce_any(bad), run, lambda: tf.constant(False)).op
