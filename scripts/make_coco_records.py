"""COCO instances JSON and images to TFRecord shards.

    python scripts/make_coco_records.py \\
        --images=coco/val2017 --annotations=coco/annotations/instances_val2017.json \\
        --output=records/val --num_shards=8

writes records/val-00000-of-00008.tfrecord and so on, and records/val.json, which describes them and
lists what had to be left out. Any path may be gs://. Stopped, it goes on when it is run again.
"""

import os
import sys
import time

from absl import app, flags

from spinenet_tf.data import coco
from spinenet_tf.data.beam import runner

IMAGES = flags.DEFINE_string("images", None, "Folder of the images.", required=True)
ANNOTATIONS = flags.DEFINE_string("annotations", None, "Instances JSON.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Prefix of the shards.", required=True)
NUM_SHARDS = flags.DEFINE_integer("num_shards", 8, "Number of shards.", lower_bound=1)
MASKS = flags.DEFINE_bool("masks", True, "Write the objects' masks in the frames of their boxes.")
PNG_MASKS = flags.DEFINE_bool(
    "png_masks", True, "With --masks: also PNGs of whole images, for other tools and evaluation."
)
MASK_SIZE = flags.DEFINE_integer("mask_size", 112, "Data.mask_size of training.", lower_bound=1)
CONTIGUOUS_LABELS = flags.DEFINE_bool(
    "contiguous_labels", False, "Number the categories 1, 2, ... instead of using their ids."
)
WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes; by default as many as cores, and at most one a shard.", 1
)
BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", None, "Convert by an Apache Beam pipeline with these options, such as "
    "'--runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp'."
)  # fmt: skip
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace shards made from other inputs.")
STRICT = flags.DEFINE_bool("strict", False, "Exit with status 1 if anything was rejected.")

REASONS_SHOWN = 20


def _report(summary: coco.Summary, seconds: float) -> None:
    rate = f"{summary.num_examples / seconds:.1f} images/s"
    print(f"{summary.num_examples} examples, {summary.num_instances} instances")
    print(f"{len(summary.shards)} shards {OUTPUT.value}-*.tfrecord in {seconds:.1f} s ({rate})")
    print(f"{summary.clipped} boxes clipped, {summary.reencoded} images encoded again as JPEG")
    print(f"{len(summary.rejected)} rejected; the whole list is in {OUTPUT.value}.json")
    for entry in summary.rejected[:REASONS_SHOWN]:
        where = f"image {entry['image_id']}, annotation {entry['annotation_id']}"
        print(f"  {where}: {entry['field']} {entry['value']}: {entry['reason']}")


def main(_: list[str]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the worker processes' start-up lines
    start = time.monotonic()
    try:
        summary = coco.convert(
            IMAGES.value,
            ANNOTATIONS.value,
            OUTPUT.value,
            num_shards=NUM_SHARDS.value,
            masks=MASKS.value,
            png_masks=PNG_MASKS.value,
            mask_size=MASK_SIZE.value,
            contiguous_labels=CONTIGUOUS_LABELS.value,
            run=runner(BEAM_OPTIONS.value, WORKERS.value),
            overwrite=OVERWRITE.value,
        )
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    _report(summary, time.monotonic() - start)
    if STRICT.value and summary.rejected:
        sys.exit(1)
    if not summary.num_examples:
        sys.exit("error: not one image could be converted; the reasons are above")


if __name__ == "__main__":
    app.run(main)
