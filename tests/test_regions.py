"""Proposals, sampling, RoIAlign and masks against NumPy written from the definitions."""

import numpy as np
import pytest
import tensorflow as tf
from test_ops import np_iou, random_boxes

from spinenet_tf.ops import masks, nms, rois

RNG = np.random.default_rng(1)


# --- RoIAlign


def pyramid(image=128, channels=3, batch=2):
    sizes = {level: -(-image // 2**level) for level in range(3, 8)}
    return {
        f"P{n}": RNG.normal(size=(batch, s, s, channels)).astype("f4") for n, s in sizes.items()
    }


def np_level(box):
    side = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return int(np.clip(np.floor(np.log2(max(side, 1e-3) / 224)) + 4, 3, 7))


def np_roi_align(features, box, size):
    level = np_level(box)
    table = features[f"P{level}"]
    cells = np.zeros((size, size, table.shape[-1]))
    for i in range(size):
        for j in range(size):
            y = (box[0] + (i + 0.5) * (box[2] - box[0]) / size) / 2**level
            x = (box[1] + (j + 0.5) * (box[3] - box[1]) / size) / 2**level
            y, x = np.clip(y, 0, table.shape[0] - 1), np.clip(x, 0, table.shape[1] - 1)
            for row in range(table.shape[0]):
                for column in range(table.shape[1]):
                    near = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
                    cells[i, j] += near * table[row, column]
    return cells


@pytest.mark.parametrize("image", [128, 100])
def test_roi_align_against_numpy(image):
    features = pyramid(image)
    boxes = np.concatenate([random_boxes(2, 5, size=image * 0.6), np.zeros((2, 1, 4), "f4")], 1)
    boxes[0, 0] = [0, 0, image, image]
    boxes[1, 0] = [image - 3.0, 5, image, image]
    found = rois.roi_align({k: tf.constant(v) for k, v in features.items()}, tf.constant(boxes), 3)
    for b in range(2):
        for i, box in enumerate(boxes[b]):
            expected = np_roi_align({k: v[b] for k, v in features.items()}, box, 3)
            np.testing.assert_allclose(found[b, i], expected, atol=1e-5)


def test_roi_align_equals_model_gardens():
    aligner = pytest.importorskip("official.vision.ops.spatial_transform_ops")
    features = pyramid(1024, channels=2, batch=1)
    boxes = np.clip(random_boxes(1, 40, size=700) * [1, 1, 1.3, 1.3], 0, 1024).astype("f4")
    found = rois.roi_align({k: tf.constant(v) for k, v in features.items()}, tf.constant(boxes), 7)
    by_level = {k[1:]: tf.constant(v) for k, v in features.items()}
    theirs = aligner.multilevel_crop_and_resize(by_level, tf.constant(boxes), 7)
    assert len({np_level(box) for box in boxes[0]}) >= 2
    np.testing.assert_allclose(found, theirs, atol=1e-4)


def test_a_box_reads_the_level_of_its_size():
    sides = np.array([1, 111, 112, 223, 224, 447, 448, 900, 5000], "f4")
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], -1)
    assert rois.pyramid_level(tf.constant(boxes), 3, 7).numpy().tolist() == [
        3, 3, 3, 3, 4, 4, 5, 6, 7,
    ]  # fmt: skip


# --- proposals


def np_greedy(boxes, scores, limit, threshold):
    order, kept = np.argsort(-scores, kind="stable"), []
    for i in order:
        if all(np_iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept[:limit]


@pytest.mark.parametrize("compiled", [False, True])
def test_proposals_against_numpy(compiled):
    anchors = [random_boxes(60, size=80) + [0, 0, 1, 1], random_boxes(9, size=80) + [0, 0, 1, 1]]
    anchors = [a.astype("f4") for a in anchors]
    logits = [RNG.normal(size=(2, len(a))).astype("f4") for a in anchors]
    targets = [np.zeros((2, len(a), 4), "f4") for a in anchors]
    sizes = np.array([[90, 100], [70, 60]], "f4")

    @tf.function(jit_compile=compiled)
    def propose():
        levels = list(
            zip(map(tf.constant, logits), targets, map(tf.constant, anchors), strict=True)
        )
        return rois.propose(levels, tf.constant(sizes), before=40, after=30, iou_threshold=0.5)

    boxes, scores = propose()
    for b in range(2):
        expected = []
        for level, logit in zip(anchors, logits, strict=True):
            clipped = np.clip(level, 0, np.tile(sizes[b], 2))
            first = np.argsort(-logit[b], kind="stable")[:40]
            kept = first[np_greedy(clipped[first], logit[b][first], 30, 0.5)]
            expected += [(1 / (1 + np.exp(-logit[b][k])), clipped[k]) for k in kept]
        real = [(s, box) for s, box in expected if np.prod(box[2:] - box[:2]) > 0]
        real = sorted(real, key=lambda pair: -pair[0])[:30]
        count = int((scores[b].numpy() > 0).sum())
        assert count == len(real)
        np.testing.assert_allclose(scores[b, :count], [s for s, _ in real], atol=1e-5)
        np.testing.assert_allclose(boxes[b, :count], [box for _, box in real], atol=1e-3)


def test_fewer_candidates_than_proposals_are_padded_with_score_zero():
    levels = [
        (tf.zeros([1, 2]), tf.zeros([1, 2, 4]), tf.constant([[0.0, 0, 8, 8], [20, 20, 30, 30]]))
    ]
    boxes, scores = rois.propose(
        levels, tf.constant([[25.0, 25.0]]), before=5, after=4, iou_threshold=0.7
    )
    assert scores.numpy().tolist() == [[0.5, 0.5, 0, 0]]
    assert sorted(map(tuple, boxes[0, :2].numpy())) == [(0, 0, 8, 8), (20, 20, 25, 25)]


# --- sampling


def test_sampling_takes_positives_first_up_to_their_share():
    positive = np.zeros((3, 100), bool)
    positive[0, :40] = positive[1, 5:8] = True
    negative = ~positive
    negative[2] = False
    negative[2, 10:14] = True
    chance = RNG.uniform(size=(3, 100)).astype("f4")
    chosen = rois.sample(*map(tf.constant, (positive, negative, chance)), 20, 5)
    index = chosen.index.numpy()
    assert all(len(set(row)) == 20 for row in index)
    assert chosen.positive.numpy().sum(1).tolist() == [5, 3, 0]
    assert chosen.used.numpy().sum(1).tolist() == [20, 20, 4]
    assert (np.take_along_axis(positive, index, 1) >= chosen.positive.numpy()).all()
    # The luckiest of the positives, and no surplus positive among the negatives.
    assert set(index[0, :5]) == set(np.argsort(-np.where(positive[0], chance[0], -1))[:5])
    assert not positive[0][index[0, 5:]].any()
    assert set(index[2, :4]) == {10, 11, 12, 13}


def test_the_luckiest_negative_is_no_positive():
    """1 and the largest float32 below 1 are 2, rounded."""
    chance = tf.constant([[np.nextafter(np.float32(1), np.float32(0)), 0.5]])
    chosen = rois.sample(tf.constant([[False, True]]), tf.constant([[True, False]]), chance, 2, 1)
    assert chosen.index.numpy().tolist() == [[1, 0]]
    assert chosen.positive.numpy().tolist() == [[True, False]] and chosen.used.numpy().all()


def test_luck_is_the_same_under_xla():
    draws = tf.constant(RNG.uniform(size=(3, 4)).astype("f4"))
    compiled = tf.function(lambda: rois.luck(draws, 300, 1), jit_compile=True)()
    np.testing.assert_array_equal(compiled, rois.luck(draws, 300, 1))


def test_luck_is_uniform_and_of_the_image_alone():
    draws = tf.constant(RNG.uniform(size=(4, 4)).astype("f4"))
    together = rois.luck(draws, 2000, 1)
    np.testing.assert_array_equal(together[2:3], rois.luck(draws[2:3], 2000, 1))
    counts = np.stack([np.histogram(row, 10, (0, 1))[0] for row in together.numpy()])
    assert (abs(counts - 200) < 60).all()  # 4.5 standard deviations
    near = together.numpy()[:, 1:], together.numpy()[:, :-1]
    assert abs(np.corrcoef(near[0].ravel(), near[1].ravel())[0, 1]) < 0.05
    assert np.abs(together - rois.luck(draws, 2000, 2)).max() > 0.5
    assert np.abs(together[0] - together[1]).max() > 0.5


# --- masks


def np_crop(mask, frame, box, size):
    cells = len(mask)
    seen = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y = box[0] + (i + 0.5) / size * (box[2] - box[0])
            x = box[1] + (j + 0.5) / size * (box[3] - box[1])
            v = (y - frame[0]) / (frame[2] - frame[0]) * cells - 0.5
            u = (x - frame[1]) / (frame[3] - frame[1]) * cells - 0.5
            for row in range(cells):
                for column in range(cells):
                    near = max(0, 1 - abs(v - row)) * max(0, 1 - abs(u - column))
                    seen[i, j] += near * mask[row, column]
    return seen


def test_cropping_masks_against_numpy():
    truth = RNG.uniform(size=(1, 3, 6, 6)).astype("f4")
    frames, boxes = random_boxes(1, 3) + [0, 0, 5, 5], random_boxes(1, 3) + [0, 0, 5, 5]
    boxes[0, 0] = frames[0, 0]
    boxes[0, 1] = frames[0, 1] + [-10, -10, 10, 10]
    frames, boxes = frames.astype("f4"), boxes.astype("f4")
    found = masks.crop_masks(*map(tf.constant, (truth, frames, boxes)), 4)
    for i in range(3):
        expected = np_crop(truth[0, i], frames[0, i], boxes[0, i], 4)
        np.testing.assert_allclose(found[0, i], expected, atol=1e-4)


def test_a_mask_in_its_own_frame_is_itself():
    truth = RNG.uniform(size=(1, 1, 5, 5)).astype("f4")
    frame = tf.constant([[[3.0, 4, 23, 54]]])
    np.testing.assert_allclose(masks.crop_masks(truth, frame, frame, 5), truth, atol=1e-5)


def test_pasting_against_numpy():
    mask = RNG.uniform(size=(7, 7))
    for box in ([3.2, 5.7, 31.5, 28.1], [-4.0, -3.5, 12.2, 55.0], [10.0, 10, 11, 11]):
        expected = np.zeros((40, 50), np.uint8)
        for y in range(40):
            for x in range(50):
                if box[0] <= y + 0.5 < box[2] and box[1] <= x + 0.5 < box[3]:
                    v = np.clip((y + 0.5 - box[0]) / (box[2] - box[0]) * 7 - 0.5, 0, 6)
                    u = np.clip((x + 0.5 - box[1]) / (box[3] - box[1]) * 7 - 0.5, 0, 6)
                    row, column = min(int(v), 5), min(int(u), 5)
                    patch = mask[row : row + 2, column : column + 2]
                    weights = np.outer([1 - (v - row), v - row], [1 - (u - column), u - column])
                    expected[y, x] = (patch * weights).sum() >= 0.5
        found = masks.paste_mask(mask, np.array(box), 40, 50)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_pasting_empty_and_outside_boxes_gives_nothing():
    for box in ([5.0, 5, 5, 5], [100.0, 100, 120, 120], [-20.0, -20, -1, -1]):
        assert masks.paste_mask(np.ones((28, 28)), np.array(box), 40, 50).sum() == 0
    assert masks.paste_mask(np.ones((28, 28)), np.array([0.0, 0, 40, 50]), 40, 50).all()


def test_flipping_masks():
    found = masks.flip_masks(tf.constant([[[[1, 2], [3, 4]]]] * 2), tf.constant([True, False]))
    assert found.numpy().tolist() == [[[[2, 1], [4, 3]]], [[[1, 2], [3, 4]]]]


# --- class-wise NMS with boxes of each class


@pytest.mark.parametrize("suppress", [nms.static_nms, nms.native_nms])
def test_nms_with_a_box_for_each_class(suppress):
    boxes = random_boxes(2, 12, 3, size=20)
    scores = RNG.uniform(size=(2, 12, 3)).astype("f4")
    found = suppress(
        tf.constant(boxes), tf.constant(scores), limit=9, iou_threshold=0.3, score_threshold=0.2
    )
    for b in range(2):
        kept = []
        for k in range(3):
            likely = np.flatnonzero(scores[b, :, k] > 0.2)
            for i in np_greedy(boxes[b, likely, k], scores[b, likely, k], 12, 0.3):
                kept.append((scores[b, likely[i], k], k + 1, boxes[b, likely[i], k]))
        kept = sorted(kept, key=lambda row: -row[0])[:9]
        assert int(found.count[b]) == len(kept)
        for i, (score, label, box) in enumerate(kept):
            assert (float(found.scores[b, i]), int(found.classes[b, i])) == (score, label)
            np.testing.assert_allclose(found.boxes[b, i], box)


@pytest.mark.parametrize("shape", [(2, 5, 7, 4), (3, 4, 6, 1)])
def test_values_of_a_class_are_gathered(shape):
    values, classes = RNG.normal(size=shape).astype("f4"), RNG.integers(0, shape[2], shape[:2])
    found = rois.of_class(tf.constant(values), tf.constant(classes[..., None]), 2)
    np.testing.assert_array_equal(found, tf.gather(values, classes, batch_dims=2))
