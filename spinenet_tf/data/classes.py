"""Classified images to TFRecord shards: class folders (ImageNet) or a JSON (iNaturalist 2017).

Checked, restartable and parallel as `data/coco.py`. Labels are numbered from 1, as 0 is the
background: in the order of the class folders' names, or of the category ids.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import tensorflow as tf

from spinenet_tf.data import coco
from spinenet_tf.data.records import encode_class_example
from spinenet_tf.data.shards import (
    Converted,
    Rejection,
    Runner,
    in_processes,
    write_json,
    write_shards,
)

VERSION = 1
ENLARGED = 1.5  # sides of a crop relative to its box's (section 5.6)


class Job(NamedTuple):
    """One example to be."""

    file_name: str  # under the images' folder
    image_id: int
    label: int
    name: str
    annotation_id: int | None = None
    crop: tuple[int, int, int, int] | None = None  # xmin, ymin, xmax, ymax; None: the whole image
    size: tuple[int, int] | None = None  # width and height, which a crop relies on


@dataclass(frozen=True)
class Summary:
    """A finished set of shards: what `<prefix>.json` holds."""

    num_examples: int
    num_classes: int  # the highest label + 1, for the background
    used_classes: int  # how many of the categories have an image
    shards: dict[str, int]  # file name -> examples
    bbox_crops: bool
    categories: list[dict]  # id, name, label; those without images too
    rejected: list[dict]  # as in `coco.Summary`
    reencoded: int  # whole images that were neither JPEG nor PNG of a plain kind
    fingerprint: str
    source: dict[str, str]  # images, annotations, classes
    version: int = VERSION


def convert_image(images_dir: str, job: Job) -> Converted:
    """One image, or a crop of it, to a serialized example."""
    try:
        encoded, picture = coco.load_picture(images_dir, job.file_name)
        if job.crop:
            coco.check_size(picture, dict(zip(("width", "height"), job.size, strict=True)))
            picture, made = picture.crop(job.crop), False
            encoded = coco.to_jpeg(picture)
        else:
            encoded, made = coco.storable(encoded, picture)
    except Rejection as rejection:
        entry = rejection.entry(job.image_id, job.annotation_id)
        return Converted(None, Counter(rejected_images=1), [entry])
    number = job.image_id if job.annotation_id is None else job.annotation_id
    size = picture.height, picture.width
    example = encode_class_example(encoded, *size, job.file_name, number, job.label, job.name)
    return Converted(example, Counter(examples=1, reencoded=made), [])


def crop_of(box: object, height: int, width: int) -> tuple[int, int, int, int]:
    """The pixels of an [xmin, ymin, width, height] box enlarged about its centre, in the image.

    Returns:
      xmin, ymin, xmax, ymax; a pixel that is partly covered belongs to it.

    Raises:
      Rejection: no four finite numbers, an empty box, or one outside of the image.
    """
    coco.clip_box(box, height, width)
    x, y, w, h = box
    margin_x, margin_y = (ENLARGED - 1) / 2 * w, (ENLARGED - 1) / 2 * h
    low = max(math.floor(x - margin_x), 0), max(math.floor(y - margin_y), 0)
    return *low, min(math.ceil(x + w + margin_x), width), min(math.ceil(y + h + margin_y), height)


def _names(folder: str) -> list[str]:
    # Folders end in "/" on some file systems.
    return sorted(n.rstrip("/") for n in tf.io.gfile.listdir(folder) if not n.startswith("."))


def _folders(images_dir: str, classes: str) -> tuple[list[str], list[dict]]:
    """The class folders in the order of their labels, and an entry for each that is left out."""
    folders = [n for n in _names(images_dir) if tf.io.gfile.isdir(os.path.join(images_dir, n))]
    if not folders:
        raise ValueError(f"{images_dir} has no subfolders: one a class is needed, or --annotations")
    if not classes:
        return folders, []
    with tf.io.gfile.GFile(classes) as file:
        listed = [line.strip() for line in file.read().splitlines() if line.strip()]
    for wrong, reason in (
        ([n for n, count in Counter(listed).items() if count > 1], "comes twice"),
        (sorted(set(listed) - set(folders)), f"is no subfolder of {images_dir}"),
    ):
        if wrong:
            raise ValueError(f"--classes={classes}: {wrong[0]!r} {reason} ({len(wrong)} such)")
    unlisted = Rejection("classes", "", f"a class folder that {classes} does not list")
    return listed, [unlisted.entry(n) for n in sorted(set(folders) - set(listed))]


def _folder_jobs(images_dir: str, folders: list[str]) -> list[Job]:
    images = [(f, f"{f}/{n}") for f in sorted(folders) for n in _names(f"{images_dir}/{f}")]
    labels = {folder: label for label, folder in enumerate(folders, 1)}
    return [Job(path, i, labels[f], f) for i, (f, path) in enumerate(images, 1)]


def _image_jobs(
    images: dict[int, dict], of_image: dict[int, list[dict]], labels: dict[int, tuple[int, str]]
) -> Iterator[Job | dict]:
    """A job, or the entry of a rejection, for each image."""
    for key, image in images.items():
        categories = sorted({a.get("category_id") for a in of_image[key]}, key=str)
        if len(categories) != 1:
            reason = "has several classes" if categories else "has no annotation, so no class"
            yield Rejection("category_id", categories, f"the image {reason}").entry(key)
        elif categories[0] not in labels:
            yield Rejection("category_id", categories[0], "unknown category id").entry(key)
        else:
            yield Job(str(image.get("file_name")), key, *labels[categories[0]])


def _crop_jobs(
    images: dict[int, dict], of_image: dict[int, list[dict]], labels: dict[int, tuple[int, str]]
) -> Iterator[Job | dict]:
    """A job, or the entry of a rejection, for each annotation that has a box."""
    for key, image in images.items():
        for annotation in of_image[key]:
            if "bbox" not in annotation:
                continue
            category, size = (
                annotation.get("category_id"),
                (image.get("width"), image.get("height")),
            )
            try:
                if category not in labels:
                    raise Rejection("category_id", category, "unknown category id")
                if not all(type(side) is int and side > 0 for side in size):
                    raise Rejection("width, height", size, "not two positive whole numbers")
                crop = crop_of(annotation["bbox"], size[1], size[0])
            except Rejection as rejection:
                yield rejection.entry(key, annotation["id"])
            else:
                name = str(image.get("file_name"))
                yield Job(name, key, *labels[category], annotation["id"], crop, size)


def _annotated_jobs(
    path: str, bbox_crops: bool
) -> tuple[list[Job], list[dict], dict[int, tuple[int, str]]]:
    """Jobs, rejections and the label and name of each category id."""
    coco_like, _ = coco.load_annotations(path)
    labels = coco.label_map(coco_like["categories"], contiguous=True)
    images, of_image = {image["id"]: image for image in coco_like["images"]}, defaultdict(list)
    for annotation in coco_like["annotations"]:
        of_image[annotation.get("image_id")].append(annotation)
    rejected = [
        Rejection("image_id", key, "unknown image id").entry(key, annotation["id"])
        for key in of_image.keys() - images.keys()
        for annotation in of_image[key]
    ]
    entries = list((_crop_jobs if bbox_crops else _image_jobs)(images, of_image, labels))
    rejected += [entry for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry, Job)], rejected, labels


def _check(images_dir: str, output_prefix: str, annotations: str, classes: str, crops: bool):
    if not tf.io.gfile.isdir(images_dir):
        raise FileNotFoundError(f"{images_dir}: no such folder")
    if annotations and classes:
        raise ValueError("--classes orders class folders; --annotations have an order of their own")
    if crops and not annotations:
        raise ValueError("--bbox_crops needs --annotations, which have the boxes")
    if annotations == f"{output_prefix}.json":
        raise ValueError(f"--output={output_prefix} would overwrite the annotations")


def convert(
    images_dir: str,
    output_prefix: str,
    *,
    annotations: str = "",
    classes: str = "",
    bbox_crops: bool = False,
    num_shards: int,
    run: Runner = in_processes,
    overwrite: bool = False,
    seed: int = 0,
) -> Summary:
    """Writes `<output_prefix>-*.tfrecord` and `<output_prefix>.json`, the summary.

    Args:
      images_dir: folder of the images: with one subfolder a class, unless there are `annotations`.
      annotations: JSON in COCO's form whose images have one category each (iNaturalist 2017).
      classes: file that lists the class folders, one a line, in the order of their labels; without
        it the order is that of their names.
      bbox_crops: one example for each annotation that has a `bbox`: the box, enlarged 1.5 times
        about its centre and clipped, encoded as a new JPEG (iNaturalist-bbox of section 5.6).
        Labels are numbered as without crops, so classes without a box leave gaps.

    See `write_shards` for restarts, `run` and `overwrite`.

    Raises:
      FileNotFoundError: no such folder or JSON.
      ValueError: options that contradict each other, or a JSON or list that makes no sense.
    """
    _check(images_dir, output_prefix, annotations, classes, bbox_crops)
    if annotations:
        jobs, rejected, labels = _annotated_jobs(annotations, bbox_crops)
    else:
        folders, rejected = _folders(images_dir, classes)
        jobs = _folder_jobs(images_dir, folders)
        labels = {label: (label, name) for label, name in enumerate(folders, 1)}
    if not jobs:
        raise ValueError(f"no image to convert in {annotations or images_dir}: {rejected[:3]}")
    options = f"{VERSION} {num_shards} {seed} {sorted(labels.items())} {jobs}"
    fingerprint = hashlib.sha256(options.encode()).hexdigest()
    shards = write_shards(
        output_prefix,
        coco.mixed(jobs, seed),
        partial(convert_image, images_dir),
        num_shards=num_shards,
        fingerprint=fingerprint,
        run=run,
        overwrite=overwrite,
    )
    counts = sum((Counter(shard["counts"]) for shard in shards.values()), Counter())
    summary = Summary(
        num_examples=counts["examples"],
        num_classes=1 + len(labels),
        used_classes=len({job.label for job in jobs}),
        shards={name: shard["counts"].get("examples", 0) for name, shard in shards.items()},
        bbox_crops=bbox_crops,
        categories=[{"id": k, "name": n, "label": v} for k, (v, n) in sorted(labels.items())],
        rejected=rejected + [entry for shard in shards.values() for entry in shard["rejected"]],
        reencoded=counts["reencoded"],
        fingerprint=fingerprint,
        source={"images": images_dir, "annotations": annotations, "classes": classes},
    )
    write_json(f"{output_prefix}.json", asdict(summary))
    return summary
