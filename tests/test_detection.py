"""The detection task: its loss by hand, Model Garden's labels, edge cases, XLA."""

import contextlib

import gin
import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from spinenet_tf.models.device import for_tpu, shapes_may_vary, varying_shapes
from spinenet_tf.ops import augment, matching
from spinenet_tf.ops import boxes as box_ops
from spinenet_tf.ops.anchors import Anchors
from spinenet_tf.tasks import common
from spinenet_tf.tasks.detection import Detection
from spinenet_tf.train.trainer import Run, Training

SIZE, BOXES = 64, 100
RNG = np.random.default_rng(0)


def build(*bindings):
    """The tiny task and its model, with predictions that depend on the image and scores to see."""
    gin.clear_config()
    gin.parse_config([*tiny.BINDINGS, *bindings])
    keras.utils.set_random_seed(1)  # with 0, tf.data cannot shuffle
    task = Detection()
    model = task.build()
    gin.clear_config()
    for name in ("class_predict", "box_predict"):
        kernel = model.get_layer(name).kernel
        kernel.assign(RNG.normal(0, 0.3, kernel.shape))
    bias = model.get_layer("class_predict").bias
    bias.assign(0.5 * bias)
    return task, model


@pytest.fixture(scope="module")
def detector():
    return build()


def batch_of(images, size=(64, 64)):
    """[(boxes, classes, crowd)] -> a batch; boxes yxyx."""
    b = len(images)
    batch = {
        "image": RNG.integers(0, 256, (b, SIZE, SIZE, 3), np.uint8),
        "image_size": np.tile(np.int32(size), (b, 1)),
        "source_size": np.tile(np.int32(size), (b, 1)),
        "boxes": np.zeros((b, BOXES, 4), "f4"), "classes": np.zeros((b, BOXES), "i4"),
        "crowd": np.zeros((b, BOXES), bool), "draws": RNG.random((b, 4)).astype("f4"),
    }  # fmt: skip
    for i, (boxes, classes, crowd) in enumerate(images):
        n = len(classes)
        batch["boxes"][i, :n], batch["classes"][i, :n], batch["crowd"][i, :n] = (
            boxes,
            classes,
            crowd,
        )
    return {k: tf.constant(v) for k, v in batch.items()}


def full_image():
    corner = RNG.uniform(0, 40, (BOXES, 2))
    return np.concatenate([corner, corner + RNG.uniform(1, 24, (BOXES, 2))], 1)


EMPTY = (np.zeros((0, 4)), [], [])
IMAGES = {
    "empty": EMPTY,
    "all crowd": ([[5, 5, 40, 40], [0, 0, 9, 9]], [1, 2], [True, True]),
    "border": ([[0, 0, 64, 64], [60, 60, 64, 64], [0, 30, 2, 64]], [1, 2, 3], [False] * 3),
    "one pixel": ([[31, 31, 32, 32]], [6], [False]),
    "no area": ([[10, 10, 10, 30]], [6], [False]),
    "full": (full_image(), RNG.integers(1, 7, BOXES), [False] * BOXES),
}


def gradients(task, model, batch):
    with tf.GradientTape() as tape:
        total, logs = task.loss(model, batch, training=True)
    return logs, tape.gradient(total, [v.value for v in model.trainable_variables])


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("size", [(64, 64), (64, 23), (1, 64)])
def test_loss_and_gradients_are_finite(detector, name, size):
    task, model = detector
    logs, grads = gradients(task, model, batch_of([IMAGES[name]] * 2, size))
    assert all(np.isfinite(v) for v in logs.values())
    assert all(np.isfinite(g).all() for g in grads)
    if name in ("empty", "all crowd", "no area"):
        assert logs["box"] == 0


def test_the_loss_by_hand(detector):
    """From the model's outputs: focal and Huber sums over positives + 1, box weight 50, decay."""
    task, model = detector
    batch = batch_of([IMAGES["border"], IMAGES["one pixel"], EMPTY])
    total, logs = task.loss(model, batch, training=False)
    view = augment.fit_view(batch["image_size"], SIZE)
    images = augment.view_images(batch["image"], batch["image_size"], view, SIZE)
    logits, deltas = (v.numpy().astype(float) for v in task.flatten(model(images)))
    boxes, _, valid = common.seen_objects(batch, view, SIZE)
    targets = [v.numpy() for v in task.targets(boxes, batch["classes"], valid)]
    positives, p = targets[2].sum(), 1 / (1 + np.exp(-logits))
    assert positives >= 4
    focal = -0.75 * p**1.5 * np.log(1 - p)
    for i, a in zip(*np.nonzero(targets[2]), strict=True):
        k = targets[0][i, a]
        focal[i, a, k] = -0.25 * (1 - p[i, a, k]) ** 1.5 * np.log(p[i, a, k])
    matched = tf.gather(boxes, targets[1], batch_dims=1)
    encoded = box_ops.encode(matched, task.anchors.boxes((SIZE, SIZE)))
    error = np.abs(deltas - encoded)[targets[2]]
    huber = np.where(error <= 0.1, error**2 / 2, 0.1 * (error - 0.05))
    decay = (
        4e-5
        / 2
        * sum((v.numpy() ** 2).sum() for v in model.trainable_variables if v.name == "kernel")
    )
    assert float(logs["class"]) == pytest.approx(focal.sum() / (positives + 1), rel=1e-4)
    assert float(logs["box"]) == pytest.approx(huber.sum() / 4 / (positives + 1), rel=1e-4)
    assert float(logs["l2"]) == pytest.approx(decay, rel=1e-4)
    parts = {k: float(v) for k, v in logs.items()}
    expected = parts["class"] + 50 * parts["box"] + parts["l2"]
    assert float(total) == parts["total"] == pytest.approx(expected, rel=1e-5)


def test_the_background_channel_never_has_a_positive(detector):
    task, model = detector
    batch = batch_of([IMAGES["full"]])
    view = augment.fit_view(tf.constant([[64, 64]]), SIZE)
    boxes, _, valid = common.seen_objects(batch, view, SIZE)
    targets = task.targets(boxes, batch["classes"], valid)
    outputs = tf.nest.map_structure(tf.zeros_like, model(tf.zeros([1, SIZE, SIZE, 3])))
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        loss = task.losses(outputs, targets, boxes)["class"]
    gradient, _ = task.flatten(tape.gradient(loss, outputs, unconnected_gradients="zero"))
    assert (gradient[..., 0] > 0).numpy().all()  # always pushed down
    assert (gradient[..., 1:] < 0).numpy().any()


def test_targets_equal_model_gardens():
    anchor_ops = pytest.importorskip("official.vision.ops.anchor")
    boxes, classes = full_image().astype("f4"), RNG.integers(1, 7, (BOXES, 1)).astype("i4")
    theirs = anchor_ops.Anchor(3, 7, 3, [0.5, 1.0, 2.0], 3.0, (128, 128)).multilevel_boxes
    labels, deltas, _, _, weights = anchor_ops.AnchorLabeler().label_anchors(theirs, boxes, classes)
    anchors = Anchors(size=3.0, aspect_ratios=(0.5, 1.0, 2.0)).boxes((128, 128))
    np.testing.assert_allclose(
        anchors, np.concatenate([np.reshape(v, (-1, 4)) for v in theirs.values()]), atol=1e-4
    )
    ours = matching.anchor_targets(
        tf.constant(anchors), boxes[None], classes[None, :, 0], tf.ones([1, BOXES], tf.bool), 0.5
    )
    flat_labels = np.concatenate([np.reshape(v, -1) for v in labels.values()])  # -1: background
    np.testing.assert_array_equal(ours.positive[0], weights > 0)
    np.testing.assert_array_equal(ours.classes[0], np.maximum(flat_labels, 0))
    flat_deltas = np.concatenate([np.reshape(v, (-1, 4)) for v in deltas.values()])
    positive = ours.positive[0].numpy()
    deltas = matching.box_targets(boxes[None], ours.object[..., None], anchors[:, None])
    np.testing.assert_allclose(deltas[0][positive], flat_deltas[positive], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [[EMPTY], [IMAGES["full"]], [IMAGES["border"], EMPTY]])
def test_without_its_padding_a_batch_has_the_same_loss(detector, rows, monkeypatch):
    task, model = detector
    batch, seen, match = batch_of(rows), [], matching.match
    batch["classes"] = tf.concat([batch["classes"][:, :20], batch["classes"][:, 20:] * 0], 1)

    def spy(overlap, *args):
        seen.append(overlap.shape[-1])
        return match(overlap, *args)

    monkeypatch.setattr(matching, "match", spy)
    losses = []
    for allowed in (False, True):
        with varying_shapes(allowed):
            losses.append(task.loss(model, batch, training=False)[1])
    for name, value in losses[0].items():
        assert float(losses[1][name]) == pytest.approx(float(value), rel=1e-6), name
    real = tf.where(batch["classes"] > 0, tf.range(1, BOXES + 1), 1)
    assert seen[0] == BOXES and 1 <= seen[1] <= tf.reduce_max(real)


@pytest.mark.parametrize(
    ("xla", "context", "varying"),
    [(False, contextlib.nullcontext, True), (True, contextlib.nullcontext, False)]
    + [(False, for_tpu, False)],
)
def test_shapes_vary_where_no_xla_compiles_the_step(xla, context, varying, tmp_path, monkeypatch):
    gin.parse_config(tiny.BINDINGS)
    with context():
        run = Run(
            Detection(), Training(precision="float32", xla=xla, deterministic=False), str(tmp_path)
        )
    seen, loss = [], Detection.loss

    def spy(*args, **kwargs):
        seen.append(shapes_may_vary())
        return loss(*args, **kwargs)

    monkeypatch.setattr(Detection, "loss", spy)
    run.replica_step(batch_of([IMAGES["full"]]), tf.constant(0.0), 10)
    assert seen == [varying] and not shapes_may_vary()


@pytest.fixture(scope="module")
def sure(detector):
    """Detections of a model whose scores pass the threshold."""
    task, model = detector
    batch = batch_of([EMPTY, EMPTY, EMPTY], (40, 64))
    batch["source_size"] = tf.constant([[400, 640], [40, 64], [20, 32]])
    return task, model, batch, task.predict(model, batch, native=True)


def test_static_native_and_xla_predictions_agree(sure):
    task, model, batch, native = sure
    assert native.count.numpy().min() > 0

    @tf.function(jit_compile=True, autograph=False)
    def compiled(batch):
        return task.predict(model, batch)

    for other in (task.predict(model, batch), compiled(batch)):
        np.testing.assert_array_equal(other.count, native.count)
        np.testing.assert_array_equal(other.classes, native.classes)
        np.testing.assert_allclose(other.scores, native.scores, atol=1e-5)
        np.testing.assert_allclose(other.boxes, native.boxes, atol=0.05)


def test_boxes_are_in_source_pixels_and_inside_the_image(sure):
    _, _, batch, found = sure
    assert (found.boxes.numpy() >= 0).all()
    limits = np.tile(batch["source_size"].numpy(), 2)[:, None] + 1e-3
    assert (found.boxes.numpy() <= limits).all()
    assert found.boxes[0].numpy().max() > 64


def test_loss_and_gradients_compile_with_xla():
    # Without stochastic depth: XLA draws other numbers. In float64: in float32, rounding turns
    # some ReLUs, and batch norm over two values, as in P7 here, makes much of it.
    keras.config.set_dtype_policy("float64")
    task, model = build("Style.stochastic_depth = 0.0")
    batch = batch_of([IMAGES["border"], EMPTY])
    state = [v.numpy() for v in model.variables]
    compiled = tf.function(lambda b: gradients(task, model, b), jit_compile=True, autograph=False)
    results = []
    for step in (gradients, lambda t, m, b: compiled(b)):
        for variable, value in zip(model.variables, state, strict=True):
            variable.assign(value)
        results.append(step(task, model, batch))
    for name, value in results[0][0].items():
        assert float(results[1][0][name]) == pytest.approx(float(value), rel=1e-5)
    eager, xla = (np.concatenate([np.ravel(g) for g in r[1]]) for r in results)
    assert np.linalg.norm(eager - xla) < 1e-3 * np.linalg.norm(eager)
