"""Model Garden's models, saved as its trainer saves them and loaded with ours: equal outputs."""

import dataclasses

import numpy as np
import parity
import pytest
import tensorflow as tf
from test_models import assert_close

from spinenet_tf.checkpoints import load

pytest.importorskip("official.vision.modeling.factory")
SIDE = 128
SPEC = [None, SIDE, SIDE, 3]


def garden_config(experiment, **backbone):
    """The model's part of one of Model Garden's experiments, at 128 px."""
    from official.core import exp_factory
    from official.vision.configs import maskrcnn, retinanet  # noqa: F401 - registers them

    config = exp_factory.get_exp_config(experiment).task.model
    config.input_size, config.num_classes = [SIDE, SIDE, 3], 91
    config.backbone.override(backbone)
    return config


def randomize(model, seed=0):
    """Random weights with lively batch norms, and predictions worth comparing."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.name.endswith(("moving_variance:0", "gamma:0")):
            variable.assign(rng.uniform(0.6, 1.4, variable.shape))
        elif variable.shape.rank == 1:
            variable.assign(rng.normal(0, 0.1, variable.shape))
        elif any(part in variable.name for part in ("scores/", "boxes/", "logits/")):
            variable.assign(rng.normal(0, 0.05, variable.shape))


def save(model, folder):
    """What official.core.base_trainer.Trainer checkpoints: model, optimizer, step and items."""
    import tf_keras

    optimizer = tf_keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    step = tf.Variable(277200, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(
        global_step=step, model=model, optimizer=optimizer, **model.checkpoint_items
    )
    return checkpoint.save(str(folder / "ckpt"))


RETINANETS = [
    ("retinanet_spinenet_coco", {"spinenet": {"model_id": "49S"}}, "49S", 128),
    pytest.param(
        "retinanet_spinenet_coco", {"spinenet": {"model_id": "49"}}, "49", 256,
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "retinanet_mobile_coco", {"spinenet_mobile": {"model_id": "49"}}, "mobile-49", 48,
        marks=pytest.mark.slow,
    ),
    ("retinanet_resnetfpn_coco", {}, "R50-FPN", 256),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    tf.random.set_seed(0)


@pytest.mark.parametrize("experiment, backbone, size, width", RETINANETS, ids=lambda x: str(x))
def test_a_retinanet_of_model_garden(tmp_path, experiment, backbone, size, width):
    import tf_keras
    from official.vision.modeling import factory

    config = garden_config(experiment, **backbone)
    config.head.num_filters = width
    theirs = factory.build_retinanet(tf_keras.layers.InputSpec(shape=SPEC), config)
    image = np.random.default_rng(1).normal(size=[2, SIDE, SIDE, 3]).astype("f4")
    theirs(image, training=True)
    randomize(theirs)
    loaded = load.open_checkpoint(
        save(theirs, tmp_path), image_size=SIDE, activation=config.norm_activation.activation
    )
    assert loaded.step == 277200 and loaded.description["size"] == size
    features = theirs.backbone(image, training=False)
    features = theirs.decoder(features, training=False) if theirs.decoder else features
    scores, boxes, _ = theirs.head(features, training=False)
    ours = loaded.model(image)
    for level in range(3, 8):
        assert_close(ours["class"][f"P{level}"], scores[str(level)])
        assert_close(ours["box"][f"P{level}"], boxes[str(level)])


@pytest.mark.slow
def test_a_mask_rcnn_of_model_garden(tmp_path):
    """Raw outputs of all subnets, detections and masks."""
    import tf_keras
    from official.vision.modeling import factory
    from official.vision.ops.anchor import Anchor

    config = garden_config("maskrcnn_spinenet_coco", spinenet={"model_id": "49S"})
    config.detection_head.fc_dims = 64
    for head in (config.rpn_head, config.detection_head, config.mask_head):
        head.num_filters = 32
    theirs = factory.build_maskrcnn(tf_keras.layers.InputSpec(shape=SPEC), config)
    anchors = Anchor(3, 7, 1, [0.5, 1.0, 2.0], 8.0, (SIDE, SIDE)).multilevel_boxes
    anchors = {k: tf.tile(v[None], [2, 1, 1, 1]) for k, v in anchors.items()}
    image = np.random.default_rng(1).normal(size=[2, SIDE, SIDE, 3]).astype("f4")
    sizes = tf.fill([2, 2], float(SIDE))
    theirs(image, sizes, anchor_boxes=anchors, training=False)
    randomize(theirs)
    loaded = load.open_checkpoint(save(theirs, tmp_path), image_size=SIDE)
    task = loaded.task
    task = dataclasses.replace(task, anchors=dataclasses.replace(task.anchors, size=8.0))
    expected = theirs(image, sizes, anchor_boxes=anchors, training=False)
    rpn = loaded.model.get_layer("rpn")(image)
    for level in range(3, 8):
        assert_close(rpn["score"][f"P{level}"], expected["rpn_scores"][str(level)])
        assert_close(rpn["box"][f"P{level}"], expected["rpn_boxes"][str(level)])
    proposals, scores = task.propose(rpn, sizes)
    found = task.detect(loaded.model, rpn["features"], proposals, scores, sizes, native=False)
    masks = task._mask_head(loaded.model, rpn["features"], found.boxes, found.classes, False)
    parity.same_detections(found, expected, tf.sigmoid(masks), expected["detection_masks"])
