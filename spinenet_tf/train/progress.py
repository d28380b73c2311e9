"""The progress line, its TensorBoard scalars, and the notice of a SIGTERM."""

import signal
import time

import tensorflow as tf

from spinenet_tf.train.strategy import gather, many_workers


class Progress:
    """Prints a line and writes TensorBoard scalars after each compiled call."""

    def __init__(self, step: int, total: int, batch_size: int, log_names: tuple, writer):
        self.step, self._total, self._batch_size, self._writer = step, total, batch_size, writer
        self._parts = [name for name in log_names if name != "total"]
        self._time = time.monotonic()
        if step:
            print(f"going on from step {step} of {total}" + "; nothing to do" * (step >= total))

    def report(self, step: int, logs: dict) -> None:
        """Reports the mean logs of the steps up to `step`."""
        now = time.monotonic()
        speed = (step - self.step) / max(now - self._time, 1e-9)
        self.step, self._time = step, now
        logs = {k: float(v) for k, v in logs.items()}
        logs |= {"steps_per_second": speed, "images_per_second": speed * self._batch_size}
        with self._writer.as_default(step):
            for name, value in logs.items():
                tf.summary.scalar(name, value)
        print(self._line(step, speed, logs), flush=True)

    def flush(self) -> None:
        """Writes the scalars so far; else TensorFlow does, every two minutes."""
        self._writer.flush()

    def _line(self, step: int, speed: float, logs: dict) -> str:
        parts = " ".join(f"{k} {logs[k]:.3f}" for k in self._parts)
        left = int((self._total - step) / speed)
        return (
            f"step {step}/{self._total}  loss {logs['total']:.3f} ({parts})  "
            f"lr {logs['learning_rate']:.4f}  {logs['images_per_second']:.1f} images/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )


class NoticeSigterm:
    """`with NoticeSigterm() as came`: `came` is true once SIGTERM has come."""

    def __enter__(self):
        self._came = False
        self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._old)

    def __bool__(self):
        return self._came

    def anywhere(self, strategy: tf.distribute.Strategy) -> bool:
        """Whether it has come to any worker: all must leave the loop at the same step."""
        if not many_workers(strategy):
            return bool(self)
        come = strategy.run(lambda: tf.constant([int(bool(self))]))
        return bool(gather(strategy, come).any())

    def _note(self, *_):
        self._came = True
