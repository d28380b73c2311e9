"""Where a data set is: its shards, how many records they hold, what their classes are called."""

import dataclasses
import functools
import json
import re

import gin
import tensorflow as tf

from spinenet_tf.data import records, shards, tfds_source

SAMPLE = 64  # records whose mean size stands for all
HOSTS = ("device", "host")


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
      shuffle: most records in the shuffle buffer.
      shuffle_bytes: most bytes of them, by the mean size of the first ones (COCO: about 170 kB).
      seed: of file order, shuffling and augmentation draws.
      deterministic: the same order in every run, so that a resumed run is exactly the
        uninterrupted one. Costs little unless decode times differ wildly.
      annotations: COCO instances JSON to evaluate against; by default the records' own boxes.
      crop_area: with classes, the least and greatest share of the image in a training view.
      crop_ratio: least and greatest width / height of it.
      flip: with classes, mirrors half of the training views.
      tfds_dir: data_dir of TensorFlow Datasets; '' is its default.
      augment: where training images with objects are scaled, cropped and mirrored: on the 'device',
        or by the 'host', whose batches then hold `viewed`. Equal draws, equal views.
      bad_records: how many records and objects may be left out because they are broken; each is
        logged with its file, place and reason. With 0 the first is an error. Otherwise reading
        costs about a fifth more, and a run resumed at a step may meet other images than one that
        was not interrupted, since it does not know how many were left out before.
    """

    pattern: str = ""
    batch_size: int = 256
    canvas: int = 640
    max_boxes: int = 100
    mask_size: int = 112
    shuffle: int = 4096
    shuffle_bytes: int = 512 * 2**20
    seed: int = 0
    deterministic: bool = True
    annotations: str = ""
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    tfds_dir: str = ""
    augment: str = "device"
    bad_records: int = 0

    def __post_init__(self):
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"Data.crop_area={self.crop_area} is not 0 < least <= greatest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"Data.crop_ratio={self.crop_ratio} is not 0 < least <= greatest")

        if self.augment not in HOSTS:
            raise ValueError(f"Data.augment={self.augment!r} is not one of {HOSTS}")
        if self.bad_records < 0 or self.shuffle < 1 or self.shuffle_bytes < 1:
            raise ValueError("Data.bad_records must not be negative, nor Data.shuffle* below 1")

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
        total = sum(self.counts(self.files()))
        if not total:
            raise ValueError(f"Data.pattern={self.pattern!r}: the shards hold no record")
        return total

    def counts(self, files: list[str]) -> list[int]:
        """Records of each file: from the sidecars, or by walking through those that none covers."""
        counts = zip(files, self._known(files), strict=True)
        return [shards.count(f) if n is None else n for f, n in counts]

    def known_examples(self) -> int | None:
        """Images of all shards, if the sidecars say."""
        counts = self._known(self.files())
        return None if None in counts else sum(counts)

    def _known(self, files: list[str]) -> list[int | None]:
        known = {
            f"{path.rpartition('/')[0]}/{name}": number
            for path, sidecar in self.sidecars().items()
            for name, number in sidecar["shards"].items()
        }
        return [known.get(f if "/" in f else f"/{f}") for f in files]

    def buffer(self, files: list[str]) -> int:
        """Records that the shuffle buffer may hold."""
        some = tf.data.TFRecordDataset(files[:1]).take(SAMPLE).ignore_errors()
        sizes = [len(record) for record in some.as_numpy_iterator()]
        mean = sum(sizes) / len(sizes) if sum(sizes) else 1
        return max(1, min(self.shuffle, int(self.shuffle_bytes / mean)))

    def some_labels(self, images: int = 512) -> list[int]:
        """Labels of the first images, for shards whose sidecar does not list them."""
        stream = tf.data.TFRecordDataset(self.files()).take(images)
        if tfds_source.is_tfds(self.pattern):
            parse = functools.partial(
                tfds_source.parse, pattern=self.pattern, data_dir=self.tfds_dir
            )
            labels = stream.map(lambda record: [parse(record)["label"]])
        else:
            labels = stream.map(records.parse_labels)
        labels = labels.ignore_errors()  # of those that can be read; broken ones are found later
        return [int(label) for row in labels.as_numpy_iterator() for label in row]

    def some_side(self, images: int = 64) -> int:
        """The longest side in pixels of the first images, as far as records tell; else 0."""
        stream = tf.data.TFRecordDataset(self.files()).take(images)
        sides = stream.map(records.parse_sides).ignore_errors()
        return max((int(n) for row in sides.as_numpy_iterator() for n in row), default=0)
