"""COCO instances JSON and images to TFRecord shards: checked, restartable, in parallel processes.

Every path goes through `tf.io.gfile`, so `gs://` works. `<prefix>.json` describes the finished set
and lists each image and annotation that had to be left out, with the reason.
"""

import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from spinenet_tf.data import masks as mask_files
from spinenet_tf.data.records import Instance, encode_example
from spinenet_tf.data.shards import (
    Converted,
    Rejection,
    Runner,
    finite,
    in_processes,
    write_json,
    write_shards,
)

VERSION = 2
# What every JPEG or PNG decoder turns into RGB alike; any other image is encoded again.
KEPT_FORMATS = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "I;16")}
JPEG_QUALITY = 95
CLIP_TOLERANCE = 1e-3  # pixels; published boxes are rounded


class Settings(NamedTuple):
    """What every worker needs besides its image."""

    images_dir: str
    labels: dict[int, tuple[int, str]]  # category id -> label, name
    masks: bool
    png_masks: bool
    mask_size: int


@dataclass(frozen=True)
class Summary:
    """A finished set of shards: what `<prefix>.json` holds."""

    num_examples: int
    num_instances: int
    num_classes: int  # the highest label + 1, for the background
    shards: dict[str, int]  # file name -> examples
    masks: bool
    png_masks: bool
    mask_size: int  # cells of a side of the masks in the frames of boxes
    categories: list[dict]  # id, name, label
    rejected: list[dict]  # annotation_id (None: the whole image), image_id, field, value, reason
    clipped: int  # boxes that were partly outside of their image
    reencoded: int  # images that were neither JPEG nor PNG of a plain kind
    fingerprint: str
    source: dict[str, str]  # images, annotations
    version: int = VERSION


def clip_box(box: object, height: int, width: int) -> tuple[float, float, float, float]:
    """The part of an [xmin, ymin, width, height] box inside the image; Rejection if it has none."""
    if not finite(box) or len(box) != 4:
        raise Rejection("bbox", box, "NaN, infinite or not four numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise Rejection("bbox", box, "width or height is not positive")
    xmin, xmax = max(x, 0), min(x + w, width)
    ymin, ymax = max(y, 0), min(y + h, height)
    if xmax <= xmin or ymax <= ymin:
        raise Rejection("bbox", box, f"entirely outside the {width}x{height} image")
    return xmin, ymin, xmax - xmin, ymax - ymin


def _instance(annotation: dict, image: dict, settings: Settings) -> tuple[Instance, bool]:
    """The object, and whether its box was clipped."""
    category = annotation.get("category_id")
    if category not in settings.labels:
        raise Rejection("category_id", category, "unknown category id")
    size = image["height"], image["width"]
    box = clip_box(annotation.get("bbox"), *size)
    area, crowd = annotation.get("area", box[2] * box[3]), annotation.get("iscrowd", 0)
    if not finite([area]) or area < 0:
        raise Rejection("area", area, "NaN, infinite, negative or not a number")
    if crowd not in (0, 1):
        raise Rejection("iscrowd", crowd, "neither 0 nor 1")
    pairs = zip(box, annotation["bbox"], strict=True)
    clipped = any(abs(a - b) > CLIP_TOLERANCE for a, b in pairs)
    of_mask = {}
    if settings.masks:
        window = mask_files.window_of(annotation.get("segmentation"), *size)
        of_mask["box_mask"] = mask_files.box_mask(window, box, settings.mask_size)
        of_mask["mask_png"] = mask_files.png(window) if settings.png_masks else None
    instance = Instance(box, *settings.labels[category], bool(crowd), area, **of_mask)
    return instance, clipped


def read_image(images_dir: str, image: dict) -> tuple[bytes, bool]:
    """The image's JPEG or PNG bytes, and whether they had to be made; Rejection if unusable."""
    encoded, picture = load_picture(images_dir, image.get("file_name"))
    check_size(picture, image)
    return storable(encoded, picture)


def load_picture(images_dir: str, file_name: object) -> tuple[bytes, Image.Image]:
    """An image file's bytes and picture, decoded on use; Rejection if it is missing or broken."""
    path = os.path.join(images_dir, str(file_name))
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            encoded = file.read()
    except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
        raise Rejection("file_name", file_name, f"no image file {path}") from None
    try:
        _try_to_decode(encoded)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Rejection("file_name", file_name, f"cannot be decoded: {error}") from None
    return encoded, Image.open(io.BytesIO(encoded))


def _try_to_decode(encoded: bytes) -> None:
    picture = Image.open(io.BytesIO(encoded))
    if (picture.format, picture.mode) in KEPT_FORMATS:
        # JPEGs at an eighth of the size: all of the file is read, most of the arithmetic is not
        # done. To be kept, no more need be known.
        picture.draft("L", (1, 1))
    picture.load()


def check_size(picture: Image.Image, image: dict) -> None:
    """Rejection if an image is not as large as its entry says, so that boxes would be off."""
    # The stored pixels, not turned by EXIF: COCO's boxes are in this frame, and so TF decodes it.
    stated = image.get("width"), image.get("height")
    if picture.size != stated:
        turned = "; is its EXIF orientation meant? Turn the pixels" * (picture.size[::-1] == stated)
        raise Rejection("width, height", stated, f"the image file is {picture.size}{turned}")


def storable(encoded: bytes, picture: Image.Image) -> tuple[bytes, bool]:
    """The file's bytes if every decoder reads them alike, else a JPEG; and whether it is one."""
    if (picture.format, picture.mode) in KEPT_FORMATS:
        return encoded, False
    return to_jpeg(picture), True


def to_jpeg(picture: Image.Image) -> bytes:
    """Encodes a picture of any mode, in RGB."""
    jpeg = io.BytesIO()
    picture.convert("RGB").save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()


def convert_image(settings: Settings, job: tuple[dict, list[dict]]) -> Converted:
    """One image and its annotations to a serialized example."""
    image, annotations = job
    try:
        encoded, reencoded = read_image(settings.images_dir, image)
    except Rejection as rejection:
        return Converted(None, Counter(rejected_images=1), [rejection.entry(image["id"])])
    instances, rejected, clipped = [], [], 0
    for annotation in annotations:
        try:
            instance, moved = _instance(annotation, image, settings)
        except Rejection as rejection:
            rejected.append(rejection.entry(image["id"], annotation["id"]))
        else:
            instances.append(instance)
            clipped += moved
    keys = ("height", "width", "file_name", "id")
    example = encode_example(encoded, *(image[key] for key in keys), instances)
    counts = Counter(examples=1, instances=len(instances), clipped=clipped, reencoded=reencoded)
    return Converted(example, counts, rejected)


def load_annotations(path: str, unlabelled: bool = False) -> tuple[dict, str]:
    """The checked COCO-like JSON and its sha256.

    Args:
      unlabelled: there may be no annotations, as in COCO's image_info_test-dev2017.json.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not JSON, without one of the three lists, or with missing or duplicate ids.
    """
    if not tf.io.gfile.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    with tf.io.gfile.GFile(path, "rb") as file:
        raw = file.read()
    try:
        coco = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if unlabelled and isinstance(coco, dict) and "annotations" not in coco:
        coco["annotations"] = []
    for field in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list):
            raise ValueError(f"{path}: no list '{field}', so not a COCO instances file")
        _check_ids(path, field, coco[field])
    return coco, hashlib.sha256(raw).hexdigest()


def _check_ids(path: str, field: str, entries: list[dict]) -> None:
    counts = Counter(entry.get("id") for entry in entries)
    wrong = [key for key, count in counts.items() if key is None or count > 1]
    if wrong:
        raise ValueError(f"{path}: duplicate or missing (None) 'id' in '{field}': {wrong[:10]}")


def label_map(categories: list[dict], contiguous: bool) -> dict[int, tuple[int, str]]:
    """{category id: (label, name)}; labels are the ids, or with `contiguous` 1, 2, ... in order.

    Raises:
      ValueError: an id cannot be a label.
    """
    names = {category["id"]: str(category.get("name", category["id"])) for category in categories}
    if contiguous:
        return {key: (label, names[key]) for label, key in enumerate(sorted(names), 1)}
    for key in names:
        if type(key) is not int or key < 1:
            raise ValueError(
                f"category id {key!r} cannot be a label, because 0 is the background and labels "
                "are numbers: --contiguous_labels numbers the categories from 1"
            )
    return {key: (key, name) for key, name in names.items()}


def _jobs(coco: dict, seed: int) -> tuple[list[tuple[dict, list[dict]]], list[dict]]:
    """Images in mixed order, each with its annotations; and the annotations of no image."""
    of_image, rejected = defaultdict(list), []
    known = {image["id"] for image in coco["images"]}
    for annotation in coco["annotations"]:
        image_id = annotation.get("image_id")
        if image_id in known:
            of_image[image_id].append(annotation)
        else:
            rejection = Rejection("image_id", image_id, "unknown image id")
            rejected.append(rejection.entry(image_id, annotation["id"]))
    return [(image, of_image[image["id"]]) for image in mixed(coco["images"], seed)], rejected


def mixed(values: list, seed: int) -> list:
    """The same values in an order that depends on the seed only."""
    return [values[i] for i in np.random.default_rng(seed).permutation(len(values))]


def convert(
    images_dir: str,
    annotations: str,
    output_prefix: str,
    *,
    num_shards: int,
    masks: bool = True,
    png_masks: bool = True,
    mask_size: int = 112,
    contiguous_labels: bool = False,
    run: Runner = in_processes,
    overwrite: bool = False,
    seed: int = 0,
) -> Summary:
    """Writes `<output_prefix>-*.tfrecord` and `<output_prefix>.json`, the summary.

    Images without annotations are kept, also where the file has none at all. Labels are the
    category ids, or 1, 2, ... in their order with `contiguous_labels`. See `write_shards` for
    restarts, `run` and `overwrite`.

    Args:
      masks: the objects' masks in the frames of their boxes, `mask_size` cells a side, which is
        what `Data.mask_size` of training must be for them to be used.
      png_masks: with them also PNGs of the whole image, for other tools' readers, another
        `Data.mask_size`, and evaluation against the records instead of the JSON.
      Both are off where no annotation has a segmentation.

    Raises:
      FileNotFoundError: no such folder or JSON. FileExistsError: shards made of other inputs.
      ValueError: a JSON that is not COCO's, or ids that cannot be used.
    """
    if f"{output_prefix}.json" == annotations:
        raise ValueError(
            f"--output={output_prefix} would overwrite the annotations: choose another"
        )
    coco, sha256 = load_annotations(annotations, unlabelled=True)
    masks = masks and any(a.get("segmentation") for a in coco["annotations"])
    if not tf.io.gfile.isdir(images_dir):
        raise FileNotFoundError(f"{images_dir}: no such folder")
    labels = label_map(coco["categories"], contiguous_labels)
    jobs, rejected = _jobs(coco, seed)
    settings = Settings(images_dir, labels, masks, masks and png_masks, mask_size)
    options = f"{VERSION} {sha256} {num_shards} {settings[2:]} {contiguous_labels} {seed}"
    fingerprint = hashlib.sha256(options.encode()).hexdigest()
    shards = write_shards(
        output_prefix,
        jobs,
        partial(convert_image, settings),
        num_shards=num_shards,
        fingerprint=fingerprint,
        run=run,
        overwrite=overwrite,
    )
    counts = sum((Counter(shard["counts"]) for shard in shards.values()), Counter())
    rejected += [entry for shard in shards.values() for entry in shard["rejected"]]
    summary = Summary(
        num_examples=counts["examples"],
        num_instances=counts["instances"],
        num_classes=1 + max((label for label, _ in labels.values()), default=0),
        shards={name: shard["counts"].get("examples", 0) for name, shard in shards.items()},
        masks=masks,
        png_masks=settings.png_masks,
        mask_size=mask_size,
        categories=[{"id": k, "name": n, "label": v} for k, (v, n) in sorted(labels.items())],
        rejected=rejected,
        clipped=counts["clipped"],
        reencoded=counts["reencoded"],
        fingerprint=fingerprint,
        source={"images": images_dir, "annotations": annotations},
    )
    write_json(f"{output_prefix}.json", asdict(summary))
    return summary
