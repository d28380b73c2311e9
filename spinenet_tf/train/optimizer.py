"""SGD with momentum, and its learning rate (section 5.1)."""

import dataclasses
import math

import gin
import tensorflow as tf


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step. Defaults: protocol B.

    Attributes:
      epochs: length of training.
      learning_rate: peak, for batches of `batch_size`; other batch sizes scale it linearly.
      batch_size: see `learning_rate`.
      kind: 'step' or 'cosine'.
      drops: 'step' only: the rate falls tenfold when this many epochs are left.
      warmup_epochs: linear rise from `warmup_start` times the peak.
      warmup_start: fraction of the peak (official code: 0.0067 of 0.28).
    """

    epochs: float = 350
    learning_rate: float = 0.28
    batch_size: int = 256
    kind: str = "step"
    drops: tuple[float, ...] = (30, 10)
    warmup_epochs: float = 5
    warmup_start: float = 0.0067 / 0.28

    def __post_init__(self):
        if self.kind not in ("step", "cosine"):
            raise ValueError(f"Schedule.kind={self.kind!r} is neither 'step' nor 'cosine'")

    def rate(self, step: tf.Tensor, *, batch_size: int, steps_per_epoch: float) -> tf.Tensor:
        """The learning rate of a step, counted from 0; float32 scalar."""
        peak = self.learning_rate * batch_size / self.batch_size
        epoch = tf.cast(step, tf.float32) / steps_per_epoch
        rising = self.warmup_start
        rising += (1.0 - self.warmup_start) * epoch / max(self.warmup_epochs, 1e-9)
        return peak * tf.where(epoch < self.warmup_epochs, rising, self._decay(epoch))

    def _decay(self, epoch: tf.Tensor) -> tf.Tensor:
        if self.kind == "step":
            passed = [tf.cast(epoch >= self.epochs - left, tf.float32) for left in self.drops]
            return tf.pow(0.1, tf.add_n(passed)) if passed else tf.ones([])
        progress = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return 0.5 * (1.0 + tf.cos(math.pi * tf.clip_by_value(progress, 0.0, 1.0)))


class Momentum(tf.Module):
    """velocity = momentum * velocity + gradient; variable -= rate * velocity.

    As in the paper's code: the rate is outside the velocity, while Keras bakes it in. The gradients
    given are already summed over the replicas, which lets the trainer clip the global ones; Keras'
    optimizers would clip each replica's and then sum.
    """

    def __init__(self, variables: list[tf.Variable], momentum: float):
        super().__init__()
        self._momentum = momentum
        self._variables = variables
        self.velocities = [
            tf.Variable(tf.zeros_like(v), trainable=False, name="velocity") for v in variables
        ]

    def apply(self, gradients: list[tf.Tensor], rate: tf.Tensor) -> None:
        """Updates all variables; to be called in a replica, with the same values in each."""
        pairs = zip(self._variables, self.velocities, gradients, strict=True)

        def update_all(strategy, rate, pairs):
            for variable, velocity, gradient in pairs:
                strategy.extended.update(variable, self._update, args=(velocity, gradient, rate))

        tf.__internal__.distribute.interim.maybe_merge_call(
            update_all, tf.distribute.get_strategy(), rate, list(pairs)
        )

    def _update(self, variable, velocity, gradient, rate):
        tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle, accum=velocity.handle, lr=tf.cast(rate, variable.dtype),
            grad=gradient, momentum=tf.cast(self._momentum, variable.dtype),
        )  # fmt: skip
