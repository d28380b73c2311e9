"""The synthetic set: determinism, annotations that fit the pixels, the promised variety."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from spinenet_tf.data import synthetic


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    paths = {
        split: synthetic.write_coco(folder, num_images=150, seed=3, image_size=256, split=split)
        for split in ("train", "val")
    }
    return folder, {split: json.loads(path.read_text()) for split, path in paths.items()}


def test_same_seed_same_bytes(written, tmp_path):
    folder, sets = written
    # Other images before or after make no difference: an image depends on its id only.
    path = synthetic.write_coco(tmp_path, num_images=3, seed=3, image_size=256, first_id=5)
    for image in json.loads(path.read_text())["images"]:
        assert image in sets["train"]["images"]
        name = f"train/{image['file_name']}"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_seeds_and_splits_differ(written):
    folder, _ = written
    name = "000000000001.jpg"
    assert (folder / "train" / name).read_bytes() != (folder / "val" / name).read_bytes()
    first, second = (synthetic.render(seed, size=(64, 80))[0] for seed in (1, 2))
    assert np.any(first != second)


def test_boxes_and_areas_are_those_of_the_masks(written):
    sizes = {image["id"]: image for image in written[1]["train"]["images"]}
    for annotation in written[1]["train"]["annotations"]:
        size = [sizes[annotation["image_id"]][side] for side in ("height", "width")]
        assert annotation["segmentation"]["size"] == size
        rle = coco_mask.frPyObjects(annotation["segmentation"], *size)
        assert coco_mask.toBbox(rle).tolist() == annotation["bbox"]
        assert coco_mask.area(rle) == annotation["area"]


def test_variety(written):
    for coco in written[1].values():
        plain = [a for a in coco["annotations"] if not a["iscrowd"]]
        sides = [max(a["bbox"][2:]) for a in plain]
        assert min(sides) >= 8 and max(sides) <= 200
        assert min(sides) < 12 and max(sides) > 100
        assert {a["category_id"] for a in plain} == set(range(1, 7))
        per_image = np.bincount([a["image_id"] for a in plain], minlength=151)[1:]
        assert per_image.min() >= 1 and per_image.max() == 8
        ids = [a["id"] for a in coco["annotations"]]
        assert len(set(ids)) == len(ids)


def test_images_are_as_stated(written):
    folder, sets = written
    for image in sets["val"]["images"]:
        with Image.open(folder / "val" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) and picture.mode == "RGB"
        assert max(picture.size) == 256 and min(picture.size) >= round(0.7 * 256)


def test_masks_do_not_overlap_and_objects_stand_out():
    contrasts = []
    for seed in range(20):
        image, objects = synthetic.render(seed, size=(192, 256))
        assert np.sum([o.mask for o in objects], 0).max() <= 1
        free = ~np.any([o.mask for o in objects], 0)
        for each in objects:
            contrasts.append(np.linalg.norm(image[each.mask].mean(0) - image[free].mean(0)))
    assert np.median(contrasts) > 80


def test_some_images_have_a_crowd(written):
    crowds = [a for coco in written[1].values() for a in coco["annotations"] if a["iscrowd"]]
    assert 1 <= len(crowds) <= 20
    assert all(a["area"] < a["bbox"][2] * a["bbox"][3] for a in crowds)


@pytest.mark.parametrize("size", [(32, 32), (33, 57)])
def test_tiny_images(size):
    image, objects = synthetic.render(0, size=size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert objects and all(o.mask.shape == size for o in objects)
