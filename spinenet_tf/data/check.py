"""Which record of a data set cannot be used, and why."""

import contextlib
import dataclasses
from collections.abc import Iterator

import tensorflow as tf

from spinenet_tf.data.pipeline import eval_batches
from spinenet_tf.data.report import Report
from spinenet_tf.data.source import Data

BATCH = 8


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
        print("an input error? Looking for the record ...", flush=True)
        problem = first_problem(data, labels, num_classes)
        if problem is None:
            raise
        raise ValueError(
            f"{problem}. Data.bad_records says how many broken records and objects may be left "
            "out; scripts/check_records.py lists them"
        ) from e
