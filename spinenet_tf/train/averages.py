"""Batch norm's moving averages under several replicas."""

from collections.abc import Callable

import keras
import tensorflow as tf


def merger(strategy: tf.distribute.Strategy, model: keras.Model) -> Callable[[], None]:
    """Returns what makes each moving average the mean of the replicas'.

    Unless batch norm is synchronized, replicas have averages of their own, of which a checkpoint
    keeps the first replica's: evaluations in training and after it would be of other ones. Merging
    early or late is the same, since averages are linear in what they average.
    """
    if strategy.num_replicas_in_sync == 1:
        return lambda: None
    averages = [v.value for v in model.non_trainable_variables if v.dtype.startswith("float")]

    def merge():
        # Not convert_to_tensor: a worker's only replica must tell on which device its values are.
        values = [tf.identity(average) for average in averages]
        means = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, values)
        for average, mean in zip(averages, means, strict=True):
            average.assign(mean)

    return tf.function(lambda: strategy.run(merge), autograph=False)
