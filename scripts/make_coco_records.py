"""COCO instances JSON and images to TFRecord shards.

    python scripts/make_coco_records.py \\
        --images=coco/val2017 --annotations=coco/annotations/instances_val2017.json \\
        --output=records/val --num_shards=8

writes records/val-00000-of-00008.tfrecord and so on, and records/val.json, which describes them and
lists what had to be left out. Any path may be gs://. Stopped, it goes on when it is run again.
"""

import sys

import shard_flags
from absl import app, flags

from spinenet_tf.data import coco

IMAGES = flags.DEFINE_string("images", None, "Folder of the images.", required=True)
ANNOTATIONS = flags.DEFINE_string("annotations", None, "Instances JSON.", required=True)
MASKS = flags.DEFINE_bool("masks", True, "Write the objects' masks in the frames of their boxes.")
PNG_MASKS = flags.DEFINE_bool(
    "png_masks", True, "With --masks: also PNGs of whole images, for other tools and evaluation."
)
MASK_SIZE = flags.DEFINE_integer("mask_size", 112, "Data.mask_size of training.", lower_bound=1)
CONTIGUOUS_LABELS = flags.DEFINE_bool(
    "contiguous_labels", False, "Number the categories 1, 2, ... instead of using their ids."
)
flags.adopt_module_key_flags(shard_flags)


def _about(summary: coco.Summary) -> list[str]:
    masks = "with" if summary.masks else "without"
    return [
        f"{summary.num_examples} examples, {summary.num_instances} instances, {masks} masks",
        f"num_classes={summary.num_classes} with the background",
        f"{summary.clipped} boxes clipped, {summary.reencoded} images encoded again as JPEG",
    ]


def main(_: list[str]) -> None:
    summary = shard_flags.run(
        coco.convert,
        _about,
        lambda entry: f"image {entry['image_id']}, annotation {entry['annotation_id']}",
        images_dir=IMAGES.value,
        annotations=ANNOTATIONS.value,
        output_prefix=shard_flags.OUTPUT.value,
        masks=MASKS.value,
        png_masks=PNG_MASKS.value,
        mask_size=MASK_SIZE.value,
        contiguous_labels=CONTIGUOUS_LABELS.value,
    )
    if summary.rejected and not summary.num_instances:
        sys.exit("error: not one object could be converted; the reasons are above")


if __name__ == "__main__":
    app.run(main)
