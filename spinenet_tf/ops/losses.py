"""Losses, element by element; the task sums and normalises. float32 out."""

import tensorflow as tf


def focal(logits: tf.Tensor, targets: tf.Tensor, alpha: float, gamma: float) -> tf.Tensor:
    """Sigmoid focal loss (RetinaNet eq. 5): -alpha_t (1 - p_t)**gamma log(p_t).

    Its gradient is written out, since it costs as much as the value, where a derived one costs
    many times that.

    Args:
      logits: [...] float32.
      targets: [...] bool, the places of the class.
      alpha: weight of the positive targets; the negative ones weigh 1 - alpha.

    Returns:
      [...] float32. Value and gradient stay finite at any logit.
    """

    @tf.custom_gradient
    def loss(logits):
        def parts():
            # Of x = -logit where the target is 1, else logit, 1 - p_t is sigmoid(x) and
            # -log(p_t) softplus(x); through logarithms, no power has a pole at 0.
            x = tf.where(targets, -logits, logits)
            small = tf.math.log1p(tf.exp(-tf.abs(x)))
            log_missed = tf.minimum(x, 0.0) - small
            weight = tf.where(targets, alpha, 1.0 - alpha) * tf.exp(gamma * log_missed)
            return weight, tf.maximum(x, 0.0) + small, tf.exp(log_missed)

        def gradient(upstream):
            weight, cross_entropy, missed = parts()
            slope = weight * (gamma * (1.0 - missed) * cross_entropy + missed)
            return upstream * tf.where(targets, -slope, slope)

        weight, cross_entropy, _ = parts()
        return weight * cross_entropy, gradient

    return loss(logits)


def huber(predictions: tf.Tensor, targets: tf.Tensor, delta: float) -> tf.Tensor:
    """error**2 / 2 up to `delta`, linear beyond: delta * (|error| - delta / 2). [...] -> [...]."""
    error = tf.abs(predictions - targets)
    quadratic = tf.minimum(error, delta)
    return quadratic * (error - quadratic / 2)
