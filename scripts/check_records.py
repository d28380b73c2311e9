"""Reads all records of a data set: what is broken and why, statistics, and a contact sheet.

    python scripts/check_records.py --pattern='records/train-*.tfrecord' --sheet=train.png

Takes shards of any maker, and tfds:<name>:<split>. Ends with status 1 if a record or object
cannot be used: training stops there, or leaves it out if Data.bad_records allows so many.
"""

import json
import os
import sys

from absl import app, flags, logging

PATTERN = flags.DEFINE_string("pattern", None, "Glob of the shards.", required=True)
LABELS = flags.DEFINE_enum(
    "labels", "auto", ["auto", "boxes", "masks", "class"], "What of the records to check."
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", None, "With the background: labels from it on are errors.", lower_bound=2
)
MAX_BOXES = flags.DEFINE_integer("max_boxes", 100, "Data.max_boxes of training.", lower_bound=1)
MASK_SIZE = flags.DEFINE_integer("mask_size", 112, "Data.mask_size of training.", lower_bound=1)
SHEET = flags.DEFINE_string("sheet", None, "PNG file of the first images, drawn with labels.")
SHOWN = flags.DEFINE_integer("shown", 24, "How many images the sheet has.", lower_bound=1)
SIDE = flags.DEFINE_integer("side", 320, "Pixels of a side of each.", lower_bound=16)
COLUMNS = flags.DEFINE_integer("columns", 6, "Images of a row of it.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text.")


def main(_: list[str]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(logging.ERROR)  # the problems are printed at the end
    from spinenet_tf.data.pipeline import Data

    data = Data(
        pattern=PATTERN.value,
        canvas=SIDE.value,
        max_boxes=MAX_BOXES.value,
        mask_size=MASK_SIZE.value,
    )
    try:
        figures, pictures = _read(data)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(figures) if JSON.value else _text(figures))
    if SHEET.value and pictures:
        _write_sheet(pictures)
    if figures["left_out"]["record"] or figures["left_out"]["object"]:
        sys.exit(1)


def _read(data) -> tuple[dict, list]:
    from spinenet_tf.data import check
    from spinenet_tf.data.report import Report

    labels = check.find_labels(data) if LABELS.value == "auto" else LABELS.value
    report, statistics = Report(allowed=sys.maxsize), check.Statistics()
    names = {c["label"]: c["name"] for c in data.categories()}
    files, pictures = data.files(), []
    for batch in check.read_all(data, labels, NUM_CLASSES.value, report).as_numpy_iterator():
        statistics.update(batch)
        for row in range(len(batch["id"])):
            if SHEET.value and batch["id"][row] >= 0 and len(pictures) < SHOWN.value:
                pictures.append(check.picture(batch, row, names))
    figures = {"pattern": data.pattern, "files": len(files), "labels": labels}
    figures |= statistics.result()
    figures["left_out"] = {kind: report.counts[kind] for kind in ("record", "object", "cut")}
    return figures | {"problems": report.problems}, pictures


def _text(figures: dict) -> str:
    left_out, classes = figures["left_out"], figures["classes"]
    lines = [
        f"{figures['files']} files, {figures['images']} good records read for {figures['labels']}",
        f"objects: {figures['objects']} of {len(classes)} classes, {figures['crowds']} crowds; "
        f"small, medium, large: {figures['small_medium_large']}",
        "least, median, greatest: objects of an image "
        f"{figures['objects_of_an_image']}, height {figures['height']}, width {figures['width']}",
        f"images without objects: {figures['images_without_objects']}",
        f"objects of each label: {classes}",
        f"cannot be used: {left_out['record']} records, {left_out['object']} objects; "
        f"{left_out['cut']} objects beyond --max_boxes",
        *(f"  {problem}" for problem in figures["problems"]),
    ]
    return "\n".join(lines)


def _write_sheet(pictures: list) -> None:
    from PIL import Image

    from spinenet_tf.data.check import contact_sheet

    Image.fromarray(contact_sheet(pictures, COLUMNS.value)).save(SHEET.value)
    print(f"{len(pictures)} images in {SHEET.value}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
