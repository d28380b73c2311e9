"""Sharded files of records, made by parallel processes and restartable.

`write_shards` makes `<prefix>-00000-of-00008.tfrecord` and so on; `<prefix>.state.json` remembers
the finished ones, so that a restart goes on where it was stopped.
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import tensorflow as tf

Job = TypeVar("Job")
FRAME = 16  # bytes around a record in its file: its length and two checksums
IMAGES_PER_PROCESS = 64  # fewer are not worth the start of another process


class Converted(NamedTuple):
    """What became of one image."""

    example: bytes | None  # None if the image was rejected
    counts: Counter
    rejected: list[dict]  # this image or annotations of it, with the reasons


class Progress:
    """One line on stderr: images done of all, images a second, time left."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def step(self) -> None:
        """Counts an image, and shows the line when it is due."""
        self.done += 1
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 5.0) and self.done < self.total:
            return
        self.shown = now
        rate = self.done / max(now - self.start, 1e-6)
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


@contextmanager
def _in_parallel(
    convert: Callable[[Job], Converted], jobs: list[Job], workers: int | None
) -> Iterator[Iterator[Converted]]:
    workers = workers or min(os.cpu_count(), len(jobs) // IMAGES_PER_PROCESS)
    if workers <= 1:
        yield map(convert, jobs)
        return
    # Spawned, because a fork would copy locks that TensorFlow's threads hold.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool.map(convert, jobs, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_or_resume(prefix: str, fingerprint: str, overwrite: bool) -> dict:
    """The state: finished shards of the same inputs, otherwise none."""
    state_path, shards = f"{prefix}.state.json", f"{prefix}-?????-of-?????.tfrecord"
    old = tf.io.gfile.glob([shards, state_path])
    if overwrite:
        for path in old + tf.io.gfile.glob([f"{shards}.partial", f"{prefix}.json"]):
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


def _write_shard(path: str, results: Iterator[Converted], progress: Progress) -> dict:
    counts, rejected = Counter(examples=0), []
    with tf.io.TFRecordWriter(f"{path}.partial") as writer:
        for result in results:
            if result.example is not None:
                writer.write(result.example)
            counts += result.counts
            rejected += result.rejected
            progress.step()
    tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)
    return {"counts": counts, "rejected": rejected}


def write_shards(
    prefix: str,
    jobs: Sequence[Job],
    convert: Callable[[Job], Converted],
    *,
    num_shards: int,
    fingerprint: str,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, dict]:
    """Converts every job, one per image; returns {shard: {'counts': .., 'rejected': [..]}}.

    Shards finished by an earlier run with this fingerprint are kept, unless they lack an image: it
    may be there by now. With several workers a script needs `if __name__ == "__main__"`.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}, must be at least 1")
    state = _start_or_resume(prefix, fingerprint, overwrite)
    paths = [f"{prefix}-{i:05}-of-{num_shards:05}.tfrecord" for i in range(num_shards)]
    pending = {p: jobs[i::num_shards] for i, p in enumerate(paths) if not _is_finished(p, state)}
    todo = list(itertools.chain.from_iterable(pending.values()))
    progress = Progress(len(todo))
    write_json(f"{prefix}.state.json", state)
    with _in_parallel(convert, todo, workers) as results:
        for path, shard_jobs in pending.items():
            shard = itertools.islice(results, len(shard_jobs))
            state["shards"][os.path.basename(path)] = _write_shard(path, shard, progress)
            write_json(f"{prefix}.state.json", state)
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
