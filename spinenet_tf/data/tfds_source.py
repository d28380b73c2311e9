"""Classification sets that TensorFlow Datasets has prepared, read from their TFRecord shards.

`tfds:<name>:<split>` stands for a split; <name> may have a config and a version, as in
'imagenet2012:5.1.0', so it is what lies between the first and the last colon. Only the files, their
lengths and the features are taken from the library: order, hosts and resume are the pipeline's own.
It is an optional dependency, hence imported here and only when such a pattern is used.
"""

import functools
import re
from typing import Any

import tensorflow as tf

PREFIX = "tfds:"
HASH_BUCKETS = 2**62  # so many that the ids of a data set do not collide


def is_tfds(pattern: str) -> bool:
    """Whether a `Data.pattern` names a TFDS split."""
    return pattern.startswith(PREFIX)


def files(pattern: str, data_dir: str = "") -> list[str]:
    """The split's shards.

    Raises:
      ImportError: TensorFlow Datasets is not installed.
      FileNotFoundError: the data set is not prepared; the message says how to.
      ValueError: no such set or split, files other than TFRecord, or no image and label.
    """
    return [str(path) for path in _split(pattern, data_dir).filepaths]


def sidecars(pattern: str, data_dir: str = "") -> dict[str, dict]:
    """What `Data.sidecars` returns: {a path in the shards' folder: categories and shards}.

    A category's `id` is the label of the data set, from 0; its `label` is one more, since 0 is the
    background here.
    """
    split, names = _split(pattern, data_dir), _builder(pattern, data_dir).info.features["label"]
    paths = [str(path) for path in split.filepaths]
    lengths = dict(zip((p.rpartition("/")[2] for p in paths), split.shard_lengths, strict=True))
    categories = [
        {"id": i, "label": i + 1, "name": names.int2str(i)} for i in range(names.num_classes)
    ]
    folder = paths[0].rpartition("/")[0]
    return {f"{folder}/dataset_info.json": {"shards": lengths, "categories": categories}}


def parse(record: tf.Tensor, pattern: str, data_dir: str = "") -> dict[str, tf.Tensor]:
    """Reads one serialized example: encoded, id and label as `records.parse_class_example`.

    The id is a positive hash of the record, as TFDS has no id that all its sets share.
    """
    import tensorflow_datasets as tfds

    features = _builder(pattern, data_dir).info.features
    example = features.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})
    return {
        "encoded": example["image"],
        "id": 1 + tf.strings.to_hash_bucket_fast(record, HASH_BUCKETS),
        "label": tf.cast(example["label"], tf.int32) + 1,
    }


def _names(pattern: str) -> tuple[str, str]:
    match = re.fullmatch(rf"{PREFIX}(.+):([\w-]+)", pattern)
    if not match:
        raise ValueError(f"Data.pattern={pattern!r} is not 'tfds:<name>:<split>' of a whole split")
    return match[1], match[2]


@functools.lru_cache
def _builder(pattern: str, data_dir: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"Data.pattern={pattern!r} needs TensorFlow Datasets: pip install tensorflow-datasets"
        ) from error
    name, _ = _names(pattern)
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"Data.pattern={pattern!r}: no such data set: {error}") from None
    if not builder.is_prepared():
        raise FileNotFoundError(_how_to_prepare(pattern, builder, data_dir))
    _check(pattern, builder)
    return builder


def _how_to_prepare(pattern: str, builder: Any, data_dir: str) -> str:
    folder = f" --data_dir={data_dir}" if data_dir else ""
    manual = (builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").strip()
    command = f"tfds build {_names(pattern)[0]}{folder}{' --manual_dir=FOLDER' if manual else ''}"
    message = f"Data.pattern={pattern!r} is not prepared in {builder.data_dir}: run  {command}"
    return f"{message}\nBy hand you must first put into FOLDER: {manual}" if manual else message


def _check(pattern: str, builder: Any) -> None:
    kind = builder.info.file_format.value if builder.info.file_format else "tfrecord"
    if kind != "tfrecord":
        raise ValueError(
            f"Data.pattern={pattern!r} is stored as {kind}: prepare it again, with "
            "tfds build --file_format=tfrecord"
        )
    for feature in ("image", "label"):
        if feature not in builder.info.features:
            raise ValueError(
                f"Data.pattern={pattern!r} has no feature {feature!r}, so it is no set of image "
                f"classes; it has {sorted(builder.info.features)}"
            )


def _split(pattern: str, data_dir: str) -> Any:
    splits, (_, split) = _builder(pattern, data_dir).info.splits, _names(pattern)
    if split not in splits:
        raise ValueError(f"Data.pattern={pattern!r}: split {split!r} is not of {sorted(splits)}")
    return splits[split]
