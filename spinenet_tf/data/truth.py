"""Records -> the COCO instances data set that they were made of: exact masks for evaluation."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image
from pycocotools import mask as coco_mask

from spinenet_tf.data import records
from spinenet_tf.data.source import Data

DECIMALS = 3  # of a box, pixels: published ones have two, and records hold float32 fractions


def check_truth(data: Data) -> None:
    """Whether masks can be evaluated, as far as it is known without reading records.

    Raises:
      ValueError: neither the records nor `Data.annotations` say what the masks are.
    """
    without = [
        path
        for path, said in data.sidecars().items()
        if said.get("num_instances", 1) and not said.get("png_masks", True)
    ]
    if without and not data.annotations:
        raise ValueError(
            f"{without[0]}: these records have no masks of whole images to evaluate against: set "
            "eval/Data.annotations to the COCO JSON that they were made from"
        )


def coco_truth(data: Data) -> dict:
    """Streams the shards once, decoding masks but no image.

    Args:
      data: shards with masks; only `pattern` matters.

    Returns:
      A COCO instances data set of Python numbers and strings: images (id, height, width),
      annotations (id, image_id, category_id, bbox xywh in pixels of the image file to 0.001, area,
      iscrowd, segmentation as compressed RLE) and categories (id, name). A label is the category
      id that the sidecar gives it, otherwise its own.

    Raises:
      ValueError: an image comes twice, or has objects without masks.
    """
    categories = data.categories()
    category_ids = {c["label"]: c["id"] for c in categories}
    stream = tf.data.TFRecordDataset(data.files())
    stream = stream.map(lambda record: records.parse_example(record, masks=True))
    images, annotations = {}, []
    for example in stream.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        image = _image(example)
        if image["id"] in images:
            raise ValueError(f"Data.pattern={data.pattern!r}: image id {image['id']} comes twice")
        images[image["id"]] = image
        for index in range(len(example["labels"])):
            label = int(example["labels"][index])
            ids = {"id": len(annotations) + 1, "category_id": category_ids.get(label, label)}
            annotations.append(ids | _annotation(example, image, index))
    known = {c["id"]: c["name"] for c in categories}
    used = {a["category_id"]: str(a["category_id"]) for a in annotations}
    return {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in sorted((used | known).items())],
    }


def _image(example: dict) -> dict:
    height, width = int(example["height"]), int(example["width"])
    if not height or not width:  # a foreign record; the header is enough
        width, height = Image.open(io.BytesIO(example["encoded"])).size
    return {"id": int(example["id"]), "height": height, "width": width}


def _annotation(example: dict, image: dict, index: int) -> dict:
    png, sides = example["masks"][index], [image["height"], image["width"]]
    if not png:
        raise ValueError(
            f"image {image['id']} has objects without masks of the whole image: set "
            "eval/Data.annotations to the COCO JSON, or convert again, make_coco_records.py with "
            "--masks and --png_masks"
        )
    mask = np.asarray(Image.open(io.BytesIO(png))) > 0
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    corners = example["boxes"][index].astype(float) * np.tile(sides, 2)
    ymin, xmin, ymax, xmax = corners.tolist()
    box = [xmin, ymin, xmax - xmin, ymax - ymin]
    return {
        "image_id": image["id"],
        "bbox": [round(value, DECIMALS) for value in box],
        "area": float(example["area"][index]),
        "iscrowd": int(example["crowd"][index]),
        "segmentation": {"size": sides, "counts": rle["counts"].decode()},
    }
