"""What the tasks share: how images are seen, means over replicas, weight decay."""

import keras
import tensorflow as tf

from spinenet_tf.models.device import shapes_may_vary
from spinenet_tf.models.norm import over_replicas
from spinenet_tf.ops import augment, boxes


def look(
    batch: dict, size: int, augmentation: augment.Augmentation | None = None
) -> tuple[tf.Tensor, augment.View]:
    """The network's input: images fitted to `size` pixels or augmented at random.

    Batches of host mode (with `viewed`) are random views already, and only normalised.

    Returns:
      [b, size, size, 3] float32, normalised, and the view that made them.
    """
    if "viewed" in batch:
        view = augment.identity_view(batch["image_size"])
    elif augmentation is None:
        view = augment.fit_view(batch["image_size"], size)
    else:
        view = augment.random_view(batch["image_size"], augmentation, batch["draws"])
    return augment.view_images(batch["image"], batch["image_size"], view, size), view


def seen_objects(batch: dict, view: augment.View, size: int):
    """The objects of a batch as `view` shows them.

    Returns:
      [b, n, 4] boxes clipped to the input, [b, n, 4] whole boxes, and [b, n] bool: no padding, no
      crowd, not cropped away.
    """
    whole = augment.view_boxes(batch["boxes"], batch["image_size"], view)
    clipped = tf.clip_by_value(whole, 0.0, float(size))
    valid = (batch["classes"] > 0) & ~batch["crowd"] & (boxes.area(clipped) > 0)
    return clipped, whole, valid


def without_padding(boxes: tf.Tensor, valid: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """[b, n, 4] boxes and [b, n] bool up to the last valid box of any image, where shapes may vary.

    An image has 7 boxes on average and place for 100; at least one is kept.
    """
    if not shapes_may_vary():
        return boxes, valid
    places = tf.where(valid, tf.range(1, tf.shape(valid)[1] + 1), 1)
    last = tf.reduce_max(places)
    return boxes[:, :last], valid[:, :last]


def to_source(found: tf.Tensor, batch: dict, view: augment.View) -> tf.Tensor:
    """[b, n, 4] boxes of a fitted view -> pixels of the images in their files."""
    ratio = tf.cast(batch["source_size"], tf.float32) / view.scaled
    return found * tf.tile(ratio, [1, 2])[:, None]


def flatten(maps: dict, values: int) -> list[tf.Tensor]:
    """{'P3': [b, h, w, anchors * values], ...} -> per level [b, h * w * anchors, values]."""
    flat = []
    for name in sorted(maps):
        _, height, width, channels = maps[name].shape
        flat.append(tf.reshape(maps[name], [-1, height * width * channels // values, values]))
    return flat


def mean_where(values: tf.Tensor, where: tf.Tensor) -> tf.Tensor:
    """One replica's part of the mean over all replicas' values where `where` holds, or 0."""
    weights = tf.broadcast_to(tf.cast(where, tf.float32), tf.shape(values))
    total = over_replicas(tf.reduce_sum(weights))
    return tf.reduce_sum(values * weights) / tf.maximum(total, 1.0)


def weight_decay(model: keras.Model) -> tf.Tensor:
    """One replica's share of the model's regularisation loss."""
    losses = model.losses  # computed anew by every look
    decay = tf.cast(tf.add_n(losses), tf.float32) if losses else tf.constant(0.0)
    return decay / tf.distribute.get_replica_context().num_replicas_in_sync


def check_levels(anchors, maps: dict) -> None:
    """Compares the levels of anchors and of a built model's predictions.

    Raises:
      ValueError: they differ.
    """
    missing = {f"P{level}" for level in anchors.levels} ^ set(maps)
    if missing:
        raise ValueError(f"backbone and Anchors.levels do not agree on {sorted(missing)}")
