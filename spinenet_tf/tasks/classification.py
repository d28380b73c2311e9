"""What a classifier learns (sections 4.2 and 5.6, Appendix B)."""

import dataclasses
import json
from typing import ClassVar, NamedTuple

import gin
import keras
import numpy as np
import tensorflow as tf

from spinenet_tf.data.images import central_crop
from spinenet_tf.data.pipeline import Data
from spinenet_tf.draw import draw_text
from spinenet_tf.models.classifier import Classifier
from spinenet_tf.models.norm import over_replicas
from spinenet_tf.ops import augment
from spinenet_tf.tasks import common

TOP = 5  # classes of a prediction


class Guesses(NamedTuple):
    """The likeliest classes of each image, best first.

    Attributes:
      classes: [b, k] int32, from 1; k is 5, or all classes if they are fewer.
      scores: [b, k] float32, probabilities.
    """

    classes: tf.Tensor
    scores: tf.Tensor


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Image classification. Defaults: ImageNet at 224 px.

    Attributes:
      image_size: side in pixels of the network's square input; `Data.canvas` must be the same.
      num_classes: with the background, class 0, which is never an answer.
      label_smoothing: share of the target that is spread over all classes (Appendix B: 0.1).
    """

    image_size: int = 224
    num_classes: int = 1001
    label_smoothing: float = 0.0

    network: ClassVar = "Classifier"  # the builder that gin binds
    labels: ClassVar = ("class", "class")  # what to read in training and in evaluation
    log_names: ClassVar = ("class", "l2", "total")
    augmentation: ClassVar = None  # random views are made by the host, which decodes only them

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} is not in [0, 1)")
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes}: it counts the background")

    def build(self) -> keras.Model:
        """The classifier for this task's input and classes; gin says which one."""
        shape = (self.image_size, self.image_size, 3)
        return Classifier(num_classes=self.num_classes, input_shape=shape)

    def runs(self, training: bool = False) -> dict[str, int]:
        """How often an image runs nested models: there are none."""
        return {}

    def metric(self, data: Data) -> "TopMetric":
        """An empty top-1 and top-5 metric."""
        return TopMetric()

    def loss(self, model: keras.Model, batch: dict, *, training: bool):
        """The loss of one replica's part of the batch; the parts sum to the global batch's mean.

        Returns:
          (total, {'class', 'l2', 'total'}), float32 scalars.
        """
        logits = model(self.normalise(batch["image"]), training=training)
        truth = tf.one_hot(batch["label"], self.num_classes)
        truth = truth * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        cross_entropy = tf.nn.softmax_cross_entropy_with_logits(truth, logits)
        images = over_replicas(tf.cast(tf.shape(logits)[0], tf.float32))
        decay = common.weight_decay(model)
        parts = {"class": tf.reduce_sum(cross_entropy) / images, "l2": decay}
        total = parts["class"] + decay
        return total, parts | {"total": total}

    def predict(self, model: keras.Model, batch: dict, *, native: bool = False) -> Guesses:
        """The five likeliest classes; the background is none."""
        logits = model(self.normalise(batch["image"]), training=False)
        scores, index = tf.math.top_k(tf.nn.softmax(logits)[:, 1:], min(TOP, self.num_classes - 1))
        return Guesses(index + 1, scores)

    def normalise(self, images: tf.Tensor) -> tf.Tensor:
        """[b, s, s, 3] uint8 -> float32 by the statistics of ImageNet.

        Raises:
          ValueError: another size than the network's.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {tuple(images.shape[1:3])}, Classification.image_size="
                f"{self.image_size}: set Data.canvas to it"
            )
        return augment.normalise(images)

    def row(self, image: tf.Tensor, canvas: int) -> dict[str, tf.Tensor]:
        """The row of a batch that `predict` needs, from one image: see `images.central_crop`."""
        return {"image": central_crop(image, self.image_size)}

    def serve(self, found: Guesses) -> dict[str, tf.Tensor]:
        """What a SavedModel returns."""
        return {"classes": found.classes, "scores": found.scores}

    def results(self, found: Guesses, image_id: int, category_ids: dict, size) -> list[dict]:
        """One JSON row for an image: its likeliest labels, their category ids and their scores."""
        labels = [int(label) for label in found.classes]
        ids = [category_ids.get(label, label) for label in labels]
        scores = [float(score) for score in found.scores]
        return [{"image_id": image_id, "labels": labels, "category_ids": ids, "scores": scores}]

    def draw(self, image: np.ndarray, found: Guesses, names: dict, min_score: float) -> np.ndarray:
        """One image [h, w, 3] uint8 with the names and scores of its likely guesses."""
        pairs = zip(found.classes.tolist(), found.scores.tolist(), strict=True)
        lines = [f"{names.get(c, c)} {score:.2f}" for c, score in pairs if score >= min_score]
        return draw_text(image, lines)


class TopMetric:
    """Top-1 and top-5 accuracy."""

    def __init__(self):
        self.results: list[dict] = []

    def update(self, batch: dict, found: Guesses) -> None:
        """Adds a batch (arrays; see `data.pipeline`) and its guesses; skips rows of id -1."""
        ids, labels, classes = (np.asarray(v) for v in (batch["id"], batch["label"], found.classes))
        for i in np.flatnonzero(ids >= 0):
            row = {"image_id": int(ids[i]), "label": int(labels[i]), "classes": classes[i].tolist()}
            self.results.append(row)

    def result(self) -> dict[str, float]:
        """{'top1', 'top5'} in 0..1; -1 where there was no image."""
        if not self.results:
            return {"top1": -1.0, "top5": -1.0}
        places = [
            r["classes"].index(r["label"]) for r in self.results if r["label"] in r["classes"]
        ]
        counts = {"top1": places.count(0), "top5": len(places)}
        return {name: count / len(self.results) for name, count in counts.items()}

    def write(self, path: str) -> None:
        """Writes every image's label and guesses."""
        with tf.io.gfile.GFile(path, "w") as file:
            json.dump(self.results, file)
