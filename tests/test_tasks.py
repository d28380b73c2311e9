"""Mask R-CNN and classification from records to a SavedModel, and the classification task."""

import glob
import json
import sys

import gin
import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image
from pycocotools import mask as coco_mask

from spinenet_tf import Classifier, modes
from spinenet_tf.data.pipeline import Data, eval_batches, train_batches
from spinenet_tf.export.predict import predict_files
from spinenet_tf.tasks.classification import Classification, Guesses, TopMetric

RNG = np.random.default_rng(4)
MASKS = "make_task.task = @InstanceSegmentation"
CLASSES = "make_task.task = @Classification"


@pytest.fixture(scope="module")
def class_records(tmp_path_factory):
    return tiny.make_class_records(tmp_path_factory.mktemp("classes"))


def run_all(records, folder, task, image):
    """Trains, predicts an image file and exports; returns figures, results and signatures."""
    tiny.bind(records, task, "Training.steps = 4")
    figures = modes.train_and_eval(f"{folder}/model")
    modes.predict(f"{folder}/model", [image], f"{folder}/pictures")
    modes.export(f"{folder}/model", f"{folder}/saved")
    results = json.loads((folder / "pictures/results.json").read_text())
    return figures, results, tf.saved_model.load(f"{folder}/saved").signatures


@pytest.mark.slow
def test_mask_rcnn_end_to_end(tmp_path):
    records = tiny.make_records(tmp_path)
    image = sorted(glob.glob(f"{tmp_path}/images/train/*.jpg"))[0]
    figures, results, signatures = run_all(
        records, tmp_path, f"{MASKS}\nInstanceSegmentation.score_threshold = 0.0", image
    )
    assert {"AP", "mask_AP"} <= set(figures)
    height, width = np.asarray(Image.open(image)).shape[:2]
    assert np.asarray(Image.open(glob.glob(f"{tmp_path}/pictures/*.png")[0])).shape[:2] == (
        height, width,
    )  # fmt: skip
    outputs = signatures["image_bytes"](tf.constant([open(image, "rb").read()]))
    count = int(outputs["num_detections"][0])
    assert count == len(results) > 0
    assert outputs["detection_masks"].shape[1:] == (100, 28, 28)
    for row, box in zip(results, outputs["detection_boxes"][0].numpy(), strict=False):
        y0, x0, y1, x1 = box
        np.testing.assert_allclose(row["bbox"], [x0, y0, x1 - x0, y1 - y0], atol=0.01)
        mask = coco_mask.decode(row["segmentation"])
        assert mask.shape == (height, width)
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert rows.min() + 0.5 >= y0 - 0.01 and columns.max() + 0.5 <= x1 + 0.01
    saved = json.loads((tmp_path / "model/results_segm.json").read_text())
    assert len(saved) == len(json.loads((tmp_path / "model/results.json").read_text()))


@pytest.mark.slow
def test_classification_end_to_end(class_records, tmp_path):
    image = sorted(glob.glob(f"{class_records.parent}/train/*.jpg"))[0]
    figures, results, signatures = run_all(class_records, tmp_path, CLASSES, image)
    assert set(figures) == {"top1", "top5"}
    assert len(results) == 1 and len(results[0]["scores"]) == 5
    assert results[0]["category_ids"] == [label - 1 for label in results[0]["labels"]]
    encoded = open(image, "rb").read()
    for name, value in (
        ("image_bytes", tf.constant([encoded])),
        ("image_tensor", tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE")[None]),
    ):
        outputs = signatures[name](value)
        assert outputs["classes"][0].numpy().tolist() == results[0]["labels"]
        np.testing.assert_allclose(outputs["scores"][0], results[0]["scores"], atol=1e-5)


def test_evaluation_and_prediction_see_the_same_crop(class_records, tmp_path):
    tiny.bind(class_records, CLASSES)
    task = modes.make_task()
    model = task.build()
    batch = next(iter(eval_batches(Data(), labels="class")))
    found = task.predict(model, batch)
    annotations = json.loads((class_records.parent / "train.json").read_text())
    of_id = {im["id"]: im["file_name"] for im in annotations["images"]}
    path = f"{class_records.parent}/{of_id[int(batch['id'][0])]}"
    results, bad = predict_files(task, model, [path], str(tmp_path), names={}, canvas=64)
    assert not bad and results[0]["labels"] == found.classes[0].numpy().tolist()
    np.testing.assert_allclose(results[0]["scores"], found.scores[0], atol=1e-6)


def test_loss_against_numpy(class_records):
    tiny.bind(class_records, CLASSES, "Classification.label_smoothing = 0.1")
    task = Classification()
    model = task.build()
    batch = next(iter(train_batches(Data(), labels="class")))
    logits = model(task.normalise(batch["image"]), training=False).numpy().astype(float)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    truth = np.full(logits.shape, 0.1 / 21)
    truth[np.arange(4), batch["label"].numpy()] += 0.9
    _, logs = task.loss(model, batch, training=False)
    assert float(logs["class"]) == pytest.approx(-(truth * log_p).sum(1).mean(), rel=1e-4)
    assert float(logs["total"]) == pytest.approx(float(logs["class"] + logs["l2"]), rel=1e-6)


def test_top_accuracy_by_hand():
    metric = TopMetric()
    assert metric.result() == {"top1": -1.0, "top5": -1.0}
    classes = np.array([[3, 1, 2, 4, 5], [1, 3, 2, 4, 5], [1, 2, 4, 5, 6], [3, 1, 2, 4, 5]])
    batch = {"id": np.array([7, 8, 9, -1]), "label": np.array([3, 3, 3, 3])}
    metric.update(batch, Guesses(classes, np.zeros((4, 5))))
    assert metric.result() == {"top1": 1 / 3, "top5": 2 / 3}


def test_bad_settings():
    for kwargs, message in (
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"num_classes": 1}, "num_classes=1"),
    ):
        with pytest.raises(ValueError, match=message):
            Classification(**kwargs)
    with pytest.raises(ValueError, match="set Data.canvas"):
        Classification(image_size=64).normalise(tf.zeros([1, 32, 32, 3], tf.uint8))
    with pytest.raises(ValueError, match="size='51'"):
        Classifier("51")


def test_three_classes_have_three_guesses():
    gin.parse_config("SpineNet.width = 0.125\nSpineNet.endpoints = 8")
    task = Classification(image_size=32, num_classes=4)
    found = task.predict(task.build(), {"image": tf.zeros([2, 32, 32, 3], tf.uint8)})
    assert found.classes.shape == (2, 3)
    assert sorted(found.classes[0].numpy()) == [1, 2, 3]


def test_the_feature_is_the_mean_of_the_cascade():
    """At 224 px rows do not double: P7 has 2, P5 has 7."""
    from spinenet_tf import SpineNet
    from spinenet_tf.models.classifier import average

    backbone = SpineNet("49", width=0.125, endpoints=4, input_shape=(224, 224, 3))
    import keras

    model = keras.Model(
        backbone.input,
        {"P": average(backbone.output, backbone.input), **backbone.output},
    )
    outputs = {k: np.asarray(v) for k, v in model(RNG.normal(size=(1, 224, 224, 3))).items()}
    x = outputs["P7"]
    for level, rows in ((6, 4), (5, 7), (4, 14), (3, 28)):
        index = np.arange(rows) * x.shape[1] // rows
        x = x[:, index][:, :, index] + outputs[f"P{level}"]
    np.testing.assert_allclose(outputs["P"], x / 5, atol=1e-5)


DIFFERENCES_SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from check_saved_model import largest_difference
reference = np.array([[3, 0.9], [5, 0.0201], [9, 0.02]])
for row, expected in (
    ([[3, 0.9], [9, 0.0202], [5, 0.0201]], 0.0002),  # two of nearly one score have changed places
    ([[3, 0.9], [5, 0.0201], [8, 0.02]], 0.02),
    ([[5, 0.9], [3, 0.0201], [9, 0.02]], 0.8799),
):
    assert abs(largest_difference([np.array(row)], [reference]) - expected) < 1e-9
boxes = np.array([[1.0, 2, 3, 4, 0.5]])
assert largest_difference([boxes + [0, 0, 0, 0.25, 0]], [boxes]) == 0.25
assert largest_difference([boxes[:0]], [boxes]) == np.inf
"""


def test_what_differs_between_a_saved_model_and_predict():
    done = tiny.run([sys.executable, "-c", DIFFERENCES_SCRIPT, str(tiny.ROOT / "scripts")])
    assert done.returncode == 0, done.stderr[-2000:]
