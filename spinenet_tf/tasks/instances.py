"""What a Mask R-CNN learns: regions, their boxes, classes and masks (section 4.1)."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import gin
import keras
import numpy as np
import tensorflow as tf

from spinenet_tf.data.images import place
from spinenet_tf.data.pipeline import Data
from spinenet_tf.data.truth import check_truth, coco_truth
from spinenet_tf.draw import draw_boxes, draw_masks
from spinenet_tf.models.mask_rcnn import BOX_CELLS, MASK_CELLS, MASK_SIZE, MaskRCNN
from spinenet_tf.ops import augment, losses, masks, matching, nms, rois
from spinenet_tf.ops import boxes as box_ops
from spinenet_tf.ops.anchors import Anchors, one_scale
from spinenet_tf.tasks import common
from spinenet_tf.tasks.coco import MaskMetric, coco_boxes, coco_masks

BOX_SCALES = (10.0, 10.0, 5.0, 5.0)  # of the second stage's box targets (Faster R-CNN's code)


class Instances(NamedTuple):
    """`nms.Detections` with masks.

    Attributes:
      boxes, scores, classes, count: see `nms.Detections`.
      masks: [b, k, 28, 28] float32 probabilities in the frames of the boxes.
    """

    boxes: tf.Tensor
    scores: tf.Tensor
    classes: tf.Tensor
    count: tf.Tensor
    masks: tf.Tensor


class Regions(NamedTuple):
    """Sampled proposals of a batch, those on objects first.

    Attributes:
      boxes: [b, k, 4] yxyx in the network's input.
      object: [b, k] int32, the index of the ground-truth box they stand for.
      classes: [b, k] int32; 0 is background.
      used: [b, k] bool; the rest only fills up.
    """

    boxes: tf.Tensor
    object: tf.Tensor
    classes: tf.Tensor
    used: tf.Tensor


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceSegmentation:
    """Two-stage detection and segmentation (sections 4.1 and 5.4).

    The paper leaves the settings to Mask R-CNN (arXiv 1703.06870); the defaults are those of its
    official code.

    Attributes:
      image_size: side in pixels of the network's square input.
      num_classes: with the background, class 0.
      anchors: anchor boxes; one scale unless `Anchors.scales` is bound.
      scale: range of the random scale in training.
      flip: mirror half of the training images.
      rpn_positive, rpn_negative: IoU from which, and below which, an anchor is an example.
      rpn_samples, rpn_fraction: anchors of an image that count, and how many may be positive.
      rpn_delta: Huber delta of the anchors' boxes.
      proposals_before, proposals_after, proposals_nms: a level's candidates, an image's proposals,
        and the IoU from which they suppress one another.
      proposals_before_eval: a level's candidates outside training.
      region_samples, region_fraction, region_iou: proposals that the second stage trains on, how
        many may lie on objects, and the IoU from which they do.
      mask_samples: of those on objects, how many train the mask subnet.
      score_threshold, nms_threshold, max_detections: of the detections.
      inclusive_boxes: a box ends with its last pixel, as in the official code (see `ops.boxes`);
        for weights that were trained so.
    """

    image_size: int = 640
    num_classes: int = 91
    anchors: Anchors = dataclasses.field(default_factory=one_scale)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    rpn_positive: float = 0.7
    rpn_negative: float = 0.3
    rpn_samples: int = 256
    rpn_fraction: float = 0.5
    rpn_delta: float = 1 / 9
    proposals_before: int = 2000
    proposals_before_eval: int = 1000
    proposals_after: int = 1000
    proposals_nms: float = 0.7
    region_samples: int = 512
    region_fraction: float = 0.25
    region_iou: float = 0.5
    mask_samples: int = 128
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    inclusive_boxes: bool = False

    network: ClassVar = "MaskRCNN"  # the builder that gin binds
    labels: ClassVar = ("masks", "boxes")  # what to read in training and in evaluation
    log_names: ClassVar = ("rpn_score", "rpn_box", "class", "box", "mask", "l2", "total")

    @property
    def augmentation(self) -> augment.Augmentation:
        """The random views of training."""
        return augment.Augmentation(self.image_size, self.scale, self.flip)

    def build(self) -> keras.Model:
        """Mask R-CNN for this task's input, classes and anchors; gin says which one.

        Raises:
          ValueError: the backbone's levels are not the anchors'.
        """
        model = MaskRCNN(
            num_classes=self.num_classes,
            anchors_per_place=self.anchors.per_place,
            input_shape=(self.image_size, self.image_size, 3),
        )
        common.check_levels(self.anchors, model.output["rpn"]["features"])
        return model

    def runs(self, training: bool = False) -> dict[str, int]:
        """How often an image runs the parts of the model (Table 5 counts 1000 proposals)."""
        if training:
            return {"box_head": self.region_samples, "mask_head": self.mask_samples}
        return {"box_head": self.proposals_after, "mask_head": self.max_detections}

    def metric(self, data: Data) -> MaskMetric:
        """An empty COCO box and mask metric for a data set; see `check_truth`."""
        check_truth(data)
        truth = functools.partial(coco_truth, data)
        return MaskMetric(data.categories(), data.annotations, truth)

    def loss(self, model: keras.Model, batch: dict, *, training: bool):
        """The loss of one replica's part of the batch; the parts sum to the global batch's.

        Every part is a mean over what counts in it on all replicas (official code: on one).

        Returns:
          (total, {name: value} over `log_names`), float32 scalars.
        """
        images, view = common.look(batch, self.image_size, self.augmentation if training else None)
        boxes, whole, valid = common.seen_objects(batch, view, self.image_size)
        rpn = model.get_layer("rpn")(images, training=training)
        parts = self.rpn_losses(rpn, boxes, valid, batch["draws"])
        sizes = augment.extent(view, self.image_size)
        proposals, scores = self.propose(rpn, sizes, before=self.proposals_before)
        regions = self.sample_regions(proposals, scores, boxes, valid, batch)
        parts |= self.box_losses(model, rpn["features"], regions, boxes, training)
        truth = masks.flip_masks(tf.cast(batch["masks"], tf.float32) / 255.0, view.flip)
        parts |= self.mask_loss(model, rpn["features"], regions, truth, whole, training)
        parts["l2"] = common.weight_decay(model)
        return tf.add_n(list(parts.values())), parts | {"total": tf.add_n(list(parts.values()))}

    def rpn_losses(self, rpn: dict, boxes, valid, draws) -> dict:
        """Of sampled anchors: cross entropy of object or not, Huber loss of the positive boxes."""
        logits, outputs = (tf.concat(parts, 1) for parts in self._rpn_levels(rpn))
        anchors = tf.constant(self.anchors.boxes((self.image_size, self.image_size)))
        seen, real = common.without_padding(boxes, valid)
        overlap = box_ops.iou(anchors[None], seen)
        index, positive = matching.match(overlap, real, self.rpn_positive)
        best = tf.reduce_max(tf.where(real[:, None], overlap, 0.0), -1)
        negative = (best < self.rpn_negative) & ~positive
        chance = rois.luck(draws, anchors.shape[0], 1)
        most = int(self.rpn_samples * self.rpn_fraction)
        chosen = rois.sample(positive, negative, chance, self.rpn_samples, most)
        logits, outputs, index = (
            tf.gather(v, chosen.index, batch_dims=1) for v in (logits, outputs, index)
        )
        matched = tf.gather(boxes, index, batch_dims=1)
        anchors = tf.gather(anchors, chosen.index)
        targets = self._box_targets(matched, anchors, chosen.positive)
        score = tf.nn.sigmoid_cross_entropy_with_logits(
            tf.cast(chosen.positive, tf.float32), logits
        )
        box = losses.huber(outputs, targets, self.rpn_delta)
        return {
            "rpn_score": common.mean_where(score, chosen.used),
            "rpn_box": common.mean_where(box, chosen.positive[..., None]),
        }

    def propose(
        self, rpn: dict, sizes: tf.Tensor, *, before: int | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """[b, proposals_after, 4] boxes within [b, 2] image sizes, without gradient, and scores."""
        boxes = self.anchors.boxes((self.image_size, self.image_size))
        logits, targets = self._rpn_levels(rpn)
        anchors = tf.split(tf.constant(boxes), [v.shape[1] for v in logits])
        proposals, scores = rois.propose(
            list(zip(logits, targets, anchors, strict=True)), sizes,
            before=before or self.proposals_before_eval, after=self.proposals_after,
            iou_threshold=self.proposals_nms, inclusive=self.inclusive_boxes,
        )  # fmt: skip
        return tf.stop_gradient(proposals), tf.stop_gradient(scores)

    def sample_regions(self, proposals, scores, boxes, valid, batch: dict) -> Regions:
        """What the second stage trains on; the ground-truth boxes are candidates as well."""
        candidates = tf.concat([proposals, boxes], 1)
        there = tf.concat([scores > 0, valid], 1)
        overlap = tf.where(valid[:, None], box_ops.iou(candidates, boxes), 0.0)
        best = tf.reduce_max(overlap, -1)
        positive = there & (best >= self.region_iou)
        chance = rois.luck(batch["draws"], candidates.shape[1], 2)
        most = int(self.region_samples * self.region_fraction)
        chosen = rois.sample(positive, there & ~positive, chance, self.region_samples, most)
        index = tf.gather(tf.argmax(overlap, -1, output_type=tf.int32), chosen.index, batch_dims=1)
        classes = tf.gather(batch["classes"], index, batch_dims=1)
        return Regions(
            boxes=tf.gather(candidates, chosen.index, batch_dims=1),
            object=index,
            classes=tf.where(chosen.positive, classes, 0),
            used=chosen.used,
        )

    def box_losses(self, model, features: dict, regions: Regions, boxes, training: bool) -> dict:
        """Softmax cross entropy of all regions, Huber loss (delta 1) of those on objects."""
        logits, outputs = self._box_head(model, features, regions.boxes, training)
        cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(regions.classes, logits)
        outputs = rois.of_class(outputs, regions.classes[..., None], 2)
        matched = tf.gather(boxes, regions.object, batch_dims=1)
        positive = regions.classes > 0
        targets = self._box_targets(matched, regions.boxes, positive) * BOX_SCALES
        box = losses.huber(outputs, targets, 1.0)
        return {
            "class": common.mean_where(cross_entropy, regions.used),
            "box": common.mean_where(box, positive[..., None]),
        }

    def mask_loss(self, model, features: dict, regions: Regions, truth, frames, training) -> dict:
        """Cross entropy of the true class' mask, over the regions on objects.

        Args:
          truth: [b, n, m, m] masks of the objects. frames: [b, n, 4] boxes that they fill.
        """
        regions = Regions(*(part[:, : self.mask_samples] for part in regions))
        logits = self._mask_head(model, features, regions.boxes, regions.classes, training)
        truth, frames = (tf.gather(v, regions.object, batch_dims=1) for v in (truth, frames))
        seen = masks.crop_masks(truth, frames, regions.boxes, MASK_SIZE)
        targets = tf.cast(seen >= 0.5, tf.float32)
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
        return {"mask": common.mean_where(cross_entropy, (regions.classes > 0)[..., None, None])}

    def predict(self, model: keras.Model, batch: dict, *, native: bool = False) -> Instances:
        """Detections and masks in pixels of the source images; see `Detection.predict`."""
        images, view = common.look(batch, self.image_size)
        rpn = model.get_layer("rpn")(images, training=False)
        proposals, scores = self.propose(rpn, view.scaled)
        found = self.detect(model, rpn["features"], proposals, scores, view.scaled, native=native)
        logits = self._mask_head(model, rpn["features"], found.boxes, found.classes, False)
        there = (found.classes > 0)[..., None, None]
        probabilities = tf.where(there, tf.sigmoid(logits), 0.0)
        found = found._replace(boxes=common.to_source(found.boxes, batch, view))
        return Instances(*found, masks=probabilities)

    def detect(
        self, model, features: dict, proposals, scores, sizes, *, native: bool
    ) -> nms.Detections:
        """The second stage's boxes of [b, k, 4] proposals, clipped to [b, 2] image sizes."""
        logits, outputs = self._box_head(model, features, proposals, False)
        targets, inclusive = outputs[:, :, 1:] / BOX_SCALES, self.inclusive_boxes
        boxes = box_ops.decode(targets, proposals[:, :, None], inclusive)
        boxes = box_ops.clip(boxes, sizes, inclusive)  # [b, k, classes - 1, 4]
        classes = tf.nn.softmax(logits)[..., 1:] * tf.cast(scores > 0, tf.float32)[..., None]
        suppress = nms.native_nms if native else nms.static_nms
        return suppress(
            boxes,
            classes,
            limit=self.max_detections,
            iou_threshold=self.nms_threshold,
            score_threshold=self.score_threshold,
        )

    def row(self, image: tf.Tensor, canvas: int) -> dict[str, tf.Tensor]:
        """The row of a batch that `predict` needs, from one image: see `data.images.place`."""
        return place(image, canvas)

    def serve(self, found: Instances) -> dict[str, tf.Tensor]:
        """What a SavedModel returns; detection_masks [b, k, 28, 28] fill their boxes."""
        return {
            "num_detections": found.count,
            "detection_boxes": found.boxes,
            "detection_scores": found.scores,
            "detection_classes": found.classes,
            "detection_masks": found.masks,
        }

    def results(
        self, found: Instances, image_id: int, category_ids: dict, size: tuple[int, int]
    ) -> list[dict]:
        """COCO results of one image of (height, width): boxes and run lengths."""
        boxes = nms.Detections(*found[:4])
        rows = coco_boxes(boxes, image_id, category_ids)
        with_masks = coco_masks(boxes, found.masks, *size, image_id, category_ids)
        return [row | mask for row, mask in zip(rows, with_masks, strict=True)]

    def draw(self, image: np.ndarray, found: Instances, names: dict, min_score: float):
        """One image [h, w, 3] uint8 with its detections and masks from `min_score` on."""
        keep = found.scores >= min_score
        boxes, classes = found.boxes[keep], found.classes[keep]
        pasted = [
            masks.paste_mask(mask, box, *image.shape[:2])
            for mask, box in zip(found.masks[keep], boxes, strict=True)
        ]
        image = draw_masks(image, pasted, classes)
        return draw_boxes(image, boxes, classes, found.scores[keep], names)

    def _box_targets(self, boxes, anchors, positive) -> tf.Tensor:
        """Regression targets, 0 where not positive: an unused proposal may be a point."""
        targets = box_ops.encode(boxes, anchors, self.inclusive_boxes)
        return tf.where(positive[..., None], targets, 0.0)

    def _rpn_levels(self, rpn: dict) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Per level [b, a] logits and [b, a, 4] box outputs, in anchor order."""
        logits = [part[..., 0] for part in common.flatten(rpn["score"], 1)]
        return logits, common.flatten(rpn["box"], 4)

    def _box_head(self, model, features: dict, boxes, training: bool):
        """[b, k, 4] boxes -> [b, k, classes] logits and [b, k, classes, 4] box outputs."""
        cells = rois.roi_align(features, boxes, BOX_CELLS)
        outputs = _by_region(model.get_layer("box_head"), cells, training)
        shape = [tf.shape(boxes)[0], boxes.shape[1], self.num_classes]
        return tf.reshape(outputs["class"], shape), tf.reshape(outputs["box"], [*shape, 4])

    def _mask_head(self, model, features: dict, boxes, classes, training: bool):
        """[b, k, 28, 28] mask logits of [b, k] classes in [b, k, 4] boxes."""
        cells = rois.roi_align(features, boxes, MASK_CELLS)
        logits = _by_region(model.get_layer("mask_head"), cells, training)
        of_class = rois.of_class(logits, tf.reshape(classes, [-1, 1, 1]), -1)
        return tf.reshape(of_class, [tf.shape(boxes)[0], boxes.shape[1], MASK_SIZE, MASK_SIZE])


def _by_region(head: keras.Model, cells: tf.Tensor, training: bool):
    """Applies a head to [b, k, s, s, c] cells: every region is an image to it."""
    return head(tf.reshape(cells, [-1, *cells.shape[2:]]), training=training)
