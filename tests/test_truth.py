"""The truth read back from records is the COCO file that they were made of."""

import copy
import json

import pytest
import test_pipeline
from pycocotools import mask as coco_mask

from spinenet_tf.data import coco, records, synthetic
from spinenet_tf.data.pipeline import Data
from spinenet_tf.data.truth import coco_truth


def compressed(segmentation, height, width):
    rle = coco_mask.frPyObjects(segmentation, height, width)
    rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
    return {"size": [height, width], "counts": rle["counts"].decode()}


def write_set(folder):
    """20 images, crowds among them, a polygon, fractional boxes; image 9 has no object.

    Two shards; category ids 10, 20, ... 60.
    """
    synthetic.CROWD_RATE, rate = 0.3, synthetic.CROWD_RATE
    try:
        path = synthetic.write_coco(folder, num_images=20, image_size=96)
    finally:
        synthetic.CROWD_RATE = rate
    truth = json.loads(path.read_text())
    for category in truth["categories"]:
        category["id"] *= 10
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] != 9]
    for annotation in truth["annotations"]:
        annotation["category_id"] *= 10
    triangle = truth["annotations"][0]
    triangle["segmentation"] = [[3.5, 4.25, 40.1, 9.0, 22.75, 60.5]]
    triangle["bbox"] = [3.5, 4.25, 36.6, 56.25]
    path.write_text(json.dumps(truth))
    options = dict(num_shards=2, contiguous_labels=True)
    coco.convert(str(folder / "train"), str(path), str(folder / "set"), **options)
    return truth


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    return folder, write_set(folder)


def test_it_is_the_original(original):
    folder, expected = original
    truth = coco_truth(Data(pattern=f"{folder}/set-*"))
    json.dumps(truth)  # nothing but Python's own types
    sizes = {image["id"]: (image["height"], image["width"]) for image in expected["images"]}
    assert {i["id"]: (i["height"], i["width"]) for i in truth["images"]} == sizes
    assert len(truth["images"]) == 20
    names = [{k: c[k] for k in ("id", "name")} for c in expected["categories"]]
    assert truth["categories"] == names
    assert sum(a["iscrowd"] for a in truth["annotations"]) > 0
    found, wanted = (copy.deepcopy(t["annotations"]) for t in (truth, expected))
    assert [a["id"] for a in found] == list(range(1, len(found) + 1))
    for annotation in wanted:
        size = sizes[annotation["image_id"]]
        annotation["segmentation"] = compressed(annotation["segmentation"], *size)

    def key(annotation):
        return json.dumps({k: v for k, v in annotation.items() if k != "id"} | {
            "bbox": [float(v) for v in annotation["bbox"]], "area": float(annotation["area"])
        }, sort_keys=True)  # fmt: skip

    assert sorted(map(key, found)) == sorted(map(key, wanted))


def test_a_label_that_no_sidecar_names_is_its_own_category(original, tmp_path):
    folder, expected = original
    for shard in folder.glob("set-*.tfrecord"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    truth = coco_truth(Data(pattern=f"{tmp_path}/set-*"))
    assert {a["category_id"] for a in truth["annotations"]} <= set(range(1, 7))
    assert all(c["name"] == str(c["id"]) for c in truth["categories"])


def test_no_masks_and_ids_that_come_twice_are_errors(tmp_path):
    objects = [test_pipeline.instance((1, 2, 3, 4))]
    encoded = test_pipeline.png(20, 30)[0]
    bare = records.encode_example(encoded, 20, 30, "x", 77, objects)
    test_pipeline.write(tmp_path / "set-00000-of-00001.tfrecord", [bare])
    with pytest.raises(ValueError, match="image 77 has objects without masks"):
        coco_truth(Data(pattern=f"{tmp_path}/set-*"))
    empty = records.encode_example(encoded, 20, 30, "x", 77, [])
    test_pipeline.write(tmp_path / "set-00000-of-00001.tfrecord", [empty, empty])
    with pytest.raises(ValueError, match="image id 77 comes twice"):
        coco_truth(Data(pattern=f"{tmp_path}/set-*"))


def test_a_record_without_its_size_takes_it_from_the_image(tmp_path):
    record = records.encode_example(test_pipeline.png(20, 30)[0], 0, 0, "x", 5, [])
    test_pipeline.write(tmp_path / "set-00000-of-00001.tfrecord", [record])
    images = coco_truth(Data(pattern=f"{tmp_path}/set-*"))["images"]
    assert images == [{"id": 5, "height": 20, "width": 30}]
