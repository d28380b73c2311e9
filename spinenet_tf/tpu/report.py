"""A recipe compiled for a TPU: does it fit, what should it cost. Estimates, and no run times."""

import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
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

PROGRAMS = ("train", "predict")
MAIN_LAYERS = 12  # named in the report


def compile_recipe(
    task: Any, trainer: Training, data: Data, schedule: Schedule, tpu_type: str, folder: str = ""
) -> list[dict]:
    """Compiles training step and prediction of a replica; returns the figures of each.

    Args:
      data: its batch size is the global one.
      tpu_type: see `chips.find`.
      folder: where to keep the programs, `<name>.hlo` as given and `<name>.txt` as compiled.

    Raises:
      ValueError: see `chips.find`; the batch does not divide by the slice's devices; host mode.
      ImportError: jax or libtpu is missing.
    """
    if data.augment == "host":
        raise ValueError("tpu_compile knows Data.augment='device' only")
    name, chip, devices = chips.find(tpu_type)
    check_installed()
    if data.batch_size % devices:
        raise ValueError(
            f"Data.batch_size={data.batch_size} does not divide by the {devices} devices of "
            f"--tpu_type={tpu_type}"
        )
    batch = data.batch_size // devices
    with tempfile.TemporaryDirectory() as temporary:
        paths = {program: Path(folder or temporary) / program for program in PROGRAMS}
        recipe = (gin.config_str(), task, trainer, data, schedule)
        # Another process: a compilation needs the memory that TensorFlow keeps.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            limit = pool.submit(_lower, *recipe, batch, chip, paths).result()
        about = {"tpu": name, "devices": devices, "batch": batch}
        return [
            {"program": program}
            | about
            | compile_program(chip, path)
            | {"limit_ms": limit[program]}
            for program, path in paths.items()
        ]


def _lower(config: str, task, trainer, data, schedule, batch: int, chip, paths: dict) -> dict:
    """Writes the programs to `paths` and returns `limits`."""
    gin.parse_config(config, skip_unknown=True)  # what is not imported here is not used here
    paths["train"].parent.mkdir(parents=True, exist_ok=True)
    train = programs.train_step(task, trainer, data, schedule, batch)
    paths["train"].with_suffix(".hlo").write_bytes(train)
    predict = programs.predict(task, trainer, data, batch)
    paths["predict"].with_suffix(".hlo").write_bytes(predict)
    return limits(task, data, batch, chip)


def check_installed() -> None:
    """Says what to install.

    Raises:
      ImportError: jax or libtpu is missing.
    """
    if not all(importlib.util.find_spec(name) for name in ("jax", "libtpu")):
        raise ImportError("--mode=tpu_compile needs: pip install 'spinenet_tf[tpu]'")


def compile_program(chip: chips.Chip, path: Path) -> dict:
    """Compiles the serialized HLO module `path`.hlo in another process; returns memory and cost.

    Raises:
      RuntimeError: the compiler refuses it for another reason than memory.
    """
    argv = [sys.executable, compiler.__file__, f"{path}.hlo", f"--topology={chip.topology}"]
    done = subprocess.run(
        [*argv, f"--output={path}"], capture_output=True, text=True, env=dict(os.environ)
    )
    if done.returncode < 0:
        raise RuntimeError(
            f"the compiler of {chip.topology} was killed by signal {-done.returncode}: was there "
            "memory enough? SpineNet-190's training step for v5e had taken 17 GB when it was"
        )
    if done.returncode:
        raise RuntimeError(f"the compiler of {chip.topology} failed: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    if "error" in figures:
        return {"fits": False, "error": figures["error"], "seconds": figures["seconds"]}
    memory = {kind: figures[kind] for kind in compiler.MEMORY}
    total = sum(memory.values()) - 2 * memory["alias"]
    costs = cost.cost(cost.parse(path.with_suffix(".txt").read_text()), chip)
    return {
        "fits": total <= chip.hbm * 2**30,
        "seconds": figures["seconds"],
        "memory": memory,
        "hbm_gib": total / 2**30,
        "estimated_ms": costs.estimated,
        "copied_ms": costs.copied,
        "hidden_ms": costs.hidden,
        "unbounded_loops": costs.unbounded,
        "layers": costs.by_layer,
    }


def limits(task: Any, data: Data, batch: int, chip: chips.Chip) -> dict[str, float]:
    """Milliseconds that the multiply-adds take at the chip's peak; thrice the model's in training.

    The model's are in the paper's count; a view of an image is two matrix products.
    """
    once = count(task.build(), task.runs()).multiply_adds
    view = 0
    if task.labels[0] != "class":
        view = augment.multiply_adds(data.canvas, task.image_size)
    adds = {"train": 3 * once + view, "predict": once + view}
    return {name: 2 * n * batch / chip.teraflops / 1e9 for name, n in adds.items()}


def text(figures: dict) -> str:
    """The figures of a program in words."""
    title = "{program} on {tpu}, {batch} images on each of {devices} devices".format(**figures)
    if "error" in figures:
        return f"{title}: does not fit\n  {figures['error']}"
    memory = {kind: bytes_ / 2**20 for kind, bytes_ in figures["memory"].items()}
    total = figures["estimated_ms"] + figures["copied_ms"]
    lines = [
        f"{title}: {'fits' if figures['fits'] else 'does not fit'}",
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
