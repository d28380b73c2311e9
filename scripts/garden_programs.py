"""The programs that compare_model_garden.py compares: this package's and Model Garden's.

Each is {name: (function, example arguments)}: 'train', a replica's step; 'predict', with NMS; of
RetinaNet 'forward' as well, the network alone. Swish of RetinaNet, ReLU of Mask R-CNN (Table 5),
synchronized batch norm.
"""

from typing import NamedTuple

OBJECTS = 8  # in an image
WIDTHS = {"49S": 128, "49": 256, "96": 256, "143": 256, "190": 512}  # of RetinaNet's subnets
CONVS = {"49S": 4, "49": 4, "96": 4, "143": 5, "190": 7}


class Case(NamedTuple):
    """What is compared: 'retinanet' or 'mask_rcnn', which SpineNet, sides in pixels."""

    network: str
    size: str
    image_size: int
    batch: int
    precision: str

    @property
    def activation(self) -> str:
        """The networks' activation."""
        return "swish" if self.network == "retinanet" else "relu"


def ours(case: Case, native: bool) -> dict:
    """The programs of this package; `native` predicts as CPUs do."""
    import tensorflow as tf

    from spinenet_tf.train.trainer import Run, Training

    task = _our_task(case)
    run = Run(task, Training(precision=case.precision), "")
    example = _our_batch(case, task.labels[0])
    names = sorted(example)

    def packed(columns):
        return dict(zip(names, columns, strict=True))

    def step(*columns):
        return run.replica_step(packed(columns), tf.constant(0.01), 1000)

    def predict(*columns):
        return run.task.predict(run.model, packed(columns), native=native)

    columns = [tf.constant(example[name]) for name in names]
    programs = {"train": (step, columns), "predict": (predict, columns)}
    if case.network == "retinanet":
        images = tf.zeros([case.batch, case.image_size, case.image_size, 3])
        programs["forward"] = (lambda x: run.model(x, training=False), [images])
    return programs


def _our_task(case: Case):
    from spinenet_tf import RetinaNet
    from spinenet_tf.models.mask_rcnn import MaskRCNN
    from spinenet_tf.tasks import detection, instances

    dense = case.network == "retinanet"
    recompute = dense and case.size == "190"  # as in its recipe
    style = dict(activation=case.activation, synchronized=True, recompute=recompute)
    shape = (case.image_size, case.image_size, 3)

    class Boxes(detection.Detection):
        def build(self):
            endpoints = 128 if case.size == "49S" else None  # Model Garden's; released: 256
            return RetinaNet(case.size, input_shape=shape, endpoints=endpoints, **style)

    class Masks(instances.InstanceSegmentation):
        def build(self):
            return MaskRCNN(case.size, input_shape=shape, **style)

    return (Boxes if dense else Masks)(image_size=case.image_size)


def _our_batch(case: Case, labels: str) -> dict:
    """Arrays of a batch: noise with `OBJECTS` boxes, and masks that fill them."""
    import numpy as np

    from spinenet_tf.data.pipeline import Data, batch_spec

    size, batch = case.image_size, case.batch
    spec = batch_spec(Data(canvas=size), batch, labels)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, size / 2, (batch, OBJECTS, 2))
    example = {k: np.zeros(v.shape, v.dtype.as_numpy_dtype) for k, v in spec.items()}
    example["image"] = rng.integers(0, 256, example["image"].shape, np.uint8)
    example["boxes"][:, :OBJECTS] = np.concatenate([corner, corner + size / 4], -1)
    example["classes"][:, :OBJECTS] = rng.integers(1, 91, (batch, OBJECTS))
    example["image_size"][:], example["source_size"][:] = size, size
    if "masks" in example:
        example["masks"][:, :OBJECTS] = 255
    return example


def garden(case: Case, native: bool) -> dict:
    """The programs of Model Garden: its task, its optimizer, its `train_step`."""
    del native  # its NMS is one for all
    import tensorflow as tf
    import tf_keras

    tf_keras.mixed_precision.set_global_policy(case.precision)
    config, task = _garden_task(case)
    model = task.build_model()
    optimizer = task.create_optimizer(config.trainer.optimizer_config)
    size, batch = case.image_size, case.batch
    images = tf.random.stateless_normal([batch, size, size, 3], [0, 0])
    images = tf.cast(images, tf.bfloat16) if "bfloat16" in case.precision else images
    labels = _garden_labels(case)
    columns = [images, *tf.nest.flatten(labels)]

    def step(images, *flat):
        packed = tf.nest.pack_sequence_as(labels, flat)
        logs = task.train_step((images, packed), model, optimizer, metrics=[])
        return logs[task.loss]

    def predict(images, *flat):
        packed = tf.nest.pack_sequence_as(labels, flat)
        where = {"anchor_boxes": packed["anchor_boxes"]}
        where["image_shape"] = packed["image_info"][:, 1]
        return model(images, **where, training=False)

    def forward(images):
        return model.head(model.backbone(images, training=False), training=False)

    programs = {"train": (step, columns), "predict": (predict, columns)}
    return programs | ({"forward": (forward, [images])} if case.network == "retinanet" else {})


def _garden_task(case: Case):
    """(its experiment's configuration, its task)."""
    from official.core import exp_factory
    from official.vision.configs import maskrcnn, retinanet  # noqa: F401 - registers them
    from official.vision.tasks.maskrcnn import MaskRCNNTask
    from official.vision.tasks.retinanet import RetinaNetTask

    dense = case.network == "retinanet"
    name = "retinanet" if dense else "maskrcnn"
    config = exp_factory.get_exp_config(f"{name}_spinenet_coco")
    model = config.task.model
    model.input_size, model.num_classes = [case.image_size, case.image_size, 3], 91
    model.backbone.spinenet.model_id = case.size
    model.norm_activation.activation = case.activation
    model.norm_activation.use_sync_bn = True
    if dense:
        model.head.num_filters, model.head.num_convs = WIDTHS[case.size], CONVS[case.size]
    return config, (RetinaNetTask if dense else MaskRCNNTask)(config.task)


def _garden_labels(case: Case) -> dict:
    """What Model Garden's input makes besides images, without an object."""
    import numpy as np
    import tensorflow as tf

    batch, size = case.batch, case.image_size
    dense = case.network == "retinanet"
    per_place = 9 if dense else 3
    sides = {str(level): -(-size // 2**level) for level in range(3, 8)}
    anchors = sum(per_place * side**2 for side in sides.values())
    rng = np.random.default_rng(0)

    def maps(values, dtype):
        return {k: tf.zeros([batch, n, n, per_place * values], dtype) for k, n in sides.items()}

    boxes = {
        k: tf.constant(rng.uniform(0, size, [batch, n, n, per_place * 4]), tf.float32)
        for k, n in sides.items()
    }
    info = tf.constant([[[size] * 2, [size] * 2, [1, 1], [0, 0]]], tf.float32)
    labels = {"anchor_boxes": boxes, "image_info": tf.tile(info, [batch, 1, 1])}
    if dense:
        return labels | {
            "cls_targets": maps(1, tf.int32),
            "box_targets": maps(4, tf.float32),
            "cls_weights": tf.ones([batch, anchors]),
            "box_weights": tf.ones([batch, anchors]),
        }
    return labels | {
        "rpn_score_targets": maps(1, tf.int32),
        "rpn_box_targets": maps(4, tf.float32),
        "gt_boxes": tf.zeros([batch, 100, 4]),
        "gt_classes": tf.zeros([batch, 100], tf.int32),
        "gt_masks": tf.zeros([batch, 100, 112, 112]),
    }


MAKERS = {"ours": ours, "garden": garden}
