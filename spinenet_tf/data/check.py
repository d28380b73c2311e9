"""Looks at all records of a data set: which cannot be used and why, and what the others are."""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from spinenet_tf import draw
from spinenet_tf.data import records
from spinenet_tf.data.pipeline import eval_batches
from spinenet_tf.data.report import Report
from spinenet_tf.data.source import Data
from spinenet_tf.data.tfds_source import is_tfds
from spinenet_tf.ops.masks import paste_mask

BATCH = 8
FROM_INPUT = "GetNext|Dataset|Iterator"  # in TensorFlow's messages, whatever op has failed
SMALL, LARGE = 32**2, 96**2  # COCO's borders between areas, pixels


def read_all(data: Data, labels: str, num_classes: int | None, report: Report) -> tf.data.Dataset:
    """Batches of all records in the order of the files; what is bad goes to `report`."""
    one_by_one = dataclasses.replace(data, bad_records=1, batch_size=BATCH, augment="device")
    return eval_batches(
        one_by_one, labels=labels, num_classes=num_classes, report=report, strict=False
    )


def first_problem(data: Data, labels: str, num_classes: int | None) -> str | None:
    """File, place and reason of a record that cannot be used; None if all can be."""
    report = Report(allowed=0)
    try:
        for _ in read_all(data, labels, num_classes, report):
            pass
    except tf.errors.OpError:
        if not report.problems:
            raise
    left_out = [p for p in report.problems if "raise Data.max_boxes" not in p]
    return left_out[0] if left_out else None


@contextlib.contextmanager
def named_errors(data: Data, labels: str, num_classes: int | None) -> Iterator[None]:
    """Errors of broken records say which file and record; others pass.

    A failed decoder does not know what it decodes, so all records are read until one fails again.

    Raises:
      ValueError: names the record.
    """
    try:
        yield
    except (tf.errors.InvalidArgumentError, tf.errors.DataLossError, tf.errors.UnknownError) as e:
        if not re.search(FROM_INPUT, str(e)):  # such as a TPU's own; the search may take an hour
            raise
        print("an input error? Looking for the record ...", flush=True)
        problem = first_problem(data, labels, num_classes)
        if problem is None:
            raise
        raise ValueError(
            f"{problem}. Data.bad_records says how many broken records and objects may be left "
            "out; scripts/check_records.py lists them"
        ) from e


def find_labels(data: Data) -> str:
    """'class', 'masks' or 'boxes': what the first records that say anything have."""
    if is_tfds(data.pattern):
        return "class"
    stream = tf.data.TFRecordDataset(data.files()).take(512)
    keys = ("image/class/label", "image/object/mask", records.BOX_MASKS)
    for record in stream.ignore_errors().as_numpy_iterator():
        try:
            features = tf.train.Example.FromString(record).features.feature
        except Exception:  # noqa: BLE001 - protobuf's kinds differ; the report names the record
            continue
        if keys[0] in features:
            return "class"
        if any(key in features for key in keys[1:]):
            return "masks"
    return "boxes"


class Statistics:
    """What the good records of a data set are like."""

    def __init__(self):
        self.sides, self.objects, self.areas = [], [], []
        self.classes, self.crowds = Counter(), 0

    def update(self, batch: dict) -> None:
        """Adds a batch of `eval_batches` (arrays)."""
        there = batch["id"] >= 0
        if "label" in batch:
            self.objects += [1] * int(there.sum())
            self.classes.update(batch["label"][there].tolist())
            return
        self.sides += batch["source_size"][there].tolist()
        good = batch["classes"] > 0
        self.objects += good[there].sum(-1).tolist()
        self.classes.update(batch["classes"][good].tolist())
        self.areas += batch["area"][good].tolist()
        self.crowds += int(batch["crowd"].sum())

    def result(self) -> dict:
        """Plain numbers and lists: quantiles are least, median and greatest."""
        areas = np.array(self.areas)
        sizes = [int((areas < SMALL).sum()), 0, int((areas >= LARGE).sum())]
        sizes[1] = len(areas) - sum(sizes)
        return {
            "images": len(self.objects),
            "objects": sum(self.objects),
            "objects_of_an_image": _quantiles(self.objects),
            "images_without_objects": self.objects.count(0),
            "height": _quantiles([side[0] for side in self.sides]),
            "width": _quantiles([side[1] for side in self.sides]),
            "crowds": self.crowds,
            "small_medium_large": sizes,
            "classes": dict(sorted(self.classes.items())),
        }


def _quantiles(values: list) -> list[float]:
    return np.quantile(values, [0, 0.5, 1]).tolist() if values else []


def picture(batch: dict, row: int, names: dict[int, str]) -> np.ndarray:
    """One image of a batch (arrays) on its canvas, with its boxes, masks or class drawn."""
    image = batch["image"][row]
    if "label" in batch:
        label = int(batch["label"][row])
        return draw.draw_text(image, [names.get(label, str(label))])
    height, width = batch["image_size"][row]
    shown = batch["classes"][row] > 0
    boxes, classes = batch["boxes"][row][shown], batch["classes"][row][shown]
    seen = image[:height, :width]
    if "masks" in batch:
        cells = batch["masks"][row][shown] / 255
        masks = [paste_mask(m, b, height, width) for m, b in zip(cells, boxes, strict=True)]
        seen = draw.draw_masks(seen, masks, classes)
    canvas = np.zeros_like(image)
    canvas[:height, :width] = draw.draw_boxes(seen, boxes, classes, names=names)
    return canvas


def contact_sheet(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Square pictures side by side, as one image."""
    missing = -len(pictures) % columns
    pictures = pictures + [np.zeros_like(pictures[0])] * missing
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows, 0)
