"""The first images of a COCO instances file, with only the categories that they show.

    python scripts/coco_subset.py --annotations=instances_val2017.json --images=16 \\
        --output=some.json

Prints the number of images, objects and categories. The images themselves stay where they are.
"""

import json
import sys

import tensorflow as tf
from absl import app, flags

ANNOTATIONS = flags.DEFINE_string("annotations", None, "Instances JSON.", required=True)
IMAGES = flags.DEFINE_integer("images", 16, "Images to keep, by id.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON to write.", required=True)


def subset(coco: dict, count: int) -> dict:
    """The `count` images of lowest id, their annotations, and the categories of those."""
    images = sorted(coco["images"], key=lambda image: image["id"])[:count]
    ids = {image["id"] for image in images}
    annotations = [a for a in coco["annotations"] if a["image_id"] in ids]
    shown = {a["category_id"] for a in annotations}
    categories = [c for c in coco["categories"] if c["id"] in shown]
    kept = {"images": images, "annotations": annotations, "categories": categories}
    return {k: v for k, v in coco.items() if k in ("info", "licenses")} | kept


def main(_: list[str]) -> None:
    if not tf.io.gfile.exists(ANNOTATIONS.value):
        sys.exit(f"error: --annotations={ANNOTATIONS.value}: no such file")
    with tf.io.gfile.GFile(ANNOTATIONS.value) as file:
        small = subset(json.load(file), IMAGES.value)
    with tf.io.gfile.GFile(OUTPUT.value, "w") as file:
        json.dump(small, file)
    print(", ".join(f"{len(small[k])} {k}" for k in ("images", "annotations", "categories")))


if __name__ == "__main__":
    app.run(main)
