"""What the input pipeline cannot use: named, counted, and an error once it is more than allowed."""

import re
import threading
from collections import Counter

import numpy as np
import tensorflow as tf
from absl import logging

from spinenet_tf.data import shards

PADDING = ""  # the file of a row that only fills up a batch
LOGGED = 100  # problems of a kind that are logged one by one

# Why an object is not used; the place in this list is its number in `find_bad_objects`.
REASONS = (
    "fine",
    "the lists of its image are not equally long",
    "NaN or infinite box",
    "swapped corners",
    "box without height or width",
    "box entirely outside of the image",
    "unknown class",
)


class Report:
    """Counts what was left out. Its methods are called by `tf.data`, from any thread.

    Args:
      allowed: so many records and objects may be left out; the next one is an error.

    Attributes:
      counts: {kind: number} with kinds 'record' (not one row could be made of it), 'object' and
        'cut' (objects beyond `Data.max_boxes`, never an error in training).
      problems: the first of each kind in words.
    """

    def __init__(self, allowed: int = 0):
        self.allowed, self.counts, self.problems = allowed, Counter(), []
        self._seen, self._lock = set(), threading.Lock()

    def add(self, kind: str, text: str, *, number: int = 1, fatal: bool = True) -> None:
        """Notes `number` things of a kind.

        Raises:
          ValueError: `fatal`, and more were left out than allowed; the text is `text`.
        """
        with self._lock:
            if text in self._seen:  # in an earlier epoch
                return
            self._seen.add(text)
            before = self.counts[kind]
            self.counts[kind] += number
            left_out = self.counts["record"] + self.counts["object"]
        if before < LOGGED:
            self.problems.append(text)
            logging.warning("left out: %s", text)
        if fatal and left_out > self.allowed:
            raise ValueError(
                f"{text}. Data.bad_records={self.allowed} says how many broken records and objects "
                "may be left out; scripts/check_records.py lists them"
            )

    def __str__(self) -> str:
        """Such as '3 records, 1 object left out'; '' if nothing was."""
        parts = [f"{n} {kind}{'s' * (n > 1)}" for kind, n in sorted(self.counts.items()) if n]
        return f"{', '.join(parts)} left out" if parts else ""

    def record(self, file, number, error: Exception) -> None:
        """Notes a record that no row could be made of; the error says why."""
        self.add("record", f"{place(file, number)}: {reason_of(error)}")

    def end(self, file, seen) -> None:
        """Notes what is missing of a file of which `seen` records could be read."""
        path, seen = _text(file), int(seen)
        lost = shards.count(path) - seen
        if lost:
            rest = f"; the {lost - 1} records behind it cannot be read either" * (lost > 1)
            reason = f"wrong checksum or cut off{rest}"
            self.add("record", f"{place(file, seen)}: {reason}", number=lost)

    def objects(self, files, numbers, ids, reasons, boxes, labels) -> None:
        """Notes the bad objects of a batch.

        Args:
          files, numbers, ids: [b] of the images.
          reasons: [b, n] indices of `REASONS`. boxes: [b, n, 4]. labels: [b, n].
        """
        for row, column in np.argwhere(np.asarray(reasons) > 0):
            reason = REASONS[int(reasons[row, column])]
            box = [float(f"{v:.6g}") for v in np.asarray(boxes[row, column])]
            what = f"label {int(labels[row, column])}" if "class" in reason else f"box {box}"
            where = f"{place(files[row], numbers[row])}: image {int(ids[row])}, object {column}"
            self.add("object", f"{where}: {reason}: {what}")

    def cuts(self, files, numbers, ids, counts, most, fatal) -> None:
        """Notes images with more than `most` objects, of which the last are lost."""
        counts = np.ravel(counts)
        for row in np.flatnonzero(counts > int(most)):
            text = (
                f"{place(files[row], numbers[row])}: image {int(ids[row])} has {counts[row]} "
                f"objects; raise Data.max_boxes={int(most)}"
            )
            if fatal:
                raise ValueError(text)
            self.add("cut", text, number=int(counts[row] - most), fatal=False)


def place(file, number) -> str:
    """What a record is called: its file and its place there, from 0."""
    return f"{_text(file)}: record {int(number)}"


def reason_of(error: Exception) -> str:
    """The first line of an error, without TensorFlow's names of operations."""
    text = str(getattr(error, "message", error)).strip()
    text = re.sub(r" *\[Op:\w+\].*$", "", text)
    text = re.sub(r"\{\{function_node [^}]*\}\}|\{\{node [^}]*\}\}", "", text)
    return text.splitlines()[0].strip() if text else type(error).__name__


def _text(value) -> str:
    return bytes(np.asarray(value).item()).decode()


def find_bad_objects(
    boxes: tf.Tensor, labels: tf.Tensor, equal: tf.Tensor, num_classes: int | None
) -> tf.Tensor:
    """[b, n] int32 indices of `REASONS`; those of padding are meaningless.

    Args:
      boxes: [b, n, 4] yxyx, 0..1. labels: [b, n] int32.
      equal: [b] bool, whether the lists of an image are equally long.
      num_classes: with the background; None: any label from 1 is good.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    most = labels.dtype.max if num_classes is None else num_classes - 1
    checks = [
        tf.broadcast_to(~equal[:, None], tf.shape(labels)),
        tf.reduce_any(~tf.math.is_finite(boxes), -1),
        tf.reduce_any(high < low, -1),
        tf.reduce_any(high == low, -1),
        tf.reduce_any((high <= 0) | (low >= 1), -1),
        (labels < 1) | (labels > most),
    ]
    reasons = tf.zeros_like(labels)
    for number, bad in reversed(list(enumerate(checks, 1))):
        reasons = tf.where(bad, number, reasons)
    return reasons
