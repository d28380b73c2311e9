"""A synthetic fine-grained classification set, to try the package without a download.

    python scripts/make_synthetic_classes.py --output=/tmp/beetles

writes /tmp/beetles/{train,val}/*.jpg and /tmp/beetles/{train,val}.json, which
make_classification_records.py converts. The same flags give the same bytes.
"""

import time

from absl import app, flags

from spinenet_tf.data import synthetic_classes

OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
TRAIN_IMAGES = flags.DEFINE_integer("train_images", 3000, "Training images.", lower_bound=0)
VAL_IMAGES = flags.DEFINE_integer("val_images", 500, "Validation images.", lower_bound=0)
IMAGE_SIZE = flags.DEFINE_integer("image_size", 96, "Side, pixels.", lower_bound=32)
SEED = flags.DEFINE_integer("seed", 0, "Another seed gives other pictures.", lower_bound=0)


def main(_: list[str]) -> None:
    for split, num_images in (("train", TRAIN_IMAGES.value), ("val", VAL_IMAGES.value)):
        start = time.monotonic()
        path = synthetic_classes.write_classes(
            OUTPUT.value,
            num_images=num_images,
            seed=SEED.value,
            image_size=IMAGE_SIZE.value,
            split=split,
        )
        rate = num_images / (time.monotonic() - start)
        print(f"{path}: {num_images} images, {rate:.1f} images/s")


if __name__ == "__main__":
    app.run(main)
