"""The one tf.Example schema, written and read, and the sharded files of such records.

The keys are those of tensorflow/tpu's and Model Garden's `create_coco_tf_record.py`, so their shards
are read as they are and ours are read by their tools:

    image/encoded, image/format, image/filename, image/source_id, image/key/sha256   bytes
    image/height, image/width                                                        int64
    image/object/bbox/{xmin,xmax,ymin,ymax}                                          float, 0..1
    image/object/class/text, image/object/mask (PNG of the whole image, 0 or 1)      bytes
    image/object/class/label (0 is background), image/object/is_crowd                int64
    image/object/area (pixels)                                                       float

`write_shards` writes `<prefix>-00000-of-00008.tfrecord` and so on in parallel processes, and
remembers finished shards in `<prefix>.state.json`, so that a restart goes on where it was stopped.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import tensorflow as tf

Job = TypeVar("Job")
PNG_SIGNATURE = b"\x89PNG"
HASH_BUCKETS = 2**62  # so many that the ids of a data set do not collide
IMAGES_PER_PROCESS = 64  # fewer are not worth the start of another process
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
    masks = [i.mask_png for i in instances if i.mask_png is not None]
    if masks and len(masks) != len(instances):
        raise ValueError(f"{len(masks)} masks for {len(instances)} objects: all or none need one")
    if masks:
        features["image/object/mask"] = _bytes(masks)
    return features


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
    features |= _object_features(instances, height, width)
    example = tf.train.Example(features=tf.train.Features(feature=features))
    # Maps have no order of their own: without this, equal examples may differ in their bytes.
    return example.SerializeToString(deterministic=True)


def _schema(masks: bool) -> dict:
    def listed(dtype: tf.DType) -> tf.io.FixedLenSequenceFeature:
        return tf.io.FixedLenSequenceFeature([], dtype, allow_missing=True)

    schema = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/height": tf.io.FixedLenFeature([], tf.int64),
        "image/width": tf.io.FixedLenFeature([], tf.int64),
        "image/source_id": tf.io.FixedLenFeature([], tf.string, ""),
        "image/filename": tf.io.FixedLenFeature([], tf.string, ""),
        "image/object/class/label": listed(tf.int64),
        "image/object/is_crowd": listed(tf.int64),
        "image/object/area": listed(tf.float32),
    }
    schema |= {f"image/object/bbox/{side}": listed(tf.float32) for side in SIDES}
    if masks:
        schema["image/object/mask"] = listed(tf.string)
    return schema


def _numeric_id(source_id: tf.Tensor, filename: tf.Tensor) -> tf.Tensor:
    decimal = tf.strings.regex_full_match(source_id, "[0-9]{1,18}")  # what an int64 can hold
    number = tf.strings.to_number(tf.where(decimal, source_id, "0"), tf.int64)
    text = tf.where(source_id == "", filename, source_id)
    return tf.where(decimal, number, 1 + tf.strings.to_hash_bucket_fast(text, HASH_BUCKETS))


def _or_default(values: tf.Tensor, default: tf.Tensor) -> tf.Tensor:
    # A missing feature is read as an empty list, so `default` fills what `values` lacks.
    return tf.concat([values, default[tf.size(values) :]], 0)


def parse_example(serialized: tf.Tensor, *, masks: bool = False) -> dict[str, tf.Tensor]:
    """Reads one serialized example, eagerly or inside `tf.data`.

    Returns, for n objects:
      encoded: [] string, the JPEG or PNG bytes.
      height, width: [] int32.
      id: [] int64, the source id when it is decimal, otherwise a stable positive hash of it (of the
        file name when there is no source id).
      boxes: [n, 4] float32, yxyx, 0..1.
      labels: [n] int32.
      crowd: [n] bool, False in records that do not say.
      area: [n] float32 in pixels, the box's in records that do not say.
      masks: [n] string with `masks=True`, PNG bytes, "" in records that have none.
    """
    parsed = tf.io.parse_single_example(serialized, _schema(masks))
    height, width = (tf.cast(parsed[f"image/{side}"], tf.int32) for side in ("height", "width"))
    boxes = tf.stack([parsed[f"image/object/bbox/{side}"] for side in SIDES], -1)
    sides = (boxes[:, 2:] - boxes[:, :2]) * tf.cast(tf.stack([height, width]), tf.float32)
    labels = tf.cast(parsed["image/object/class/label"], tf.int32)
    crowd = _or_default(tf.cast(parsed["image/object/is_crowd"], tf.int32), tf.zeros_like(labels))
    example = {
        "encoded": parsed["image/encoded"],
        "height": height,
        "width": width,
        "id": _numeric_id(parsed["image/source_id"], parsed["image/filename"]),
        "boxes": boxes,
        "labels": labels,
        "crowd": crowd > 0,
        "area": _or_default(parsed["image/object/area"], tf.reduce_prod(sides, -1)),
    }
    if masks:
        none = tf.fill(tf.shape(labels), "")
        example["masks"] = _or_default(parsed["image/object/mask"], none)
    return example


class Converted(NamedTuple):
    """What became of one image."""

    example: bytes | None  # None if the image was rejected
    counts: Counter
    rejected: list[dict]  # this image or annotations of it, with the reasons


class Progress:
    """One line on stderr: images done of all, images a second, time left."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 5.0) and self.done < self.total:
            return
        self.shown = now
        rate = self.done / max(now - self.start, 1e-6)
        left = int((self.total - self.done) / rate)
        line = f"{self.done}/{self.total} images, {rate:.1f} images/s, {left // 60}:{left % 60:02} left"
        end = "\r" if self.live and self.done < self.total else "\n"
        print(line.ljust(60), end=end, file=sys.stderr, flush=True)


def write_json(path: str, value: dict) -> None:
    """Writes the whole file or nothing."""
    with tf.io.gfile.GFile(f"{path}.partial", "w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False))
    tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)


@contextmanager
def _in_parallel(
    convert: Callable[[Job], Converted], jobs: list[Job], workers: int | None
) -> Iterator[Iterator[Converted]]:
    workers = workers or min(os.cpu_count() or 1, math.ceil(len(jobs) / IMAGES_PER_PROCESS))
    if workers <= 1:
        yield map(convert, jobs)
        return
    # Spawned, because a fork would copy locks that TensorFlow's threads hold.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool.map(convert, jobs, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_or_resume(prefix: str, fingerprint: str, overwrite: bool) -> dict:
    """The state: finished shards of the same inputs, otherwise none."""
    state_path, shards = f"{prefix}.state.json", f"{prefix}-?????-of-?????.tfrecord"
    old = tf.io.gfile.glob([shards, state_path])
    if overwrite:
        for path in old + tf.io.gfile.glob([f"{shards}.partial", f"{prefix}.json"]):
            tf.io.gfile.remove(path)
    elif state_path in old:
        with tf.io.gfile.GFile(state_path) as file:
            state = json.load(file)
        if state["fingerprint"] == fingerprint:
            return state
    if old and not overwrite:
        raise FileExistsError(
            f"{prefix}-* was made from other inputs or options: choose another output, or replace "
            "it with --overwrite"
        )
    tf.io.gfile.makedirs(os.path.dirname(prefix) or ".")
    return {"fingerprint": fingerprint, "shards": {}}


def _is_finished(path: str, state: dict) -> bool:
    shard = state["shards"].get(os.path.basename(path))
    complete = shard is not None and not shard["counts"].get("rejected_images")
    return complete and tf.io.gfile.exists(path)


def _write_shard(path: str, results: Iterator[Converted], progress: Progress) -> dict:
    counts, rejected = Counter(examples=0), []
    with tf.io.TFRecordWriter(f"{path}.partial") as writer:
        for result in results:
            if result.example is not None:
                writer.write(result.example)
            counts += result.counts
            rejected += result.rejected
            progress.step()
    tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)
    return {"counts": counts, "rejected": rejected}


def write_shards(
    prefix: str,
    jobs: Sequence[Job],
    convert: Callable[[Job], Converted],
    *,
    num_shards: int,
    fingerprint: str,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, dict]:
    """Converts every job, one per image; returns {shard: {'counts': .., 'rejected': [..]}}.

    Shards that an earlier run with the same fingerprint finished are kept, unless they lack an
    image: what was missing may be there by now. `convert` must be picklable; with more than one
    worker the calling script needs the `if __name__ == "__main__"` guard of multiprocessing.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}, must be at least 1")
    state = _start_or_resume(prefix, fingerprint, overwrite)
    paths = [f"{prefix}-{i:05}-of-{num_shards:05}.tfrecord" for i in range(num_shards)]
    pending = {p: jobs[i::num_shards] for i, p in enumerate(paths) if not _is_finished(p, state)}
    todo = list(itertools.chain.from_iterable(pending.values()))
    progress = Progress(len(todo))
    write_json(f"{prefix}.state.json", state)
    with _in_parallel(convert, todo, workers) as results:
        for path, shard_jobs in pending.items():
            shard = itertools.islice(results, len(shard_jobs))
            state["shards"][os.path.basename(path)] = _write_shard(path, shard, progress)
            write_json(f"{prefix}.state.json", state)
    return dict(sorted(state["shards"].items()))
