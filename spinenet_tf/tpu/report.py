"""A recipe compiled for a TPU: does it fit, what should it cost. Estimates, and no run times."""

import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gin

from spinenet_tf.data.pipeline import Data
from spinenet_tf.models.count import count
from spinenet_tf.ops import augment
from spinenet_tf.tpu import chips, compiler, cost, programs
from spinenet_tf.train.optimizer import Schedule
from spinenet_tf.train.trainer import Training

MAIN_LAYERS = 12  # named in the report
CODE = 1.0  # GiB kept for the program where only a plan was made: SpineNet-190's take 0.35


def compile_recipe(
    task: Any,
    trainer: Training,
    data: Data,
    schedule: Schedule,
    tpu_types: Sequence[str],
    folder: str = "",
    plan: bool = False,
) -> Iterator[dict]:
    """Compiles training step and prediction of a replica; yields the figures of each.

    Args:
      data: its batch size is the global one.
      tpu_types: see `chips.find`. Where the images a device are as many, the program is the same.
      folder: where to keep the programs, `<program>_<images>.hlo` as given and
        `<program>_<tpu_type>.txt` as compiled.
      plan: see `compile_program`.

    Raises:
      ValueError: see `chips.find`; the batch does not divide by the slice's devices; host mode.
      ImportError: jax or libtpu is missing. RuntimeError: the compiler broke down or was killed.
    """
    if data.augment == "host":
        raise ValueError("tpu_compile knows Data.augment='device' only")
    slices = {tpu_type: chips.find(tpu_type) for tpu_type in tpu_types}
    check_installed()
    for tpu_type, (_, _, devices) in slices.items():
        if data.batch_size % devices:
            raise ValueError(
                f"Data.batch_size={data.batch_size} does not divide by the {devices} devices of "
                f"--tpu_type={tpu_type}"
            )
    adds = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder or temporary)
        for tpu_type, (name, chip, devices) in slices.items():
            batch = data.batch_size // devices
            if batch not in adds:
                adds[batch] = _in_a_process(_lower, task, trainer, data, schedule, batch, root)
            for program, n in adds[batch].items():
                hlo, output = root / f"{program}_{batch}.hlo", root / f"{program}_{tpu_type}"
                about = {"program": program, "tpu": name, "devices": devices, "batch": batch}
                limit = {"limit_ms": 2 * n * batch / chip.teraflops / 1e9}
                yield about | compile_program(chip, hlo, output, plan) | limit


def _in_a_process(function, *args):
    """`function(gin's configuration, *args)`, whose memory is free afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, gin.config_str(), *args).result()


def _lower(config: str, task, trainer, data, schedule, batch: int, root: Path) -> dict[str, int]:
    """Writes the programs to `root` and returns their `multiply_adds`."""
    gin.parse_config(config, skip_unknown=True)  # what is not imported here is not used here
    root.mkdir(parents=True, exist_ok=True)
    train = programs.train_step(task, trainer, data, schedule, batch)
    (root / f"train_{batch}.hlo").write_bytes(train)
    predict = programs.predict(task, trainer, data, batch)
    (root / f"predict_{batch}.hlo").write_bytes(predict)
    return multiply_adds(task, data)


def check_installed() -> None:
    """Says what to install.

    Raises:
      ImportError: jax or libtpu is missing.
    """
    if not all(importlib.util.find_spec(name) for name in ("jax", "libtpu")):
        raise ImportError("--mode=tpu_compile needs: pip install 'spinenet_tf[tpu]'")


def compile_program(chip: chips.Chip, hlo: Path, output: Path, plan: bool = False) -> dict:
    """Compiles a serialized HLO module in another process; returns memory and cost.

    Args:
      output: the program is written to `output`.txt.
      plan: only as far as the assignment of memory, a fraction of the time. No program is written;
        the figures have no time, nor the memory of machine code, for which `CODE` is left.

    Raises:
      RuntimeError: the compiler refuses it for another reason than memory.
    """
    argv = [sys.executable, compiler.__file__, str(hlo), f"--topology={chip.topology}"]
    argv += [f"--output={output}"]
    with tempfile.TemporaryDirectory() as dumps:
        argv += [f"--plan={dumps}"] * plan
        done = subprocess.run(argv, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode < 0:
        raise RuntimeError(
            f"the compiler of {chip.topology} was killed by signal {-done.returncode}: was there "
            "memory enough? SpineNet-190's training step for v5e had taken 17 GB when it was"
        )
    if done.returncode:
        raise RuntimeError(f"the compiler of {chip.topology} failed: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    seconds = {"seconds": figures["seconds"]}
    if "error" in figures:
        return {"fits": False, "error": figures["error"]} | seconds
    if plan:
        gib = figures["planned"] / 2**30
        return {"fits": gib + CODE <= chip.hbm, "hbm_gib": gib} | seconds
    memory = {kind: figures[kind] for kind in compiler.MEMORY}
    total = sum(memory.values()) - 2 * memory["alias"]
    costs = cost.cost(cost.parse(Path(f"{output}.txt").read_text()), chip)
    return seconds | {
        "fits": total <= chip.hbm * 2**30,
        "memory": memory,
        "hbm_gib": total / 2**30,
        "estimated_ms": costs.estimated,
        "copied_ms": costs.copied,
        "hidden_ms": costs.hidden,
        "unbounded_loops": costs.unbounded,
        "layers": costs.by_layer,
    }


def multiply_adds(task: Any, data: Data) -> dict[str, int]:
    """Of an image, in the paper's count; thrice the model's in training.

    A view of an image is two matrix products.
    """
    model = task.build()
    once, trained = (count(model, task.runs(training)).multiply_adds for training in (False, True))
    view = 0
    if task.labels[0] != "class":
        view = augment.multiply_adds(data.canvas, task.image_size)
    return {"train": 3 * trained + view, "predict": once + view}


def text(figures: dict) -> str:
    """The figures of a program in words."""
    title = "{program} on {tpu}, {batch} images on each of {devices} devices".format(**figures)
    if "error" in figures:
        return f"{title}: does not fit\n  {figures['error']}"
    title += ": fits" if figures["fits"] else ": does not fit"
    if "memory" not in figures:
        return (
            f"{title}\n  memory    {figures['hbm_gib']:.2f} GiB without machine code, for which "
            f"{CODE:.0f} GiB is left\n  planned   in {figures['seconds']:.0f} s"
        )
    memory = {kind: bytes_ / 2**20 for kind, bytes_ in figures["memory"].items()}
    total = figures["estimated_ms"] + figures["copied_ms"]
    lines = [
        title,
        f"  memory    {figures['hbm_gib']:.2f} GiB: "
        + ", ".join(f"{kind} {size:.0f} MiB" for kind, size in memory.items()),
        f"  time      {total:.1f} ms by the compiler's estimate (no run time), of which "
        f"{figures['copied_ms']:.1f} priced by bytes; copies beside {figures['hidden_ms']:.1f} ms",
        f"  limit     {figures['limit_ms']:.1f} ms for the multiply-adds at the peak: "
        f"{figures['limit_ms'] / total:.2f} of the time",
        f"  compiled  in {figures['seconds']:.0f} s",
    ]
    if figures["unbounded_loops"]:
        lines.append(f"  {figures['unbounded_loops']} loops of unknown length, counted once")
    dearest = list(figures["layers"].items())[:MAIN_LAYERS]
    return "\n".join(lines + [f"  {ms:8.2f} ms  {layer}" for layer, ms in dearest])


def rounded(figures: dict) -> dict:
    """The same for JSON: floats with four digits."""
    return {
        key: rounded(value)
        if isinstance(value, dict)
        else float(f"{value:.4g}")
        if isinstance(value, float) and math.isfinite(value)
        else value
        for key, value in figures.items()
    }
