"""A recipe small enough for tests: five blocks, 64 px, a dozen rendered images."""

import os
import subprocess
import sys
from pathlib import Path

import gin
import pytest
import tensorflow as tf
from absl import app, logging
from absl.testing import flagsaver

from spinenet_tf import modes  # noqa: F401 - registers all that gin binds
from spinenet_tf.data import classes, coco, synthetic, synthetic_classes

ROOT = Path(__file__).resolve().parents[1]

BLOCKS = (
    "[(3, 'residual', (0, 1), True), (4, 'residual', (1, 2), True), (5, 'residual', (2, 3), True),"
    " (6, 'residual', (3, 4), True), (7, 'residual', (4, 5), True)]"
)
BINDINGS = [
    f"SpineNet.blocks = {BLOCKS}", "SpineNet.width = 0.125", "Style.stochastic_depth = 0.2",
    "RetinaNet.endpoints = 8", "RetinaNet.convs = 1", "RetinaNet.filters = 8",
    "Detection.num_classes = 7", "Detection.image_size = 64", "Detection.scale = (0.8, 1.2)",
    "MaskRCNN.endpoints = 8", "MaskRCNN.convs = 1", "MaskRCNN.filters = 8", "MaskRCNN.fc = 16",
    "InstanceSegmentation.num_classes = 7", "InstanceSegmentation.image_size = 64",
    "InstanceSegmentation.rpn_samples = 32", "InstanceSegmentation.proposals_before = 50",
    "InstanceSegmentation.proposals_after = 20", "InstanceSegmentation.region_samples = 16",
    "InstanceSegmentation.mask_samples = 4", "Data.mask_size = 28",
    "Classification.image_size = 64", "Classification.num_classes = 21",
    "Data.canvas = 64", "Data.max_boxes = 12", "Data.batch_size = 4", "Data.shuffle = 8",
    "Schedule.batch_size = 4", "Schedule.learning_rate = 0.02", "Schedule.warmup_epochs = 0.5",
    "Training.precision = 'float32'", "Training.steps = 12", "Training.steps_per_loop = 2",
    "Training.checkpoint_every = 4", "Training.deterministic = True",
]  # fmt: skip


def make_records(folder: Path, images: int = 12) -> Path:
    """Renders and converts `images` 64 px pictures; returns the folder of the shards."""
    synthetic.write_coco(folder / "images", num_images=images, image_size=64)
    coco.convert(
        str(folder / "images/train"), str(folder / "images/annotations/instances_train.json"),
        str(folder / "records/set"), num_shards=2,
    )  # fmt: skip
    return folder / "records"


def make_class_records(folder: Path, images: int = 40) -> Path:
    """Renders and converts `images` 64 px beetles of 20 classes; returns the shards' folder."""
    path = synthetic_classes.write_classes(folder, num_images=images, image_size=64)
    classes.convert(str(folder), str(folder / "records/set"), annotations=str(path), num_shards=2)
    return folder / "records"


def bindings(records: Path, *extra: str) -> list[str]:
    return [*BINDINGS, f"Data.pattern = '{records}/set-*'", *extra]


def bind(records: Path, *extra: str) -> None:
    gin.parse_config(bindings(records, *extra))


def command(mode: str, model_dir: Path, records: Path, *extra: str, flags: tuple = ()) -> list[str]:
    """argv of the command line on this recipe."""
    recipe = model_dir.parent / f"{model_dir.name}.gin"
    recipe.write_text("\n".join(bindings(records, *extra)))
    main = [sys.executable, "-m", "spinenet_tf.main", f"--mode={mode}", f"--model_dir={model_dir}"]
    return [*main, f"--gin_file={recipe}", *flags]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"} | more


def run_here(argv: list[str]):
    """The command line `argv`, of `command`, in this process, 8 s sooner; its exit code."""
    from spinenet_tf import main

    verbosity, level = logging.get_verbosity(), tf.get_logger().level
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        app.run(main.main, ["main", *map(str, argv[3:])])
    logging.set_verbosity(verbosity)
    tf.get_logger().setLevel(level)
    return stop.value.code


def mistake(argv: list[str], capfd) -> str:
    """What a command line says as it fails."""
    code = run_here(argv)
    assert code not in (None, 0)
    return f"{code}{''.join(capfd.readouterr())}"


def run(argv: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        argv, capture_output=True, text=True, cwd="/", env=environment(), **kwargs
    )
