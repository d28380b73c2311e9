"""DropBlock: what it drops, how much, and how that grows over training."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from spinenet_tf import SpineNet, modes
from spinenet_tf.models import keras_layers
from spinenet_tf.models.keras_layers import DropBlock, training_progress

ONES = np.ones((16, 20, 24, 8), "f4")
MANY = np.ones((50, 20, 24, 16), "f4")  # 800 maps: the share's standard deviation is below 0.003


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(1)


def dropped(rate, size, x=ONES, progress=1.0):
    with training_progress(progress):
        return np.asarray(DropBlock(rate, size)(x, training=True)) == 0


def test_whole_squares_are_dropped_inside_the_map():
    """Every dropped place lies in a dropped square that does not stick out."""
    holes = dropped(0.1, 3)
    windows = np.lib.stride_tricks.sliding_window_view(holes, (3, 3), axis=(1, 2)).all((-1, -2))
    covered = np.zeros_like(holes)
    for b, y, x, c in np.argwhere(windows):
        covered[b, y : y + 3, x : x + 3, c] = True
    np.testing.assert_array_equal(covered, holes)
    assert holes.any() and len({tuple(m) for m in holes[0].reshape(-1, 8)}) > 2  # by channel


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_share_that_is_dropped_grows_with_training(size):
    for progress, expected in ((0.0, 0.0), (0.5, 0.05), (1.0, 0.1)):
        share = dropped(0.1, size, MANY, progress).mean()
        assert share == pytest.approx(expected, abs=0.015)  # squares overlap, so a little less


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    with training_progress(1.0):
        out = np.asarray(DropBlock(0.2, 3)(ONES, training=True))
    assert out.mean() == pytest.approx(1.0, abs=1e-3)
    assert len(np.unique(out)) == 2


def test_a_map_smaller_than_the_square_is_dropped_whole_or_not_at_all():
    x = np.ones((400, 2, 3, 4), "f4")
    holes = dropped(0.25, 7, x).reshape(400, 6, 4)
    assert (holes.all(1) | ~holes.any(1)).all()
    assert holes.mean() == pytest.approx(0.25, abs=0.04)
    assert dropped(0.25, 7, np.ones((400, 1, 1, 4), "f4")).mean() == pytest.approx(0.25, abs=0.04)


def test_inference_is_the_identity_and_a_dynamic_map_is_refused_in_training():
    np.testing.assert_array_equal(DropBlock(0.5, 3)(ONES), ONES)
    image = keras.Input((None, None, 4))
    model = keras.Model(image, DropBlock(0.5, 3)(image))
    np.testing.assert_array_equal(model(ONES[..., :4]), ONES[..., :4])
    train = tf.function(lambda x: model(x, training=True))
    with pytest.raises(ValueError, match="DropBlock trains on maps of a static size only"):
        train.get_concrete_function(tf.TensorSpec([None, None, None, 4]))


def test_where_a_spinenet_has_it():
    model = SpineNet("49", width=0.125, endpoints=8, dropblock_keep=0.9, dropblock_size=5)
    names = {la.name for la in model.layers if isinstance(la, DropBlock)}
    assert {f"block2_0_{i}_dropblock" for i in (1, 2, 3)} <= names
    assert {f"block3_0_{i}_dropblock" for i in (1, 2)} <= names
    assert not any(name.startswith(("block0", "block1_")) for name in names)  # not in the stem
    assert not any(isinstance(la, DropBlock) for la in SpineNet("49", width=0.125).layers)
    with pytest.raises(ValueError, match="dropblock_keep=0"):
        SpineNet(dropblock_keep=0.0)


def test_the_trainer_says_how_far_training_is(tmp_path, monkeypatch):
    seen = []
    records = tiny.make_records(tmp_path)
    tiny.bind(records, "Style.dropblock_keep = 0.8", "Training.steps = 4")
    keep = DropBlock._keep

    def watch(self, shape):
        seen.append(keras_layers._PROGRESS.get())
        return keep(self, shape)

    monkeypatch.setattr(DropBlock, "_keep", watch)
    tf.config.run_functions_eagerly(True)
    try:
        modes.train(str(tmp_path / "model"))
    finally:
        tf.config.run_functions_eagerly(False)
    assert sorted({float(v) for v in seen}) == [0.0, 0.25, 0.5, 0.75]
    assert keras_layers._PROGRESS.get() == 1.0
