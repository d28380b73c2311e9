"""Classified images to TFRecord shards.

    # one subfolder a class (ImageNet's layout)
    python scripts/make_classification_records.py \\
        --images=imagenet/train --output=records/train --num_shards=1024

    # a JSON in COCO's form (iNaturalist 2017)
    python scripts/make_classification_records.py \\
        --images=inat --annotations=inat/train2017.json --output=records/train --num_shards=256

    # iNaturalist-bbox: each box of its own, enlarged 1.5 times
    python scripts/make_classification_records.py --bbox_crops \\
        --images=inat --annotations=inat/train_2017_bboxes.json --output=records/boxes

writes records/train-00000-of-01024.tfrecord and so on, and records/train.json, which describes them
and lists what had to be left out. Any path may be gs://. Stopped, it goes on when it is run again.
"""

import os
import sys
import time

from absl import app, flags

from spinenet_tf.data import classes
from spinenet_tf.data.beam import runner

IMAGES = flags.DEFINE_string("images", None, "Folder of the images.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Prefix of the shards.", required=True)
ANNOTATIONS = flags.DEFINE_string("annotations", "", "JSON with the images' classes.")
CLASSES = flags.DEFINE_string("classes", "", "List of the class folders, in their labels' order.")
BBOX_CROPS = flags.DEFINE_bool("bbox_crops", False, "One example a box, cropped around it.")
NUM_SHARDS = flags.DEFINE_integer("num_shards", 8, "Number of shards.", lower_bound=1)
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


def _report(summary: classes.Summary, seconds: float) -> None:
    rate = f"{summary.num_examples / seconds:.1f} images/s"
    print(f"{summary.num_examples} examples of {summary.used_classes} classes")
    print(f"num_classes={summary.num_classes} with the background")
    print(f"{len(summary.shards)} shards {OUTPUT.value}-*.tfrecord in {seconds:.1f} s ({rate})")
    print(f"{summary.reencoded} images encoded again as JPEG")
    print(f"{len(summary.rejected)} rejected; the whole list is in {OUTPUT.value}.json")
    for entry in summary.rejected[:REASONS_SHOWN]:
        print(f"  image {entry['image_id']}: {entry['field']} {entry['value']}: {entry['reason']}")


def main(_: list[str]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the worker processes' start-up lines
    start = time.monotonic()
    try:
        summary = classes.convert(
            IMAGES.value,
            OUTPUT.value,
            annotations=ANNOTATIONS.value,
            classes=CLASSES.value,
            bbox_crops=BBOX_CROPS.value,
            num_shards=NUM_SHARDS.value,
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
