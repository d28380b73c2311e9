"""What a RetinaNet learns: targets and losses from a batch, and detections from its outputs."""

import dataclasses
from typing import ClassVar

import gin
import keras
import tensorflow as tf

from spinenet_tf.models.retinanet import RetinaNet
from spinenet_tf.ops import augment, losses, matching, nms
from spinenet_tf.ops import boxes as box_ops
from spinenet_tf.ops.anchors import Anchors
from spinenet_tf.tasks.coco import CocoMetric


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection:
    """One-stage box detection (sections 4.1 and 5.1). Defaults: protocol B of SpineNet-49.

    Attributes:
      image_size: side in pixels of the network's square input.
      num_classes: with the background, class 0.
      anchors: anchor boxes.
      scale: range of the random scale in training.
      flip: mirror half of the training images.
      match_threshold: IoU from which an anchor stands for an object.
      focal_alpha, focal_gamma: of the class loss.
      huber_delta, box_weight: of the box loss and its share.
      score_threshold, nms_threshold, max_detections: of the detections.
    """

    image_size: int = 640
    num_classes: int = 91
    anchors: Anchors = dataclasses.field(default_factory=Anchors)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    match_threshold: float = 0.5
    focal_alpha: float = 0.25
    focal_gamma: float = 1.5
    huber_delta: float = 0.1
    box_weight: float = 50.0
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100

    log_names: ClassVar = ("class", "box", "l2", "total")

    def build(self) -> keras.Model:
        """RetinaNet for this task's input, classes and anchors; gin says which one.

        Raises:
          ValueError: the backbone's levels are not the anchors'.
        """
        model = RetinaNet(
            num_classes=self.num_classes,
            anchors_per_place=self.anchors.per_place,
            input_shape=(self.image_size, self.image_size, 3),
        )
        missing = {f"P{level}" for level in self.anchors.levels} ^ set(model.output["class"])
        if missing:
            raise ValueError(f"backbone and Anchors.levels do not agree on {sorted(missing)}")
        return model

    def metric(self, **kwargs) -> CocoMetric:
        """An empty COCO box metric; see `CocoMetric`."""
        return CocoMetric(**kwargs)

    def loss(self, model: keras.Model, batch: dict, *, training: bool):
        """The loss of one replica's part of the batch.

        The parts sum to the loss of the global batch: class and box loss are divided by one plus
        the number of positive anchors on all replicas.

        Returns:
          (total, {'class', 'box', 'l2', 'total'}), float32 scalars.
        """
        view = self._view(batch, training)
        images = augment.view_images(batch["image"], batch["image_size"], view, self.image_size)
        class_logits, box_outputs = self.flatten(model(images, training=training))
        targets = self.targets(batch, view)
        replica = tf.distribute.get_replica_context()
        positives = tf.reduce_sum(tf.cast(targets.positive, tf.float32))
        positives = replica.all_reduce(tf.distribute.ReduceOp.SUM, positives)
        parts = self.losses(class_logits, box_outputs, targets)
        parts = {name: part / (positives + 1.0) for name, part in parts.items()}
        decay = tf.add_n(model.losses) if model.losses else tf.constant(0.0)
        parts["l2"] = decay / replica.num_replicas_in_sync
        total = parts["class"] + self.box_weight * parts["box"] + parts["l2"]
        return total, parts | {"total": total}

    def targets(self, batch: dict, view: augment.View) -> matching.Targets:
        """Anchor targets of the batch seen in `view`, without crowds and boxes cropped away."""
        size = self.image_size
        boxes = augment.view_boxes(batch["boxes"], batch["image_size"], view)
        boxes = tf.clip_by_value(boxes, 0.0, float(size))
        valid = (batch["classes"] > 0) & ~batch["crowd"] & (box_ops.area(boxes) > 0)
        anchors = tf.constant(self.anchors.boxes((size, size)))
        return matching.anchor_targets(
            anchors, boxes, batch["classes"], valid, self.match_threshold
        )

    def losses(self, class_logits, box_outputs, targets: matching.Targets) -> dict:
        """Sums over [b, a, ...]: focal loss, and Huber loss, a quarter for each coordinate."""
        one_hot = tf.one_hot(targets.classes, self.num_classes)[..., 1:]
        one_hot = tf.pad(one_hot, [[0, 0], [0, 0], [1, 0]])  # the background has no positive
        focal = losses.focal(class_logits, one_hot, self.focal_alpha, self.focal_gamma)
        huber = losses.huber(box_outputs, targets.boxes, self.huber_delta)
        huber = tf.where(targets.positive[..., None], huber, 0.0)
        return {"class": tf.reduce_sum(focal), "box": tf.reduce_sum(huber) / 4.0}

    def predict(self, model: keras.Model, batch: dict, *, native: bool = False) -> nms.Detections:
        """Detections in pixels of the source images.

        Args:
          batch: needs image, image_size and source_size.
          native: suppress with TensorFlow's CPU kernel instead of XLA-compilable code.
        """
        view = augment.fit_view(batch["image_size"], self.image_size)
        images = augment.view_images(batch["image"], batch["image_size"], view, self.image_size)
        found = self.detect(model(images, training=False), view.scaled, native=native)
        to_source = tf.cast(batch["source_size"], tf.float32) / view.scaled
        return found._replace(boxes=found.boxes * tf.tile(to_source, [1, 2])[:, None])

    def detect(self, outputs: dict, sizes: tf.Tensor, *, native: bool = False) -> nms.Detections:
        """Raw outputs -> detections clipped to images of [b, 2] `sizes` in the network's input."""
        class_logits, box_outputs = self.flatten(outputs)
        anchors = tf.constant(self.anchors.boxes((self.image_size, self.image_size)))
        boxes = box_ops.clip(box_ops.decode(box_outputs, anchors), sizes)
        suppress = nms.native_nms if native else nms.static_nms
        return suppress(
            boxes,
            tf.sigmoid(class_logits[..., 1:]),
            limit=self.max_detections,
            iou_threshold=self.nms_threshold,
            score_threshold=self.score_threshold,
        )

    def flatten(self, outputs: dict) -> tuple[tf.Tensor, tf.Tensor]:
        """{'class': {level: map}, 'box': ...} -> [b, a, classes] and [b, a, 4] in anchor order."""
        widths = {"class": self.num_classes, "box": 4}
        return tuple(self._flatten(outputs[name], last) for name, last in widths.items())

    def _flatten(self, maps: dict, last: int) -> tf.Tensor:
        levels = ((maps[f"P{level}"], self._places(level)) for level in self.anchors.levels)
        return tf.concat([tf.reshape(x, [-1, places, last]) for x, places in levels], 1)

    def _places(self, level: int) -> int:
        return (-(-self.image_size // 2**level)) ** 2 * self.anchors.per_place

    def _view(self, batch: dict, training: bool) -> augment.View:
        if not training:
            return augment.fit_view(batch["image_size"], self.image_size)
        return augment.random_view(
            batch["image_size"], self.image_size, self.scale, self.flip, batch["draws"]
        )
