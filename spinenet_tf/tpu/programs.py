"""A recipe's training step and prediction as XLA programs: what one replica runs on its device."""

from collections.abc import Callable

import keras
import tensorflow as tf

from spinenet_tf.data.pipeline import Data, batch_spec
from spinenet_tf.models.device import for_tpu
from spinenet_tf.train.optimizer import Schedule
from spinenet_tf.train.trainer import Run, Training

STEPS = 100_000  # of the schedule; the program holds it as a number only


def train_step(task, trainer: Training, data: Data, schedule: Schedule, batch: int) -> bytes:
    """The whole of a replica's step on `batch` images, from uint8 canvases to new weights.

    Batch statistics and gradients are not summed with other replicas', as there are none here.

    Returns:
      A serialized HLO module.
    """
    with for_tpu(batch):
        run = Run(task, trainer, "")

    def step(*columns):
        rate = schedule.rate(run.step, batch_size=data.batch_size, steps_per_epoch=STEPS / 100)
        logs = run.replica_step(tf.nest.pack_sequence_as(spec, columns), rate, STEPS)
        run.step.assign_add(1)
        return logs

    spec = batch_spec(data, batch, task.labels[0])
    return lower(step, tf.nest.flatten(spec))


def predict(task, trainer: Training, data: Data, batch: int) -> bytes:
    """Prediction of `batch` images as in evaluation: fitted, through the model, suppressed."""
    trainer.set_up()
    with for_tpu(batch):
        model = task.build()
    spec = batch_spec(data, batch, task.labels[1])

    def run(*columns):
        return task.predict(model, tf.nest.pack_sequence_as(spec, columns), native=False)

    return lower(run, tf.nest.flatten(spec))


def lower(function: Callable, specs: list[tf.TensorSpec]) -> bytes:
    """The serialized HLO module of a function of tensors; the variables it uses are arguments.

    Raises:
      tf.errors.OpError: XLA cannot compile an operation of it.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)
    module = compiled.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")
    keras.backend.clear_session(free_memory=False)
    return module
