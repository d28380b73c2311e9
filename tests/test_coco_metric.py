"""The evaluator against the COCO API's own reference results."""

import json

import numpy as np
import pytest

from spinenet_tf.tasks import coco

# shared/data/coco_eval_reference/README.md
REFERENCE = {
    "bbox": [
        0.504581, 0.696973, 0.572982, 0.585626, 0.519400, 0.501398,
        0.386813, 0.593680, 0.595353, 0.639811, 0.566421, 0.564291,
    ],
    "segm": [
        0.319545, 0.562288, 0.298927, 0.387374, 0.310183, 0.326934,
        0.268230, 0.415449, 0.416839, 0.469450, 0.376759, 0.381472,
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", REFERENCE)
def test_all_24_reference_figures(kind, shared):
    folder = shared / "data/coco_eval_reference"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    figures = coco.evaluate(truth, results, kind)
    assert list(figures) == list(coco.NAMES)
    np.testing.assert_allclose(list(figures.values()), REFERENCE[kind], atol=5e-7)


def batch(ids, boxes, classes, *, scale=1.0):
    """Labels of images that are 100 x 200 pixels in their files, drawn at `scale` on the canvas."""
    n = len(ids)
    boxes = np.asarray(boxes, "f4")
    return {
        "id": np.asarray(ids),
        "image_size": np.tile([int(100 * scale), int(200 * scale)], (n, 1)),
        "source_size": np.tile([100, 200], (n, 1)),
        "boxes": boxes * scale,
        "classes": np.asarray(classes),
        "crowd": np.zeros(np.shape(classes), bool),
        "area": np.prod(boxes[..., 2:] - boxes[..., :2], -1),
    }


def detections(boxes, scores, classes, count):
    return tuple(np.asarray(v) for v in (boxes, scores, classes, count))


BOXES = [[[10, 20, 40, 80], [50, 60, 90, 160]], [[0, 0, 100, 200], [0, 0, 0, 0]]]
CLASSES = [[1, 2], [2, 0]]
PERFECT = detections(BOXES, [[0.9, 0.8], [0.7, 0.0]], CLASSES, [2, 1])


def test_perfect_detections_score_one_whatever_the_canvas():
    for scale in (1.0, 0.5):
        metric = coco.CocoMetric()
        metric.update(batch([7, 9], BOXES, CLASSES, scale=scale), PERFECT)
        assert metric.result()["AP"] == pytest.approx(1.0)


def test_results_are_xywh_with_category_ids():
    metric = coco.CocoMetric(
        [{"id": 18, "label": 1, "name": "dog"}, {"id": 44, "label": 2, "name": "x"}]
    )
    metric.update(batch([7, 9], BOXES, CLASSES), PERFECT)
    assert metric.results[0] == {
        "image_id": 7, "category_id": 18, "bbox": [20, 10, 60, 30], "score": pytest.approx(0.9),
    }  # fmt: skip
    assert [r["category_id"] for r in metric.results] == [18, 44, 44]
    assert metric.result()["AP50"] == pytest.approx(1.0)


def test_padding_rows_are_skipped_and_missed_objects_count():
    metric = coco.CocoMetric()
    metric.update(batch([7, -1], BOXES, CLASSES), PERFECT)
    assert metric.result()["AP"] == pytest.approx(1.0)
    nothing = detections(np.zeros((2, 2, 4)), np.zeros((2, 2)), np.zeros((2, 2), int), [0, 0])
    metric.update(batch([8, -1], BOXES, CLASSES), nothing)
    # Half of each class' objects found, precision 1: the recall points up to 0.5, 51 of 101.
    assert metric.result()["AP"] == pytest.approx(51 / 101)


def test_no_detections_at_all_is_zero_not_an_error():
    metric = coco.CocoMetric()
    nothing = detections(np.zeros((2, 2, 4)), np.zeros((2, 2)), np.zeros((2, 2), int), [0, 0])
    metric.update(batch([7, 9], BOXES, CLASSES), nothing)
    assert metric.result()["AP"] == 0.0


def test_crowds_are_neither_hits_nor_misses():
    labels = batch([7, 9], BOXES, CLASSES)
    labels["crowd"][1, 0] = True
    metric = coco.CocoMetric()
    metric.update(labels, PERFECT)
    assert metric.result()["AP"] == pytest.approx(1.0)


def test_an_image_twice_or_missing_in_the_annotations_is_an_error(tmp_path):
    metric = coco.CocoMetric()
    metric.update(batch([7, 9], BOXES, CLASSES), PERFECT)
    with pytest.raises(ValueError, match="image id 7 comes twice"):
        metric.update(batch([7, -1], BOXES, CLASSES), PERFECT)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [{"id": 7}], "annotations": [], "categories": []}))
    metric = coco.CocoMetric(annotations=str(path))
    metric.update(batch([7, 9], BOXES, CLASSES), PERFECT)
    with pytest.raises(ValueError, match=r"has no image \[9\]"):
        metric.result()
