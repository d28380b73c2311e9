"""The arithmetic of batch norm, for layers that hold batch norms (`models.pointwise.Held`)."""

import keras
from keras import ops


def normalized(y, norms: list[keras.layers.BatchNormalization], columns: int, training: bool):
    """Batch norm of [b, h, w, n * columns * d], the maps of n convolutions, `columns` of each.

    See `models.pairs` for columns. In training by the statistics over all places and replicas, by
    which the averages move.
    """
    exact, moments = ops.cast(y, wide(y)), [None] * len(norms)
    if training:
        moments = _statistics(exact, len(norms), columns, norms[0].synchronized)
    pairs = zip(*map(affine, norms, moments), strict=True)
    scale, offset = (_lanes(part, columns) for part in pairs)
    return ops.cast(exact * scale + offset, y.dtype)


def _lanes(parts, columns: int):
    """Numbers [d] of each of several convolutions, for all columns: [n * columns * d]."""
    return ops.concatenate([ops.tile(part, columns) for part in parts])


def _statistics(y, groups: int, columns: int, synchronized: bool) -> list:
    """Means and variances [d] over all places and replicas of [b, h, w, groups * columns * d]."""
    sums = ops.stack([ops.sum(y, (0, 1, 2)), ops.sum(y * y, (0, 1, 2))])
    sums = ops.sum(ops.reshape(sums, [2, groups, columns, -1]), axis=2)
    count = ops.cast(ops.prod(ops.shape(y)[:-1]) * columns, sums.dtype)
    if synchronized:
        sums, count = over_replicas(sums), over_replicas(count)
    mean, square = sums[0] / count, sums[1] / count
    variance = ops.maximum(square - mean * mean, 0.0)
    return [(mean[i], variance[i]) for i in range(groups)]


def affine(norm: keras.layers.BatchNormalization, moments):
    """The scale and the offset [c] of a batch norm, by its averages or by a batch's mean, variance.

    The latter move the averages.
    """
    mean, variance = moments or (norm.moving_mean, norm.moving_variance)
    if moments:
        for average, new in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
            average.assign(average * norm.momentum + new * (1.0 - norm.momentum))
    scale = norm.gamma * ops.rsqrt(variance + norm.epsilon)
    return scale, norm.beta - mean * scale


def wide(x) -> str:
    """The dtype of statistics of x: float32 at least."""
    return keras.backend.result_type(x.dtype, "float32")


def over_replicas(value):
    """The sum over the replicas of a strategy."""
    import tensorflow as tf  # not at the top: the same model runs without TensorFlow

    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value) if context else value
