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

import shard_flags
from absl import app, flags

from spinenet_tf.data import classes

IMAGES = flags.DEFINE_string("images", None, "Folder of the images.", required=True)
ANNOTATIONS = flags.DEFINE_string("annotations", "", "JSON with the images' classes.")
CLASSES = flags.DEFINE_string("classes", "", "List of the class folders, in their labels' order.")
BBOX_CROPS = flags.DEFINE_bool("bbox_crops", False, "One example a box, cropped around it.")
flags.adopt_module_key_flags(shard_flags)


def _about(summary: classes.Summary) -> list[str]:
    return [
        f"{summary.num_examples} examples of {summary.used_classes} classes",
        f"num_classes={summary.num_classes} with the background",
        f"{summary.reencoded} images encoded again as JPEG",
    ]


def main(_: list[str]) -> None:
    shard_flags.run(
        classes.convert,
        _about,
        lambda entry: f"image {entry['image_id']}",
        images_dir=IMAGES.value,
        output_prefix=shard_flags.OUTPUT.value,
        annotations=ANNOTATIONS.value,
        classes=CLASSES.value,
        bbox_crops=BBOX_CROPS.value,
    )


if __name__ == "__main__":
    app.run(main)
