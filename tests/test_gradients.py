"""The gradient that leaves out biases before batch norm, against the whole one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from spinenet_tf import RetinaNet
from spinenet_tf.models.mask_rcnn import MaskRCNN
from spinenet_tf.train.gradients import gradient


def both(model, images):
    """{path: (our gradient, the tape's)} of a loss that depends on all outputs."""
    keras.utils.set_random_seed(0)
    with tf.GradientTape(persistent=True) as tape:
        outputs = tf.nest.flatten(model(images, training=True))
        loss = tf.add_n([tf.reduce_sum(tf.sin(v)) for v in outputs])
    whole = tape.gradient(loss, [v.value for v in model.trainable_variables])
    pairs = zip(gradient(tape, loss, model), whole, strict=True)
    return {v.path: pair for v, pair in zip(model.trainable_variables, pairs, strict=True)}


def test_a_bias_before_norm_has_no_gradient_and_all_others_the_tapes():
    keras.config.set_dtype_policy("float64")
    model = RetinaNet("49S", num_classes=3, convs=1, filters=8, input_shape=(128, 128, 3))
    found = both(model, keras.random.normal((2, 128, 128, 3), seed=1, dtype="float64"))
    hidden = {path for path, (ours, _) in found.items() if not np.any(ours)}
    assert hidden == {"class_0/bias", "box_0/bias"}
    largest = max(np.abs(whole).max() for _, whole in found.values())
    for path, (ours, whole) in found.items():
        np.testing.assert_allclose(ours, whole, atol=1e-12 * largest, err_msg=path)


def test_heads_of_mask_rcnn_have_hidden_biases_but_for_their_predictions():
    model = MaskRCNN("49S", num_classes=3, input_shape=(128, 128, 3), norm=True)
    cells = {"box_rois": (7, 7), "mask_rois": (14, 14)}
    channels = model.input["box_rois"].shape[-1]
    rois = {k: keras.random.normal((2, *v, channels), seed=2) for k, v in cells.items()}
    found = both(model, rois | {"image": keras.random.normal((1, 128, 128, 3), seed=1)})
    seen = {p for p, (ours, _) in found.items() if p.endswith("/bias") and np.any(ours)}
    parts = ("rpn_score", "rpn_box", "box_head_class", "box_head_box", "mask_head_predict")
    assert seen == {f"{part}/bias" for part in parts}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_norm_hides_no_bias(frozen):
    image = keras.Input((4, 4, 1))
    x = keras.layers.Conv2D(2, 1, name="first")(image)
    norm = keras.layers.BatchNormalization(trainable=not frozen)
    x = keras.layers.Conv2D(2, 1, name="last")(norm(x))
    found = both(keras.Model(image, x), keras.random.normal((2, 4, 4, 1), seed=1))
    assert np.any(found["first/bias"][0]) == frozen
    assert np.any(found["last/bias"][0])


def test_a_bias_that_is_read_without_norm_as_well_has_its_gradient():
    image = keras.Input((4, 4, 1))
    x = keras.layers.Conv2D(2, 1, name="first")(image)
    outputs = [keras.layers.BatchNormalization()(x), keras.layers.ReLU()(x)]
    found = both(keras.Model(image, outputs), keras.random.normal((2, 4, 4, 1), seed=1))
    assert np.any(found["first/bias"][0])
