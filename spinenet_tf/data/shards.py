"""Sharded files of records, made by parallel processes and restartable.

`write_shards` makes `<prefix>-00000-of-00008.tfrecord` and so on; `<prefix>.state.json` remembers
the finished ones, so that a restart goes on where it was stopped. A shard is made by one process,
here or (`data/beam.py`) on another machine, under a name of its own, and renamed when it is whole.
"""

import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, NamedTuple

import tensorflow as tf

FRAME = 16  # bytes around a record in its file: its length and two checksums
IMAGES_PER_PROCESS = 64  # fewer are not worth the start of another process
TICK = 0.2  # seconds between looks at what the processes have done


class Converted(NamedTuple):
    """What became of one image."""

    example: bytes | None  # None if the image was rejected
    counts: Counter
    rejected: list[dict]  # this image or annotations of it, with the reasons


class Rejection(Exception):
    """Why an image or an annotation cannot be used."""

    def __init__(self, field: str, value: object, reason: str):
        super().__init__(field, value, reason)

    def entry(self, image_id: object, annotation_id: object = None) -> dict:
        """The line of the summary's `rejected` list."""
        field, value, reason = self.args
        ids = {"annotation_id": annotation_id, "image_id": image_id}
        # repr, because NaN and infinity have no place in JSON.
        return ids | {"field": field, "value": repr(value)[:200], "reason": reason}


def finite(values: object) -> bool:
    """Whether it is a list of finite numbers."""
    if not isinstance(values, list) or not {int, float}.issuperset(map(type, values)):
        return False
    return all(map(math.isfinite, values))


class Shard(NamedTuple):
    """A file to be written."""

    path: str
    jobs: list  # one an image
    convert: Callable[[Any], Converted]


Runner = Callable[[list[Shard]], Iterable[tuple[str, dict]]]  # as `in_processes`


class Progress:
    """One line on stderr: images done of all, images a second, time left."""

    def __init__(self, total: int):
        self.total, self.done, self.first = total, 0, 0
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Shows the line if anything has changed and it is due."""
        if done == self.done:
            return
        now = time.monotonic()
        if not self.done:  # processes had to be started before the first
            self.first, self.start = done, now
        self.done = done
        if now - self.shown < (0.2 if self.live else 5.0) and self.done < self.total:
            return
        self.shown = now
        rate = max(self.done - self.first, 1) / max(now - self.start, 1e-6)
        left = int((self.total - self.done) / rate)
        clock = f"{left // 60}:{left % 60:02}"
        line = f"{self.done}/{self.total} images, {rate:.1f} images/s, {clock} left"
        end = "\r" if self.live and self.done < self.total else "\n"
        print(line.ljust(60), end=end, file=sys.stderr, flush=True)


def write_json(path: str, value: dict) -> None:
    """Writes the whole file or nothing."""
    with tf.io.gfile.GFile(f"{path}.partial", "w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False))
    tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)


def write_shard(shard: Shard, done: Callable[[], None] = lambda: None) -> dict:
    """Converts the images of one shard; calls `done` after each.

    Returns:
      {'counts': {..}, 'rejected': [..]}
    """
    counts, rejected = Counter(examples=0), []
    partial = f"{shard.path}.{os.urandom(4).hex()}.partial"  # a killed run's worker may still write
    with tf.io.TFRecordWriter(partial) as writer:
        for job in shard.jobs:
            result = shard.convert(job)
            if result.example is not None:
                writer.write(result.example)
            counts += result.counts
            rejected += result.rejected
            done()
    tf.io.gfile.rename(partial, shard.path, overwrite=True)
    return {"counts": counts, "rejected": rejected}


def in_processes(shards: list[Shard], workers: int | None = None) -> Iterator[tuple[str, dict]]:
    """Writes shards in parallel processes; yields the path and the result of each finished one."""
    total = sum(len(shard.jobs) for shard in shards)
    progress = Progress(total)
    workers = min(workers or min(os.cpu_count(), total // IMAGES_PER_PROCESS), len(shards))
    if workers <= 1:
        for shard in shards:
            yield shard.path, write_shard(shard, lambda: progress.show(progress.done + 1))
        return
    # Spawned, because a fork would copy locks that TensorFlow's threads hold.
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (done, os.getpid()))
    try:
        pending = {pool.submit(_work, shard): shard.path for shard in shards}
        while pending:
            for future in wait(pending, TICK, FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
            progress.show(done.value)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(done: Any, parent: int) -> None:
    global _done, _parent
    _done, _parent = done, parent


def _work(shard: Shard) -> dict:
    def count_one():
        if os.getppid() != _parent:  # it was killed, and so its restart would be disturbed
            os._exit(1)
        with _done.get_lock():
            _done.value += 1

    return write_shard(shard, count_one)


def _start_or_resume(prefix: str, fingerprint: str, overwrite: bool) -> dict:
    """The state: finished shards of the same inputs, otherwise none."""
    state_path, shards = f"{prefix}.state.json", f"{prefix}-?????-of-?????.tfrecord"
    old = tf.io.gfile.glob([shards, state_path])
    if overwrite:
        for path in old + tf.io.gfile.glob([f"{shards}.*", f"{prefix}.json"]):
            tf.io.gfile.remove(path)
    elif state_path in old:
        with tf.io.gfile.GFile(state_path) as file:
            state = json.load(file)
        if state["fingerprint"] == fingerprint:
            return state
    if old and not overwrite:
        raise FileExistsError(f"{prefix}-* was made from other inputs; --overwrite replaces it")
    tf.io.gfile.makedirs(os.path.dirname(prefix) or ".")
    return {"fingerprint": fingerprint, "shards": {}}


def _is_finished(path: str, state: dict) -> bool:
    shard = state["shards"].get(os.path.basename(path), {"counts": {"rejected_images": 1}})
    return not shard["counts"].get("rejected_images") and tf.io.gfile.exists(path)


def write_shards(
    prefix: str,
    jobs: Sequence,
    convert: Callable[[Any], Converted],
    *,
    num_shards: int,
    fingerprint: str,
    run: Runner = in_processes,
    overwrite: bool = False,
) -> dict[str, dict]:
    """Converts every job, one per image; returns {shard: {'counts': .., 'rejected': [..]}}.

    Shards finished by an earlier run with this fingerprint are kept, unless they lack an image: it
    may be there by now. With several processes a script needs `if __name__ == "__main__"`.

    Args:
      run: writes shards and yields the path and the result of each.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}, must be at least 1")
    state = _start_or_resume(prefix, fingerprint, overwrite)
    paths = [f"{prefix}-{i:05}-of-{num_shards:05}.tfrecord" for i in range(num_shards)]
    pending = [
        Shard(path, list(jobs[i::num_shards]), convert)
        for i, path in enumerate(paths)
        if not _is_finished(path, state)
    ]
    write_json(f"{prefix}.state.json", state)
    for path, result in run(pending):
        state["shards"][os.path.basename(path)] = result
        write_json(f"{prefix}.state.json", state)
    for partial in tf.io.gfile.glob(f"{prefix}-?????-of-?????.tfrecord.*partial"):
        tf.io.gfile.remove(partial)  # of runs that were killed
    return dict(sorted(state["shards"].items()))


def count(path: str) -> int:
    """Records of a TFRecord file: walks from length to length, whatever the checksums say."""
    size, place, records = tf.io.gfile.stat(path).length, 0, 0
    with tf.io.gfile.GFile(path, "rb") as file:
        while place < size:
            file.seek(place)
            place += int.from_bytes(file.read(8), "little") + FRAME
            records += 1
    return records
