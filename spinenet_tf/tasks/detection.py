"""What a RetinaNet learns: targets and losses from a batch, and detections from its outputs."""

import dataclasses
from typing import ClassVar

import gin
import keras
import numpy as np
import tensorflow as tf

from spinenet_tf.data.images import place
from spinenet_tf.data.pipeline import Data
from spinenet_tf.draw import draw_boxes
from spinenet_tf.models.norm import over_replicas
from spinenet_tf.models.retinanet import RetinaNet
from spinenet_tf.ops import augment, losses, matching, nms
from spinenet_tf.ops import boxes as box_ops
from spinenet_tf.ops.anchors import Anchors
from spinenet_tf.tasks import common
from spinenet_tf.tasks.coco import CocoMetric, coco_boxes


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
      inclusive_boxes: a box ends with its last pixel, as in the official code (see `ops.boxes`);
        for weights that were trained so.
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
    inclusive_boxes: bool = False

    network: ClassVar = "RetinaNet"  # the builder that gin binds
    labels: ClassVar = ("boxes", "boxes")  # what to read in training and in evaluation
    log_names: ClassVar = ("class", "box", "l2", "total")

    @property
    def augmentation(self) -> augment.Augmentation:
        """The random views of training."""
        return augment.Augmentation(self.image_size, self.scale, self.flip)

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
        common.check_levels(self.anchors, model.output["class"])
        return model

    def runs(self, training: bool = False) -> dict[str, int]:
        """How often an image runs nested models: there are none."""
        return {}

    def metric(self, data: Data) -> CocoMetric:
        """An empty COCO box metric for a data set."""
        return CocoMetric(data.categories(), data.annotations)

    def loss(self, model: keras.Model, batch: dict, *, training: bool):
        """The loss of one replica's part of the batch.

        The parts sum to the loss of the global batch: class and box loss are divided by one plus
        the number of positive anchors on all replicas.

        Returns:
          (total, {'class', 'box', 'l2', 'total'}), float32 scalars.
        """
        images, view = common.look(batch, self.image_size, self.augmentation if training else None)
        boxes, _, valid = common.seen_objects(batch, view, self.image_size)
        targets = self.targets(boxes, batch["classes"], valid)
        positives = tf.reduce_sum(tf.cast(targets.positive, tf.float32))
        positives = over_replicas(positives)
        parts = self.losses(model(images, training=training), targets, boxes)
        parts = {name: part / (positives + 1.0) for name, part in parts.items()}
        parts["l2"] = common.weight_decay(model)
        total = parts["class"] + self.box_weight * parts["box"] + parts["l2"]
        return total, parts | {"total": total}

    def targets(self, boxes: tf.Tensor, classes: tf.Tensor, valid: tf.Tensor) -> matching.Targets:
        """Anchor targets of [b, n, 4] boxes in a view, without crowds and boxes cropped away."""
        anchors = tf.constant(self.anchors.boxes((self.image_size, self.image_size)))
        boxes, valid = common.without_padding(boxes, valid)
        return matching.anchor_targets(anchors, boxes, classes, valid, self.match_threshold)

    def losses(self, outputs: dict, targets: matching.Targets, boxes: tf.Tensor) -> dict:
        """Sums over all anchors: focal loss, and Huber loss, a quarter for each coordinate.

        On the maps as they are: flattened to [anchors, classes], they would all be moved.
        """
        sums, anchors = {"class": 0.0, "box": 0.0}, self.anchors.per_place
        shapes = {level: boxes.shape[1:3] for level, boxes in sorted(outputs["box"].items())}
        sizes = [height * width * anchors for height, width in shapes.values()]
        flat = self.anchors.boxes((self.image_size, self.image_size))
        flat = np.split(flat, np.cumsum(sizes)[:-1])
        parts = zip(*(tf.split(part, sizes, axis=1) for part in targets), flat, strict=True)
        for (level, shape), (*maps, boxes_here) in zip(shapes.items(), parts, strict=True):
            classes, index, positive = (tf.reshape(v, [-1, *shape, anchors]) for v in maps)
            one_hot = matching.one_hot(classes, self.num_classes)
            focal = losses.focal(
                outputs["class"][level], one_hot, self.focal_alpha, self.focal_gamma
            )
            boxes_here = boxes_here.reshape(*shape, anchors, 4)
            deltas = matching.box_targets(boxes, index, boxes_here, self.inclusive_boxes)
            huber = losses.huber(outputs["box"][level], deltas, self.huber_delta)
            counted = matching.spread(tf.cast(positive, tf.int32), 4) > 0
            sums["class"] += tf.reduce_sum(focal)
            sums["box"] += tf.reduce_sum(tf.where(counted, huber, 0.0)) / 4.0
        return sums

    def predict(self, model: keras.Model, batch: dict, *, native: bool = False) -> nms.Detections:
        """Detections in pixels of the source images.

        Args:
          batch: needs image, image_size and source_size.
          native: suppress with TensorFlow's CPU kernel instead of XLA-compilable code.
        """
        images, view = common.look(batch, self.image_size)
        found = self.detect(model(images, training=False), view.scaled, native=native)
        return found._replace(boxes=common.to_source(found.boxes, batch, view))

    def detect(self, outputs: dict, sizes: tf.Tensor, *, native: bool = False) -> nms.Detections:
        """Raw outputs -> detections clipped to images of [b, 2] `sizes` in the network's input."""
        class_logits, box_outputs = self.flatten(outputs)
        anchors = tf.constant(self.anchors.boxes((self.image_size, self.image_size)))
        boxes = box_ops.decode(box_outputs, anchors, self.inclusive_boxes)
        boxes = box_ops.clip(boxes, sizes, self.inclusive_boxes)
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
        return tuple(tf.concat(common.flatten(outputs[k], n), 1) for k, n in widths.items())

    def row(self, image: tf.Tensor, canvas: int) -> dict[str, tf.Tensor]:
        """The row of a batch that `predict` needs, from one image: see `data.images.place`."""
        return place(image, canvas)

    def serve(self, found: nms.Detections) -> dict[str, tf.Tensor]:
        """What a SavedModel returns: the detections under the names of the field."""
        return {
            "num_detections": found.count,
            "detection_boxes": found.boxes,
            "detection_scores": found.scores,
            "detection_classes": found.classes,
        }

    def results(
        self, found: nms.Detections, image_id: int, category_ids: dict, size: tuple[int, int]
    ) -> list[dict]:
        """COCO results of one image's detections (arrays without the batch axis)."""
        return coco_boxes(found, image_id, category_ids)

    def draw(self, image: np.ndarray, found: nms.Detections, names: dict, min_score: float):
        """One image [h, w, 3] uint8 with its detections from `min_score` on."""
        keep = found.scores >= min_score
        return draw_boxes(image, found.boxes[keep], found.classes[keep], found.scores[keep], names)
