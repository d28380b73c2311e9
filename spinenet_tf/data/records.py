"""The two tf.Example schemas, of objects and of classes, written and read.

The keys are those of `create_coco_tf_record.py` of tensorflow/tpu and Model Garden, so their
shards are read as they are and ours are read by their tools:

    image/encoded, image/format, image/filename, image/source_id, image/key/sha256   bytes
    image/height, image/width                                                        int64
    image/object/bbox/{xmin,xmax,ymin,ymax}                                          float, 0..1
    image/object/class/text, image/object/mask (PNG of the whole image, 0 or 1)      bytes
    image/object/class/label (0 is background), image/object/is_crowd                int64
    image/object/area (pixels)                                                       float

and, for training on masks without decoding PNGs,

    image/object/box_masks (zlib of n x m x m bytes: 255 in the object, each mask    bytes
    in the frame of its box, see `images.crop_masks`)
    image/object/box_masks/size (m)                                                  int64

Classification records have those of `imagenet_to_gcs.py` of tensorflow/tpu, which Model Garden
reads too: the first two lines and

    image/class/label (from 1; 0 is background)                                      int64
    image/class/text                                                                 bytes
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

PNG_SIGNATURE = b"\x89PNG"
HASH_BUCKETS = 2**62  # so many that the ids of a data set do not collide
BOX_MASKS, BOX_MASK_SIZE = "image/object/box_masks", "image/object/box_masks/size"
SIDES = ("ymin", "xmin", "ymax", "xmax")


@dataclass(frozen=True)
class Instance:
    """One object of an image."""

    box: tuple[float, float, float, float]  # xmin, ymin, width, height in pixels
    label: int
    name: str
    crowd: bool
    area: float
    mask_png: bytes | None = None  # one channel, as large as the image, values 0 and 1
    box_mask: np.ndarray | None = None  # [m, m] uint8, the mask in the frame of the box


def _ints(values: Iterable[int]) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def _floats(values: Iterable[float]) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


def _bytes(values: Iterable[bytes]) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))


def _image_features(
    encoded: bytes, height: int, width: int, filename: str, image_id: int | str
) -> dict[str, tf.train.Feature]:
    return {
        "image/height": _ints([height]),
        "image/width": _ints([width]),
        "image/filename": _bytes([filename.encode()]),
        "image/source_id": _bytes([str(image_id).encode()]),
        "image/key/sha256": _bytes([hashlib.sha256(encoded).hexdigest().encode()]),
        "image/encoded": _bytes([encoded]),
        "image/format": _bytes([b"png" if encoded.startswith(PNG_SIGNATURE) else b"jpeg"]),
    }


def _object_features(
    instances: Sequence[Instance], height: int, width: int
) -> dict[str, tf.train.Feature]:
    boxes = [instance.box for instance in instances]
    features = {
        "image/object/bbox/xmin": _floats(x / width for x, _, _, _ in boxes),
        "image/object/bbox/xmax": _floats((x + w) / width for x, _, w, _ in boxes),
        "image/object/bbox/ymin": _floats(y / height for _, y, _, _ in boxes),
        "image/object/bbox/ymax": _floats((y + h) / height for _, y, _, h in boxes),
        "image/object/class/text": _bytes(i.name.encode() for i in instances),
        "image/object/class/label": _ints(i.label for i in instances),
        "image/object/is_crowd": _ints(int(i.crowd) for i in instances),
        "image/object/area": _floats(i.area for i in instances),
    }
    if pngs := _all_or_none([i.mask_png for i in instances]):
        features["image/object/mask"] = _bytes(pngs)
    if cells := _all_or_none([i.box_mask for i in instances]):
        features[BOX_MASKS] = _bytes([zlib.compress(np.stack(cells).tobytes(), 1)])
        features[BOX_MASK_SIZE] = _ints([len(cells[0])])
    return features


def _all_or_none(masks: list) -> list:
    there = [mask for mask in masks if mask is not None]
    if there and len(there) != len(masks):
        raise ValueError(f"{len(there)} masks for {len(masks)} objects: all or none need one")
    return there


def encode_example(
    encoded: bytes,
    height: int,
    width: int,
    filename: str,
    image_id: int | str,
    instances: Sequence[Instance],
) -> bytes:
    """Serializes one image (JPEG or PNG bytes, kept as they are) and its objects."""
    features = _image_features(encoded, height, width, filename, image_id)
    return _serialize(features | _object_features(instances, height, width))


def encode_class_example(
    encoded: bytes,
    height: int,
    width: int,
    filename: str,
    image_id: int | str,
    label: int,
    name: str,
) -> bytes:
    """Serializes one image (JPEG or PNG bytes, kept as they are) and its class.

    Raises:
      ValueError: the label is not from 1, since 0 is the background.
    """
    if label < 1:
        raise ValueError(f"label={label} of {filename}: classes are numbered from 1")
    features = _image_features(encoded, height, width, filename, image_id)
    of_class = {"image/class/label": _ints([label]), "image/class/text": _bytes([name.encode()])}
    return _serialize(features | of_class)


def _serialize(features: dict[str, tf.train.Feature]) -> bytes:
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)  # a map has no order of its own


IMAGE_SCHEMA = {
    "image/encoded": tf.io.FixedLenFeature([], tf.string),
    "image/height": tf.io.FixedLenFeature([], tf.int64, 0),
    "image/width": tf.io.FixedLenFeature([], tf.int64, 0),
    "image/source_id": tf.io.FixedLenFeature([], tf.string, ""),
    "image/filename": tf.io.FixedLenFeature([], tf.string, ""),
}


def _listed(dtype: tf.DType) -> tf.io.FixedLenSequenceFeature:
    return tf.io.FixedLenSequenceFeature([], dtype, allow_missing=True)


def _schema(masks: bool) -> dict:
    schema = IMAGE_SCHEMA | {
        "image/object/class/label": _listed(tf.int64),
        "image/object/is_crowd": _listed(tf.int64),
        "image/object/area": _listed(tf.float32),
    }
    schema |= {f"image/object/bbox/{side}": _listed(tf.float32) for side in SIDES}
    if masks:
        schema["image/object/mask"] = _listed(tf.string)
        schema[BOX_MASKS] = tf.io.FixedLenFeature([], tf.string, "")
        schema[BOX_MASK_SIZE] = tf.io.FixedLenFeature([], tf.int64, 0)
    return schema


def numeric_id(source_id: tf.Tensor, filename: tf.Tensor) -> tf.Tensor:
    """int64: the source id if decimal, otherwise a stable positive hash of it or of the name."""
    decimal = tf.strings.regex_full_match(source_id, "[0-9]{1,18}")  # what an int64 can hold
    number = tf.strings.to_number(tf.where(decimal, source_id, "0"), tf.int64)
    text = tf.where(source_id == "", filename, source_id)
    return tf.where(decimal, number, 1 + tf.strings.to_hash_bucket_fast(text, HASH_BUCKETS))


def _or_default(values: tf.Tensor, default: tf.Tensor) -> tf.Tensor:
    # A missing feature is read as an empty list, so `default` fills what `values` lacks.
    return tf.concat([values, default[tf.size(values) :]], 0)


def parse(serialized: tf.Tensor, *, masks: bool = False) -> dict[str, tf.Tensor]:
    """The features of one serialized example that are needed, as they are; {key: value or list}."""
    return tf.io.parse_single_example(serialized, _schema(masks))


def boxes_of(parsed: dict[str, tf.Tensor]) -> tf.Tensor:
    """[..., n, 4] float32, yxyx, of parsed lists or of batches of them."""
    return tf.stack([parsed[f"image/object/bbox/{side}"] for side in SIDES], -1)


def parse_example(serialized: tf.Tensor, *, masks: bool = False) -> dict[str, tf.Tensor]:
    """Reads one serialized example, eagerly or inside `tf.data`.

    Returns, for n objects:
      encoded: [] string, the JPEG or PNG bytes.
      height, width: [] int32, 0 in records that do not say.
      id: [] int64, the source id if decimal, otherwise a stable positive hash of it (of the file
        name if there is none).
      boxes: [n, 4] float32, yxyx, 0..1.
      labels: [n] int32.
      crowd: [n] bool, False in records that do not say.
      area: [n] float32 in pixels, the box's in records that do not say.
      masks: [n] string with `masks=True`, PNG bytes, "" in records that have none.
    """
    parsed = parse(serialized, masks=masks)
    height, width = (tf.cast(parsed[f"image/{side}"], tf.int32) for side in ("height", "width"))
    boxes = boxes_of(parsed)
    sides = (boxes[:, 2:] - boxes[:, :2]) * tf.cast(tf.stack([height, width]), tf.float32)
    labels = tf.cast(parsed["image/object/class/label"], tf.int32)
    crowd = _or_default(tf.cast(parsed["image/object/is_crowd"], tf.int32), tf.zeros_like(labels))
    example = {
        "encoded": parsed["image/encoded"],
        "height": height,
        "width": width,
        "id": numeric_id(parsed["image/source_id"], parsed["image/filename"]),
        "boxes": boxes,
        "labels": labels,
        "crowd": crowd > 0,
        "area": _or_default(parsed["image/object/area"], tf.reduce_prod(sides, -1)),
    }
    if masks:
        empty = tf.fill(tf.shape(labels), "")
        example["masks"] = _or_default(parsed["image/object/mask"], empty)
    return example


def parse_class_example(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    """Reads one serialized classification example, eagerly or inside `tf.data`.

    Returns:
      encoded: [] string, the JPEG or PNG bytes.
      id: [] int64, as in `parse_example`.
      label: [] int32.

    Raises:
      tf.errors.InvalidArgumentError: it has no `image/class/label`, or several.
    """
    label = {"image/class/label": tf.io.FixedLenFeature([], tf.int64)}
    parsed = tf.io.parse_single_example(serialized, IMAGE_SCHEMA | label)
    return {
        "encoded": parsed["image/encoded"],
        "id": numeric_id(parsed["image/source_id"], parsed["image/filename"]),
        "label": tf.cast(parsed["image/class/label"], tf.int32),
    }


def parse_labels(serialized: tf.Tensor) -> tf.Tensor:
    """[n] int32: the labels of a record of either kind."""
    keys = ("image/object/class/label", "image/class/label")
    parsed = tf.io.parse_single_example(serialized, {key: _listed(tf.int64) for key in keys})
    return tf.cast(tf.concat([parsed[key] for key in keys], 0), tf.int32)


def parse_sides(serialized: tf.Tensor) -> tf.Tensor:
    """[2] int64: height and width as a record tells them; [0] if it does not."""
    keys = ("image/height", "image/width")
    parsed = tf.io.parse_single_example(serialized, {key: _listed(tf.int64) for key in keys})
    return tf.concat([parsed[key] for key in keys], 0)
