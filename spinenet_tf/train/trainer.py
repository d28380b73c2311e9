"""The training loop: a task, batches and a strategy in; checkpoints, summaries and figures out."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, Protocol

import gin
import keras
import tensorflow as tf

from spinenet_tf.checkpoints import folder, load
from spinenet_tf.data.check import named_errors
from spinenet_tf.data.pipeline import Data, eval_batches, train_batches
from spinenet_tf.data.report import Report
from spinenet_tf.models.device import on_tpu, varying_shapes
from spinenet_tf.models.keras_layers import training_progress
from spinenet_tf.train.averages import merger
from spinenet_tf.train.gradients import gradient
from spinenet_tf.train.optimizer import Momentum, Schedule
from spinenet_tf.train.progress import NoticeSigterm, Progress
from spinenet_tf.train.strategy import gather, input_is_here, is_chief

OPTIMIZER_LOGS = ("gradient_norm", "learning_rate")
PREEMPTED = 143  # exit status after SIGTERM: 128 + 15, so that a supervisor starts us again


class Task(Protocol):
    """What the trainer asks of a task; see `tasks.detection.Detection`."""

    network: str  # the gin name of its model's builder
    labels: tuple[str, str]  # what `data.pipeline` reads in training and in evaluation
    log_names: tuple[str, ...]  # of the scalars that `loss` returns
    num_classes: int  # with the background
    augmentation: Any  # `ops.augment.Augmentation` of training, None if the host crops

    def build(self) -> keras.Model:
        """The model, untrained."""

    def loss(self, model: keras.Model, batch: dict, *, training: bool) -> tuple[Any, dict]:
        """One replica's part of the loss, and of each logged scalar."""

    def predict(self, model: keras.Model, batch: dict, *, native: bool) -> tuple:
        """What the metric judges; first axis the batch's."""

    def metric(self, data: Data) -> Any:
        """An object with update(batch, predictions), result() and write(path)."""

    def row(self, image: Any, canvas: int) -> dict[str, Any]:
        """The row of a batch that `predict` needs, from one image, decoded or (string) encoded."""

    def serve(self, found: tuple) -> dict[str, Any]:
        """What a SavedModel returns of a prediction."""

    def results(self, found: tuple, image_id: int, category_ids: dict, size: tuple) -> list[dict]:
        """JSON rows of one image's prediction."""

    def draw(self, image: Any, found: tuple, names: dict, min_score: float) -> Any:
        """A picture of one image's prediction."""


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How to run training.

    Attributes:
      steps: overrides the schedule's length, for tries; 0 does not.
      steps_per_loop: steps of one compiled call; summaries and the progress line come once a call.
      checkpoint_every: steps between checkpoints.
      keep: checkpoints kept.
      eval_every: steps between evaluations in train_and_eval; 0: only at the end.
      momentum: of SGD.
      clip: largest global norm of the gradient; 0 does not clip. Official code: 10, per shard.
      precision: of training and evaluation: 'mixed_bfloat16', as on TPU, or 'float32'. Prediction
        and export always compute in float32.
      xla: compile the step with XLA off TPU as well (one device only).
      seed: of the initial weights and of stochastic depth.
      deterministic: only use operations whose result does not depend on thread timing.
      init_from: checkpoint to start from instead of random weights: of the official code, of Model
        Garden or ours; its classes may differ. The flag --init_checkpoint sets it.
      init_part: of that, 'model' or only the 'backbone'.
      examples: training images, where the data set's sidecar does not say and counting is slow.
    """

    steps: int = 0
    steps_per_loop: int = 100
    checkpoint_every: int = 1000
    keep: int = 3
    eval_every: int = 0
    momentum: float = 0.9
    clip: float = 0.0
    precision: str = "mixed_bfloat16"
    xla: bool = False
    seed: int = 0
    deterministic: bool = False
    init_from: str = ""
    init_part: str = "model"
    examples: int = 0

    def __post_init__(self):
        if self.xla and self.deterministic:  # XLA has no deterministic max-pool gradient
            raise ValueError("Training.xla and Training.deterministic exclude each other")
        for name in ("steps_per_loop", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"Training.{name}={getattr(self, name)} is less than 1")

    def set_up(self) -> None:
        """Sets precision, seed and determinism of the process. Call before a model is built."""
        keras.config.set_dtype_policy(self.precision)
        keras.utils.set_random_seed(self.seed)
        if self.deterministic:
            tf.config.experimental.enable_op_determinism()


class Run:
    """One training run in a folder: builds or resumes it, trains, evaluates."""

    def __init__(self, task: Task, trainer: Training, model_dir: str, strategy=None):
        self.task, self.trainer, self.model_dir = task, trainer, model_dir
        self.strategy = strategy or tf.distribute.get_strategy()
        trainer.set_up()
        with self.strategy.scope():
            if trainer.xla and self.strategy.num_replicas_in_sync > 1 and not on_tpu():
                raise ValueError("Training.xla: set make_strategy.kind='one_device' as well")
            self.model = task.build()
            self.varying = not (trainer.xla or on_tpu())  # no XLA: shapes may depend on the data
            variables = [v.value for v in self.model.trainable_variables]
            self.optimizer = Momentum(variables, trainer.momentum)
            self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
        self.merge_averages = merger(self.strategy, self.model)
        self.checkpoint = folder.checkpoint(self.model, self.optimizer, self.step)
        self.manager = tf.train.CheckpointManager(
            self.checkpoint, self._checkpoint_dir(), trainer.keep, step_counter=self.step
        )

    @property
    def is_chief(self) -> bool:
        """Whether this process writes what there is one of."""
        return is_chief(self.strategy)

    def resume(self) -> int:
        """The step to go on from.

        1. A checkpoint in the model folder: restores all of it. 2. None, but `Training.init_from`:
        takes the weights from there. 3. Neither: leaves the random ones.
        """
        latest = tf.train.latest_checkpoint(self.model_dir)
        if latest:
            folder.restore(self.checkpoint, latest)
        elif self.trainer.init_from:
            load.initialize(self.model, self.task, self.trainer.init_from, self.trainer.init_part)
        return int(self.step.numpy())

    def train(
        self, data: Data, schedule: Schedule, after_loop: Callable[[int], None] = lambda step: None
    ) -> None:
        """Trains from the step it is at (see `resume`) to the end of the schedule.

        Raises:
          FloatingPointError: the loss is not finite; names the steps.
          SystemExit: (143) after a SIGTERM and a last checkpoint.
        """
        steps_per_epoch = (self.trainer.examples or data.num_examples()) / data.batch_size
        total = self.trainer.steps or math.ceil(schedule.epochs * steps_per_epoch)
        start = int(self.step.numpy())
        train_steps = self._compile(
            lambda step: schedule.rate(
                step, batch_size=data.batch_size, steps_per_epoch=steps_per_epoch
            ),
            total,
        )
        report, about = Report(data.bad_records), self._about(data, 0)
        batches = iter(
            self._distribute(
                lambda **at: train_batches(
                    step=start, augmentation=self.task.augmentation, report=report, **about, **at
                )
            )
        )
        progress = Progress(
            start, total, data.batch_size, self.task.log_names, self.summary_writer("train")
        )
        with NoticeSigterm() as came, named_errors(**about):
            for step in self._loops(start, total):
                logs = train_steps(batches, tf.constant(step - progress.step))
                self._check_finite(logs, progress.step, step)
                progress.report(step, logs)
                stop = came.anywhere(self.strategy)
                if step == total or self._saves(step) or stop:
                    self.merge_averages()
                    self.manager.save(checkpoint_number=self.step)
                    progress.flush()
                if stop:
                    print(f"SIGTERM: saved step {step} in {self.model_dir}", flush=True)
                    sys.exit(PREEMPTED)
                after_loop(step)
        if report.counts:
            print(f"input: {report}", flush=True)

    def evaluate(self, data: Data, look: Callable[[dict, tuple], None] = lambda b, d: None) -> Any:
        """The task's metric over all images, with the weights as they are.

        `look` sees the first batch, images included, and its detections.
        """
        self.merge_averages()
        metric, about = self.task.metric(data), self._about(data, 1)
        report = Report(data.bad_records)
        batches = self._distribute(lambda **at: eval_batches(report=report, **about, **at))
        with named_errors(**about):
            self._evaluate(batches, metric, look)
        if report.counts:
            print(f"input: {report}", flush=True)
        return metric

    def _evaluate(self, batches, metric: Any, look: Callable[[dict, tuple], None]) -> None:
        for number, batch in enumerate(batches):
            found = self._predict(batch)
            detections = type(found)(*(gather(self.strategy, part) for part in found))
            wanted = batch.keys() - ({"draws", "image"} if number else {"draws"})
            # Sorted: all workers must gather in one order, and a set has another in each process.
            labels = {name: gather(self.strategy, batch[name]) for name in sorted(wanted)}
            metric.update(labels, detections)
            if not number:
                look(labels, detections)

    def _about(self, data: Data, which: int) -> dict:
        """What the input of training (0) or evaluation (1) has to know."""
        return dict(data=data, labels=self.task.labels[which], num_classes=self.task.num_classes)

    def replica_step(self, batch: dict, learning_rate: tf.Tensor, total_steps: int) -> dict:
        """One replica's step on its batch: updates the weights, returns all replicas' logs."""
        progress = tf.cast(self.step, tf.float32) / total_steps
        with training_progress(progress), varying_shapes(self.varying):
            with tf.GradientTape() as tape:
                total, logs = self.task.loss(self.model, batch, training=True)
            gradients = gradient(tape, total, self.model)
        replica = tf.distribute.get_replica_context()
        gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        norm = tf.linalg.global_norm(gradients)
        if self.trainer.clip:
            gradients, _ = tf.clip_by_global_norm(gradients, self.trainer.clip, norm)
        self.optimizer.apply(gradients, learning_rate)
        # Summed here and at once: outside, a TPU host would fetch each scalar of each replica.
        sums = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(list(logs.values())))
        logs = dict(zip(logs, tf.unstack(sums), strict=True))
        return logs | {"gradient_norm": norm, "learning_rate": learning_rate}

    def _compile(self, rate: Callable[[tf.Tensor], tf.Tensor], total_steps: int):
        """Returns train_steps(iterator, n) -> mean logs of n steps."""

        @tf.function(jit_compile=self.trainer.xla, autograph=False)  # nothing to convert
        def replica_step(batch):
            return self.replica_step(batch, rate(self.step), total_steps)

        def one_step(iterator):
            logs = self.strategy.run(replica_step, (next(iterator),))
            self.step.assign_add(1)
            return {k: self.strategy.experimental_local_results(v)[0] for k, v in logs.items()}

        @tf.function
        def train_steps(iterator, n):
            sums = {k: tf.zeros([]) for k in (*self.task.log_names, *OPTIMIZER_LOGS)}
            for _ in tf.range(n):
                logs = one_step(iterator)
                sums = {k: v + logs[k] for k, v in sums.items()}
            return {k: v / tf.cast(n, tf.float32) for k, v in sums.items()}

        return train_steps

    @functools.cached_property
    def _predict(self):
        """Compiled once a run: batch -> the detections of every replica."""
        native = not isinstance(self.strategy, tf.distribute.TPUStrategy)

        def replica_predict(batch):
            return self.task.predict(self.model, batch, native=native)

        return tf.function(
            lambda batch: self.strategy.run(replica_predict, (batch,)), autograph=False
        )

    def _distribute(self, make: Callable[..., tf.data.Dataset]):
        def make_for(context):
            return make(
                pipeline=context.input_pipeline_id,
                pipelines=context.num_input_pipelines,
                replicas=context.num_replicas_in_sync,
                python=input_is_here(self.strategy),
            )

        return self.strategy.distribute_datasets_from_function(make_for)

    def _saves(self, step: int) -> bool:
        """Whether a checkpoint is due; before an evaluation too, which may outlast a notice."""
        every = (self.trainer.checkpoint_every, self.trainer.eval_every)
        return any(step % n == 0 for n in every if n)

    def _loops(self, start: int, total: int):
        """The steps at which a compiled call ends: multiples of each length, and the end."""
        step, trainer = start, self.trainer
        every = [trainer.steps_per_loop, trainer.checkpoint_every, trainer.eval_every]
        while step < total:
            step = min(total, *(step - step % n + n for n in every if n))
            yield step

    def _check_finite(self, logs: dict, first: int, last: int) -> None:
        broken = sorted(k for k, v in logs.items() if not math.isfinite(float(v)))
        if broken:
            raise FloatingPointError(
                f"{', '.join(broken)} not finite in steps {first + 1} to {last}; the last good "
                f"checkpoint is {self.manager.latest_checkpoint}. Lower Schedule.learning_rate or "
                "set Training.clip=10."
            )

    def _checkpoint_dir(self) -> str:
        """All workers save, since collectives demand it; only the chief's files count."""
        if self.is_chief:
            return self.model_dir
        resolver = self.strategy.cluster_resolver
        return f"{self.model_dir}/{resolver.task_type}_{resolver.task_id}"

    def summary_writer(self, name: str):
        """A TensorBoard writer of `<model_dir>/<name>`; one that drops all where not chief."""
        if not self.is_chief:
            return tf.summary.create_noop_writer()
        return tf.summary.create_file_writer(f"{self.model_dir}/{name}")
