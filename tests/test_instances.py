"""Mask R-CNN as a task: outputs of Model Garden, losses, targets, predictions, the metric."""

import gin
import numpy as np
import parity
import pytest
import tensorflow as tf
import tiny
from test_models import assert_close

from spinenet_tf import MaskRCNN, SpineNet
from spinenet_tf.data.pipeline import Data, eval_batches, train_batches
from spinenet_tf.models.device import varying_shapes
from spinenet_tf.ops import augment, matching, rois
from spinenet_tf.ops import masks as mask_ops
from spinenet_tf.tasks.instances import Instances, InstanceSegmentation

RNG = np.random.default_rng(2)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny.make_records(tmp_path_factory.mktemp("instances"))


def build(records, *extra):
    tiny.bind(records, *extra)
    task = InstanceSegmentation()
    model = task.build()
    parity.randomize(model)
    return task, model


def first_batch(**kwargs):
    return next(iter(train_batches(Data(), labels="masks", **kwargs)))


# --- the model


def test_heads_equal_model_gardens():
    pytest.importorskip("official.vision.modeling.heads.instance_heads")
    from official.vision.modeling.heads.dense_prediction_heads import RPNHead
    from official.vision.modeling.heads.instance_heads import DetectionHead, MaskHead

    backbone = SpineNet("49", width=0.125, endpoints=16, input_shape=(128, 128, 3))
    model = MaskRCNN("49", backbone=backbone, num_classes=5, rpn_convs=2, convs=2, filters=8, fc=12)
    parity.randomize(model)
    image = RNG.normal(size=(2, 128, 128, 3)).astype("f4")
    ours = model.get_layer("rpn")(image)
    features = {k[1:]: v for k, v in ours["features"].items()}
    rpn = RPNHead(3, 7, 3, num_convs=2, num_filters=8)
    rpn(features)
    parity.copy_rpn(model.get_layer("rpn"), rpn, 2)
    scores, boxes = rpn(features)
    for level in features:
        assert_close(ours["score"][f"P{level}"], scores[level])
        assert_close(ours["box"][f"P{level}"], boxes[level])
    cells = RNG.normal(size=(2, 3, 7, 7, 16)).astype("f4")
    head = DetectionHead(5, num_convs=2, num_filters=8, num_fcs=1, fc_dims=12)
    head(cells)
    parity.copy_box_head(model.get_layer("box_head"), head)
    outputs = model.get_layer("box_head")(cells.reshape(6, 7, 7, 16))
    for value, expected in zip((outputs["class"], outputs["box"]), head(cells), strict=True):
        assert_close(tf.reshape(value, expected.shape), expected)
    cells = RNG.normal(size=(2, 3, 14, 14, 16)).astype("f4")
    head = MaskHead(5, num_convs=2, num_filters=8)
    classes = RNG.integers(0, 5, (2, 3))
    head([cells, classes])
    parity.copy_mask_head(model.get_layer("mask_head"), head)
    logits = model.get_layer("mask_head")(cells.reshape(6, 14, 14, 16))
    ours = tf.gather(logits, classes.reshape(6), axis=3, batch_dims=1)
    theirs = head([cells, classes])
    assert_close(tf.reshape(ours, theirs.shape), theirs)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_classes=1"):
        MaskRCNN("49", num_classes=1)
    with pytest.raises(ValueError, match="size='mobile-49'"):
        MaskRCNN("mobile-49")


# --- losses


def test_loss_and_gradients_are_finite_also_without_objects(records):
    task, model = build(records)
    batch = first_batch()
    nothing = batch | {k: tf.zeros_like(batch[k]) for k in ("boxes", "classes", "area", "masks")}
    for rows in (batch, nothing):
        with tf.GradientTape() as tape:
            total, logs = task.loss(model, rows, training=True)
        gradients = tape.gradient(total, [v.value for v in model.trainable_variables])
        assert set(logs) == set(task.log_names) and np.isfinite(float(total))
        assert all(g is not None and np.isfinite(np.asarray(g)).all() for g in gradients)
        parts = sum(float(v) for k, v in logs.items() if k != "total")
        assert float(logs["total"]) == pytest.approx(parts, rel=1e-5)
    assert float(logs["mask"]) == float(logs["box"]) == float(logs["rpn_box"]) == 0


def test_the_first_stages_targets_are_those_of_matched_anchors(records):
    """The loss is 0 where the network says exactly what the sampled anchors should learn."""
    task, _ = build(records)
    batch = first_batch()
    anchors = task.anchors.boxes((64, 64))
    box = anchors[130] + np.array([1.0, -2, 2, 1], "f4")
    boxes = tf.constant(np.tile(box, (4, 12, 1)))
    valid = tf.constant(np.arange(12)[None] == np.zeros((4, 1)))
    from spinenet_tf.ops import boxes as box_ops

    encoded = box_ops.encode(boxes[:, :1], tf.constant(anchors)[None])
    overlap = box_ops.iou(tf.constant(anchors)[None], boxes[:, :1])[..., 0]
    sure = tf.where(overlap >= task.rpn_positive, 50.0, tf.where(overlap < 0.3, -50.0, 3.0))
    places = [8, 4, 2, 1, 1]
    cut = [3 * p * p for p in places]
    rpn = {"score": {}, "box": {}}
    for level, side, s, e in zip(
        range(3, 8), places, tf.split(sure, cut, 1), tf.split(encoded, cut, 1), strict=True
    ):
        rpn["score"][f"P{level}"] = tf.reshape(s, [4, side, side, 3])
        rpn["box"][f"P{level}"] = tf.reshape(e, [4, side, side, 12])
    losses = task.rpn_losses(rpn, boxes, valid, batch["draws"])
    assert float(losses["rpn_box"]) < 1e-8
    best = float(tf.reduce_max(overlap))
    assert best > 0.3  # a match, forced or not
    assert float(losses["rpn_score"]) < (1e-6 if best >= 0.7 else 0.1)


def test_regions_on_objects_have_their_class_and_come_first(records):
    task, _ = build(records)
    batch = first_batch()
    valid = (batch["classes"] > 0) & ~batch["crowd"]
    proposals = tf.constant(RNG.uniform(0, 30, (4, 20, 4)).astype("f4")) + [0, 0, 30, 30]
    scores = tf.ones([4, 20])
    regions = task.sample_regions(proposals, scores, batch["boxes"], valid, batch)
    assert regions.boxes.shape == (4, 16, 4)
    positive = regions.classes.numpy() > 0
    assert positive.any() and (np.diff(positive.astype(int), axis=1) <= 0).all()
    assert (positive.sum(1) <= 4).all()
    from spinenet_tf.ops import boxes as box_ops

    matched = tf.gather(batch["boxes"], regions.object, batch_dims=1)
    overlap = np.stack(
        [np.diag(box_ops.iou(a, b)) for a, b in zip(regions.boxes, matched, strict=True)]
    )
    assert (overlap[positive] >= 0.5).all()
    labels = np.take_along_axis(batch["classes"].numpy(), regions.object.numpy(), 1)
    np.testing.assert_array_equal(regions.classes, np.where(positive, labels, 0))


def test_mask_targets_are_the_objects_pixels(records):
    """A region that is an object's box, and a head that says its mask: no loss."""
    task, model = build(records, "InstanceSegmentation.scale = (1.0, 1.0)")
    batch = first_batch()
    task_loss = task.mask_loss
    from spinenet_tf.tasks import common
    from spinenet_tf.tasks.instances import Regions

    _, view = common.look(batch, 64, augment.Augmentation(64, (1.0, 1.0), True))
    boxes, whole, valid = common.seen_objects(batch, view, 64)
    truth = mask_ops.flip_masks(tf.cast(batch["masks"], tf.float32) / 255.0, view.flip)
    there = np.asarray(valid)[:, :4]
    classes = tf.where(there, batch["classes"][:, :4], 0)
    index = tf.tile(tf.range(4)[None], [4, 1])
    regions = Regions(boxes[:, :4], index, classes, tf.constant(there))
    seen = mask_ops.crop_masks(truth[:, :4], whole[:, :4], boxes[:, :4], 28)

    class Says:
        """A mask head whose logits are the truth."""

        def __call__(self, cells, training):
            logits = tf.where(tf.reshape(seen, [-1, 28, 28]) >= 0.5, 50.0, -50.0)
            return tf.repeat(logits[..., None], 7, -1)

    class Model:
        def get_layer(self, name):
            return {"mask_head": Says()}[name]

    features = {f"P{n}": tf.zeros([4, 64 // 2**n or 1, 64 // 2**n or 1, 2]) for n in range(3, 8)}
    loss = task_loss(Model(), features, regions, truth, whole, False)["mask"]
    assert there.sum() > 4 and float(loss) < 1e-6
    wrong = mask_ops.flip_masks(truth, tf.ones_like(view.flip))
    assert float(task_loss(Model(), features, regions, wrong, whole, False)["mask"]) > 1e-3


# --- predictions


def agree(found, expected, apart: float) -> float:
    """The share of rows of `found` [k, n] that `expected` [m, n] has, to within `apart`."""
    distances = np.abs(np.asarray(found)[:, None] - np.asarray(expected)[None]).max(-1)
    return float((distances.min(1) < apart).mean())


def spread_scores(model):
    """Scores far apart: those of fresh heads are equal to within rounding, which orders them."""
    for layer, times in (("rpn_score", 300), ("box_head_class", 100)):
        kernel = parity.layer_of(model, layer).kernel
        kernel.assign(kernel * times)


def test_static_native_and_xla_predictions_agree(records):
    """XLA stage by stage, from the same input: rounding must not choose other regions for it."""
    task, model = build(records)
    batch = next(iter(eval_batches(Data())))
    spread_scores(model)
    native = task.predict(model, batch, native=True)
    assert native.count.numpy().min() > 0 and native.masks.shape == (4, 100, 28, 28)
    static = task.predict(model, batch)
    np.testing.assert_array_equal(static.count, native.count)
    np.testing.assert_allclose(static.scores, native.scores, atol=1e-5)
    np.testing.assert_allclose(static.boxes, native.boxes, atol=1e-3)
    np.testing.assert_allclose(static.masks, native.masks, atol=1e-4)
    beyond = np.arange(100)[None] >= native.count.numpy()[:, None]
    assert not native.masks.numpy()[beyond].any()
    sizes = tf.fill([4, 2], 64.0)
    images = tf.random.stateless_normal([4, 64, 64, 3], [1, 2])
    rpn = model.get_layer("rpn")(images)
    compiled = tf.function(model.get_layer("rpn"), jit_compile=True, autograph=False)(images)
    tf.nest.map_structure(assert_close, compiled, rpn)
    # A fresh RPN scores all anchors 0.5 to within rounding: drawn ones leave no ties to break.
    draws = np.random.RandomState(4)
    for part, spread in (("score", 2.0), ("box", 0.3)):
        for name, value in rpn[part].items():
            rpn[part][name] = tf.constant(draws.normal(0, spread, value.shape), tf.float32)
    proposals, scores = task.propose(rpn, sizes)
    found = task.detect(model, rpn["features"], proposals, scores, sizes, native=False)
    compiled = tf.function(task.propose, jit_compile=True, autograph=False)(rpn, sizes)
    for i in range(4):
        assert agree(compiled[0][i], proposals[i], 1e-3) > 0.9

    @tf.function(jit_compile=True, autograph=False)
    def second_stage():
        boxes = task.detect(model, rpn["features"], proposals, scores, sizes, native=False)
        return boxes, task._mask_head(model, rpn["features"], found.boxes, found.classes, False)

    boxes, masks = second_stage()
    for i in range(4):
        rows = (
            np.c_[v.boxes[i], 100 * np.asarray(v.scores[i]), 1e3 * np.asarray(v.classes[i])]
            for v in (boxes, found)
        )
        assert agree(*rows, 0.01) > 0.9
    assert_close(masks, task._mask_head(model, rpn["features"], found.boxes, found.classes, False))
    whole = tf.function(lambda b: task.predict(model, b), jit_compile=True, autograph=False)(batch)
    assert [part.shape for part in whole] == [part.shape for part in native]
    assert all(np.isfinite(part).all() for part in whole)


def test_loss_compiles_with_xla(records):
    task, model = build(records, "Style.stochastic_depth = 0.0")
    batch = first_batch()
    eager = task.loss(model, batch, training=False)[1]
    compiled = tf.function(
        lambda b: task.loss(model, b, training=False)[1], jit_compile=True, autograph=False
    )(batch)
    for name in ("rpn_score", "rpn_box", "l2"):
        assert float(compiled[name]) == pytest.approx(float(eager[name]), rel=1e-3)
    # Scores that differ in the last digit may choose another region for the second stage.
    for name in ("class", "box", "mask"):
        assert np.isfinite(float(compiled[name])) and float(compiled[name]) > 0


def test_without_its_padding_a_batch_has_the_same_loss(records, monkeypatch):
    task, model = build(records, "Style.stochastic_depth = 0.0")
    batch, losses, seen, match = first_batch(), [], [], matching.match

    def spy(overlap, *args):
        seen.append(overlap.shape[-1])
        return match(overlap, *args)

    monkeypatch.setattr(matching, "match", spy)
    for allowed in (False, True):
        with varying_shapes(allowed):
            losses.append(task.loss(model, batch, training=False)[1])
    for name, value in losses[0].items():
        assert float(losses[1][name]) == pytest.approx(float(value), rel=1e-6), name
    assert seen[0] == 12 > seen[1] >= 1


# --- the metric


def test_the_metric_of_perfect_masks_and_of_shifted_ones(records):
    """Ground truth from the records; 28x28 masks in box frames lose little."""
    task, _ = build(records, "Data.mask_size = 28")
    data = Data()
    figures = {}
    for name, shift in (("perfect", 0.0), ("shifted", 6.0)):
        metric = task.metric(data)
        for batch, rows in zip(eval_batches(data), eval_batches(data, labels="masks"), strict=True):
            scale = np.tile(batch["source_size"] / batch["image_size"], 2)[:, None]
            real = (batch["classes"].numpy() > 0) & ~batch["crowd"].numpy()
            order = np.argsort(~real, axis=1, kind="stable")
            boxes = np.take_along_axis(batch["boxes"].numpy() * scale, order[..., None], 1)
            truth = np.take_along_axis(rows["masks"].numpy(), order[..., None, None], 1) / 255.0
            found = Instances(
                boxes.astype("f4") + np.float32(shift), real.astype("f4") * 0.9,
                np.take_along_axis(batch["classes"].numpy(), order, 1), real.sum(1), truth,
            )  # fmt: skip
            metric.update(batch, found)
        figures[name] = metric.result()
    assert figures["perfect"]["AP"] > 0.99
    assert figures["perfect"]["mask_AP"] > 0.9
    assert figures["shifted"]["mask_AP"] < 0.5


def test_roi_align_is_what_the_heads_are_fed(records):
    task, model = build(records)
    features = {f"P{n}": tf.zeros([1, 8, 8, 8]) for n in range(3, 8)}
    logits, boxes = task._box_head(model, features, tf.zeros([1, 5, 4]), False)
    assert logits.shape == (1, 5, 7) and boxes.shape == (1, 5, 7, 4)
    assert rois.roi_align(features, tf.zeros([1, 5, 4]), 14).shape == (1, 5, 14, 14, 8)


def test_levels_of_anchors_and_backbone_must_agree(records):
    tiny.bind(records, "Anchors.levels = (3, 4, 5)")
    with pytest.raises(ValueError, match="P6"):
        InstanceSegmentation().build()
    gin.clear_config()
