"""Detection mathematics against NumPy written from the definitions, one box at a time."""

import functools
import math

import numpy as np
import pytest
import tensorflow as tf

from spinenet_tf.ops import boxes as box_ops
from spinenet_tf.ops import losses, matching, nms
from spinenet_tf.ops.anchors import Anchors

RNG = np.random.default_rng(0)


def random_boxes(*shape, size=100.0):
    corner = RNG.uniform(0, size, (*shape, 2))
    return np.concatenate([corner, corner + RNG.uniform(0, size / 2, (*shape, 2))], -1).astype("f4")


def np_iou(a, b):
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    if height <= 0 or width <= 0:
        return 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return height * width / (both - height * width)


def np_encode(box, anchor):
    h, w = anchor[2] - anchor[0], anchor[3] - anchor[1]
    bh, bw = max(box[2] - box[0], 1e-8), max(box[3] - box[1], 1e-8)
    cy, cx = (
        (box[0] + box[2] - anchor[0] - anchor[2]) / 2,
        (box[1] + box[3] - anchor[1] - anchor[3]) / 2,
    )
    return [cy / h, cx / w, math.log(bh / h), math.log(bw / w)]


# --- boxes


def test_iou_of_hand_made_boxes():
    a = tf.constant([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    b = tf.constant([[0.0, 0, 10, 10], [0, 5, 10, 15], [20, 20, 30, 30], [5, 5, 5, 5]])
    # Half of 10x10 shared: 50 / (100 + 100 - 50). An empty box overlaps nothing, not even itself.
    np.testing.assert_allclose(box_ops.iou(a, b), [[1, 1 / 3, 0, 0], [0, 0, 0, 0]], atol=1e-7)


def test_iou_against_numpy():
    a, b = random_boxes(20), random_boxes(30)
    expected = [[np_iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(box_ops.iou(a, b), expected, atol=1e-6)


def test_encode_against_numpy_and_decode_is_its_inverse():
    anchors, boxes = random_boxes(50) + [0, 0, 1, 1], random_boxes(50) + [0, 0, 1, 1]
    targets = box_ops.encode(boxes, anchors)
    expected = [np_encode(b, a) for b, a in zip(boxes, anchors, strict=True)]
    np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(box_ops.decode(targets, anchors), boxes, rtol=1e-4, atol=1e-3)


def test_decode_cannot_explode_and_an_empty_box_encodes_finitely():
    anchor = tf.constant([[0.0, 0, 16, 16]])
    huge = box_ops.decode(tf.constant([[0.0, 0, 1e9, 1e9]]), anchor)
    np.testing.assert_allclose(huge, [[-492, -492, 508, 508]], rtol=1e-5)  # 16 * 1000 / 16
    assert np.isfinite(box_ops.encode(tf.constant([[3.0, 3, 3, 3]]), anchor)).all()


def test_clip():
    boxes = tf.constant([[[-5.0, 2, 20, 30]]])
    np.testing.assert_array_equal(
        box_ops.clip(boxes, tf.constant([[10.0, 12.0]])), [[[0, 2, 10, 12]]]
    )


# --- anchors


def test_anchors_at_level_3_by_hand():
    """Level 3: stride 8, the first centre at (4, 4). Size 3 * 8 = 24, then 24 * 2**(1/3) = 30.24.

    Ratio 2 is twice as wide as high: 24 / sqrt(2) = 16.97 high, 33.94 wide; ratio 0.5 the reverse.
    """
    first = Anchors(size=3).boxes((64, 64))[:4]
    expected = [
        [4 - 12, 4 - 12, 4 + 12, 4 + 12],
        [4 - 8.485, 4 - 16.971, 4 + 8.485, 4 + 16.971],
        [4 - 16.971, 4 - 8.485, 4 + 16.971, 4 + 8.485],
        [4 - 15.119, 4 - 15.119, 4 + 15.119, 4 + 15.119],
    ]
    np.testing.assert_allclose(first, expected, atol=1e-3)


def test_number_and_order_of_anchors():
    assert len(Anchors().boxes((640, 640))) == 76_725  # 9 * (80**2 + 40**2 + 20**2 + 10**2 + 5**2)
    boxes = Anchors().boxes((96, 160))  # rows differ from columns
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(centres[[0, 9, 20 * 9]], [[4, 4], [4, 12], [12, 4]], atol=1e-4)


# --- matching


def np_match(overlap, valid, threshold):
    """Official rule: best box per anchor; then each box claims its best anchor, first box wins."""
    anchors, n = overlap.shape
    index, positive = np.zeros(anchors, int), np.zeros(anchors, bool)
    overlap = np.where(valid[None], overlap, -1)
    for a in range(anchors):
        index[a] = overlap[a].argmax()
        positive[a] = overlap[a].max() >= threshold
    for box in reversed(range(n)):
        if valid[box]:
            best = overlap[:, box].argmax()
            index[best], positive[best] = box, True
    return index, positive


def test_match_against_numpy():
    overlap = RNG.uniform(0, 0.8, (4, 60, 9)).astype("f4")
    valid = RNG.random((4, 9)) < 0.7
    overlap[0, 7] = 0.9  # one anchor is the best of all boxes: the first valid one has it
    index, positive = matching.match(tf.constant(overlap), tf.constant(valid), 0.5)
    for i in range(4):
        expected_index, expected_positive = np_match(overlap[i], valid[i], 0.5)
        np.testing.assert_array_equal(positive[i], expected_positive)
        np.testing.assert_array_equal(
            index[i].numpy()[expected_positive], expected_index[expected_positive]
        )


def targets_of(boxes, classes, valid, size=64):
    anchors = Anchors(size=3).boxes((size, size))
    boxes = tf.constant([boxes], tf.float32)
    targets = matching.anchor_targets(
        tf.constant(anchors), boxes, tf.constant([classes]), tf.constant([valid]), 0.5
    )
    places = targets.object[..., None]
    return anchors, targets, matching.box_targets(boxes, places, anchors[:, None])


def test_no_boxes_gives_background_everywhere():
    _, targets, deltas = targets_of([[0, 0, 0, 0]] * 3, [0, 0, 0], [False] * 3)
    assert not targets.positive.numpy().any()
    assert not targets.classes.numpy().any() and np.isfinite(deltas).all()


def test_a_one_pixel_box_still_gets_its_best_anchor():
    anchors, targets, deltas = targets_of([[30, 30, 31, 31], [0, 0, 0, 0]], [5, 0], [True, False])
    assert targets.positive.numpy().sum() == 1
    where = targets.positive.numpy()[0].argmax()
    assert targets.classes[0, where] == 5
    decoded = box_ops.decode(deltas[0, where], anchors[where])
    np.testing.assert_allclose(decoded, [30, 30, 31, 31], atol=1e-3)


def test_a_box_on_the_border_and_a_full_image():
    _, targets, _ = targets_of([[0, 0, 64, 64], [0, 60, 4, 64]], [1, 2], [True, True])
    found = set(targets.classes.numpy()[targets.positive.numpy()])
    assert found == {1, 2}
    n = 100
    boxes = random_boxes(n, size=40.0) + np.array([0, 0, 2, 2], "f4")
    _, targets, deltas = targets_of(boxes, np.arange(1, n + 1, dtype="i4"), [True] * n)
    assert np.isfinite(deltas).all()
    assert targets.positive.numpy().sum() > 10


@pytest.mark.parametrize("inclusive", [False, True])
def test_box_targets_side_by_side_are_the_encoded_boxes(inclusive):
    anchors = Anchors(size=3).boxes((32, 32))[: 2 * 3 * 9].reshape(2, 3, 9, 4)
    boxes = np.stack([random_boxes(300), random_boxes(300)])  # indices of two digits
    index = RNG.integers(0, 300, (2, 2, 3, 9)).astype("i4")
    actual = matching.box_targets(tf.constant(boxes), tf.constant(index), anchors, inclusive)
    matched = np.stack([boxes[i][index[i]] for i in range(2)])
    expected = box_ops.encode(tf.constant(matched), tf.constant(anchors), inclusive)
    np.testing.assert_allclose(actual, np.reshape(expected, (2, 2, 3, 36)), rtol=1e-4, atol=1e-5)


def test_padding_never_wins_even_where_nothing_overlaps():
    index, positive = matching.match(tf.zeros([1, 5, 2]), tf.constant([[False, True]]), 0.5)
    np.testing.assert_array_equal(positive[0], [True, False, False, False, False])
    assert index[0, 0] == 1


# --- losses


def test_focal_loss_against_the_formula():
    logits = RNG.normal(0, 3, 200)
    targets = RNG.random(200) < 0.3
    p = 1 / (1 + np.exp(-logits))
    p_t = np.where(targets, p, 1 - p)
    alpha_t = np.where(targets, 0.25, 0.75)
    expected = -alpha_t * (1 - p_t) ** 1.5 * np.log(p_t)
    actual = losses.focal(tf.constant(logits, tf.float32), tf.constant(targets), 0.25, 1.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_the_focal_loss_is_that_of_its_formula():
    logits = tf.constant(RNG.normal(0, 3, 200))
    targets = tf.constant(RNG.random(200) < 0.3)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        p_t = tf.where(targets, tf.sigmoid(logits), tf.sigmoid(-logits))
        alpha_t = tf.where(targets, 0.25, tf.constant(0.75, tf.float64))
        plain = -alpha_t * (1 - p_t) ** 1.5 * tf.math.log(p_t)
    expected = tape.gradient(plain, logits)
    logits = tf.cast(logits, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = losses.focal(logits, targets, 0.25, 1.5)
    np.testing.assert_allclose(tape.gradient(loss, logits), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("num_classes", [3, 91, 70000])
def test_one_hot_against_numpy(num_classes):
    classes = RNG.integers(0, num_classes, (2, 3, 9)).astype("i4")
    classes[0, 0, :3] = 0, 1, num_classes - 1
    expected = classes[..., None] == np.arange(num_classes)
    expected[..., 0] = False
    actual = matching.one_hot(tf.constant(classes), num_classes)
    np.testing.assert_array_equal(actual, expected.reshape(2, 3, -1))


def test_focal_loss_and_its_gradient_are_finite_at_any_logit():
    logits = tf.constant([-1e4, -100.0, 0.0, 100.0, 1e4])
    for target in (False, True):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = losses.focal(logits, tf.fill([5], target), 0.25, 1.5)
        assert np.isfinite(loss).all()
        assert np.isfinite(tape.gradient(loss, logits)).all()


def test_huber_loss_by_hand():
    # delta 0.1: 0.05 -> 0.05**2 / 2; 0.3 -> 0.1 * (0.3 - 0.05)
    actual = losses.huber(tf.constant([0.0, 0.05, -0.3]), tf.zeros(3), 0.1)
    np.testing.assert_allclose(actual, [0, 0.00125, 0.025], atol=1e-8)


# --- non-maximum suppression


def np_nms(boxes, scores, limit, iou_threshold, score_threshold):
    """Greedy, class by class; then the best of all classes."""
    kept = []
    for label in range(scores.shape[1]):
        mine = []
        for a in np.argsort(-scores[:, label], kind="stable"):
            if scores[a, label] <= score_threshold:
                break
            if all(np_iou(boxes[a], boxes[b]) <= iou_threshold for b in mine):
                mine.append(a)
        kept += [(-scores[a, label], label, a) for a in mine]
    return sorted(kept)[:limit]


SUPPRESSORS = {
    "static": nms.static_nms,
    "static, XLA": tf.function(nms.static_nms, jit_compile=True),
    "static, many blocks": functools.partial(nms.static_nms, candidates=7),
    "native": nms.native_nms,
}


@pytest.mark.parametrize("name", SUPPRESSORS)
@pytest.mark.parametrize(("limit", "score_threshold"), [(8, 0.05), (100, 0.05), (100, 0.9)])
def test_nms_against_numpy(name, limit, score_threshold):
    boxes, scores = random_boxes(3, 80), RNG.random((3, 80, 4)).astype("f4")
    found = SUPPRESSORS[name](
        tf.constant(boxes), tf.constant(scores),
        limit=limit, iou_threshold=0.5, score_threshold=score_threshold,
    )  # fmt: skip
    assert found.boxes.shape == (3, limit, 4)
    for i in range(3):
        expected = np_nms(boxes[i], scores[i], limit, 0.5, score_threshold)
        n = len(expected)
        assert found.count[i] == n
        np.testing.assert_allclose(found.scores[i, :n], [-e[0] for e in expected], rtol=1e-6)
        np.testing.assert_array_equal(found.classes[i, :n], [e[1] + 1 for e in expected])
        np.testing.assert_allclose(found.boxes[i, :n], [boxes[i][e[2]] for e in expected])
        for padding in (found.boxes[i, n:], found.scores[i, n:], found.classes[i, n:]):
            assert not np.any(padding)


@pytest.mark.parametrize(("n", "k"), [(7, 7), (100, 3), (999, 60), (161, 10), (160, 10)])
@pytest.mark.parametrize("values", ["different", "few", "sorted"])
def test_the_best_of_many(n, k, values):
    scores = RNG.random((3, n)).astype("f4")
    if values == "few":
        scores = np.round(scores * 4) / 4
    if values == "sorted":  # all of the best in few groups
        scores = -np.sort(-scores)
    found, index = (v.numpy() for v in nms.top(tf.constant(scores), k))
    np.testing.assert_array_equal(found, -np.sort(-scores)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, index, 1), found)
    assert all(len(set(row)) == k for row in index)


@pytest.mark.parametrize("candidates", [64, 100, 1024])
def test_nms_of_equal_scores(candidates):
    """Four scores only, as bfloat16 makes them equal: lower class first, then lower anchor."""
    boxes = random_boxes(2, 60)
    scores = (RNG.integers(0, 4, (2, 60, 3)) / 4).astype("f4")
    found = nms.static_nms(
        tf.constant(boxes), tf.constant(scores),
        limit=30, iou_threshold=0.3, score_threshold=0.05, candidates=candidates,
    )  # fmt: skip
    for i in range(2):
        expected = np_nms(boxes[i], scores[i], 30, 0.3, 0.05)
        np.testing.assert_array_equal(found.classes[i], [e[1] + 1 for e in expected])
        np.testing.assert_allclose(found.boxes[i], [boxes[i][e[2]] for e in expected])


@pytest.mark.parametrize("levels", [2**24, 32])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nms_against_model_gardens(version, levels):
    """Also of many equal scores: both take the lower class, then the lower anchor."""
    from official.vision.modeling.layers import detection_generator

    theirs = getattr(detection_generator, f"_generate_detections_{version}")
    boxes = random_boxes(2, 700)
    scores = (RNG.integers(0, levels, (2, 700, 5)) / levels).astype("f4")
    found = nms.static_nms(
        tf.constant(boxes), tf.constant(scores), limit=100, iou_threshold=0.5, score_threshold=0.05
    )
    stored = theirs(
        tf.constant(boxes)[:, :, None], tf.constant(scores), pre_nms_score_threshold=0.05,
        nms_iou_threshold=0.5, max_num_detections=100,
    )  # fmt: skip
    np.testing.assert_array_equal(found.count, stored[3])
    np.testing.assert_array_equal(found.boxes, stored[0])
    np.testing.assert_array_equal(found.scores, stored[1])
    np.testing.assert_array_equal(found.classes, np.asarray(stored[2]) + 1)


@pytest.mark.parametrize("name", SUPPRESSORS)
def test_nms_of_nothing(name):
    found = SUPPRESSORS[name](
        tf.constant(random_boxes(2, 10)), tf.zeros([2, 10, 3]),
        limit=5, iou_threshold=0.5, score_threshold=0.05,
    )  # fmt: skip
    np.testing.assert_array_equal(found.count, [0, 0])
    assert not found.boxes.numpy().any()
