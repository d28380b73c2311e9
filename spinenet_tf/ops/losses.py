"""Losses, element by element; the task sums and normalises. float32 in and out."""

import tensorflow as tf


def focal(logits: tf.Tensor, targets: tf.Tensor, alpha: float, gamma: float) -> tf.Tensor:
    """Sigmoid focal loss (RetinaNet eq. 5): -alpha_t (1 - p_t)**gamma log(p_t).

    Args:
      logits: [...] float32.
      targets: [...] float32, 1 for the class and 0 elsewhere.
      alpha: weight of the positive targets; the negative ones weigh 1 - alpha.

    Returns:
      [...] float32. Value and gradient stay finite at any logit.
    """
    cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
    # 1 - p_t = sigmoid(-logit * (2 target - 1)); through its logarithm, pow() has no pole at 0.
    log_missed = tf.math.log_sigmoid(logits * (1.0 - 2.0 * targets))
    weight = targets * alpha + (1.0 - targets) * (1.0 - alpha)
    return weight * tf.exp(gamma * log_missed) * cross_entropy


def huber(predictions: tf.Tensor, targets: tf.Tensor, delta: float) -> tf.Tensor:
    """error**2 / 2 up to `delta`, linear beyond: delta * (|error| - delta / 2). [...] -> [...]."""
    error = tf.abs(predictions - targets)
    quadratic = tf.minimum(error, delta)
    return quadratic * (error - quadratic / 2)
