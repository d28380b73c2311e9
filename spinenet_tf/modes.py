"""What `main` can do, one function a mode; everything they need to know comes by gin."""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import gin
import keras
import numpy as np
import tensorflow as tf

from spinenet_tf import graphs, specs
from spinenet_tf.checkpoints import describe, files, folder, load
from spinenet_tf.data.pipeline import Data
from spinenet_tf.draw_graph import draw_graph
from spinenet_tf.export.convert import convert as convert_to
from spinenet_tf.export.predict import expand, predict_files
from spinenet_tf.export.saved_model import export as export_model
from spinenet_tf.models.count import count
from spinenet_tf.models.device import images_a_device
from spinenet_tf.tasks.classification import Classification
from spinenet_tf.tasks.detection import Detection
from spinenet_tf.tasks.instances import InstanceSegmentation
from spinenet_tf.tpu import report as tpu_report
from spinenet_tf.train.optimizer import Schedule
from spinenet_tf.train.strategy import in_words, make_strategy
from spinenet_tf.train.trainer import Run, Training

TASKS = [task.__name__ for task in (Detection, InstanceSegmentation, Classification)]
OF_THE_TASK = ("num_classes", "anchors_per_place", "input_shape", "backbone")
MISSING = 0.01  # so many of a set's images may have been left out in conversion


@gin.configurable
def make_task(task: type = Detection) -> Any:
    """The task that a recipe trains.

    Raises:
      ValueError: a binding that the task overrules, or the number of classes of another task.
    """
    made, name = task(), task.__name__
    overruled = [f for f in OF_THE_TASK if f in gin.get_bindings(made.network)]
    if overruled:
        raise ValueError(
            f"{made.network}.{overruled[0]} follows from {name}'s num_classes, image_size and "
            "anchors: bind those"
        )
    classes = {t: "num_classes" in gin.get_bindings(t) for t in TASKS}
    if any(classes.values()) and not classes.get(name, True):
        other = next(t for t in TASKS if classes[t])
        raise ValueError(f"{other}.num_classes is bound, but the recipe's task is {name}")
    return made


def check_read(params: Sequence[str]) -> None:
    """Refuses bindings of the command line whose task or network is not the recipe's."""
    task = make_task()
    others = {*describe.NETWORKS, *TASKS} - {task.network, type(task).__name__}
    for param in params:
        name = param.split("=")[0].rpartition(".")[0].split("/")[-1].split(".")[-1]
        if name in others:
            raise ValueError(
                f"--gin_param={param!r}: nothing reads it, as the recipe's task is "
                f"{type(task).__name__} and its network {task.network}"
            )


def scoped_data(scope: str) -> Data:
    """`Data` under the bindings of gin scope 'train' or 'eval'."""
    with gin.config_scope(scope):
        return Data()


def train(model_dir: str) -> None:
    """Trains, or goes on training, to the end of the schedule."""
    _train(model_dir)


def train_and_eval(model_dir: str) -> dict:
    """Trains with evaluations every `Training.eval_every` steps and at the end."""
    training, validation = scoped_data("train"), scoped_data("eval")
    run = _make_run(model_dir, training)
    _check_validation(run, training, validation)
    every, figures = run.trainer.eval_every, {}

    def after_loop(step: int) -> None:
        if every and step % every == 0:
            figures[step] = _evaluate(run, validation)

    _train(model_dir, run, after_loop)
    step = int(run.step.numpy())
    return figures[step] if step in figures else _evaluate(run, validation)


def evaluate(model_dir: str, output: str) -> dict:
    """Prints the task's figures of the newest checkpoint and saves them in `output`."""
    folder.latest(model_dir)
    data = scoped_data("eval")
    run = _make_run(model_dir, data)
    run.resume()
    tf.io.gfile.makedirs(output)
    return _evaluate(run, data, output)


def predict(model_dir: str, images: list[str], output: str) -> None:
    """Draws detections of image files and writes `results.json`."""
    files = expand(images)
    task, model, categories = _load(model_dir)
    results, bad = predict_files(
        task, model, files, output,
        names={c["label"]: c["name"] for c in categories},
        category_ids={c["label"]: c["id"] for c in categories},
        canvas=scoped_data("eval").canvas,
    )  # fmt: skip
    with tf.io.gfile.GFile(f"{output}/results.json", "w") as file:
        json.dump(results, file)
    done = len(files) - len(bad)
    print(f"{done} pictures and results.json ({len(results)} results) in {output}")
    if bad:
        raise ValueError("\n".join(bad))


def export(model_dir: str, output: str) -> None:
    """Writes the newest checkpoint as a SavedModel."""
    task, model, categories = _load(model_dir)
    canvas = scoped_data("eval").canvas
    export_model(task, model, output, canvas=canvas, categories=categories)
    print(f"SavedModel in {output}: signatures image_bytes, image_tensor, tf_example")
    if categories:
        print(f"{output}/assets.extra/labels.json has the names of the classes")


def convert(
    checkpoint: str, output: str, form: str = "own", optimizer: bool = False, **settings
) -> None:
    """Rewrites a checkpoint; see `load.open_checkpoint` and `export.convert`."""
    loaded = load.open_checkpoint(checkpoint, **settings)
    convert_to(loaded, output, form, optimizer=optimizer)
    print(f"{loaded.model.name} written to {output}")


def adopt(checkpoint: str, model_dir: str, **settings) -> None:
    """Converts a checkpoint into a model folder, unless the folder was made of just that."""
    if tf.train.latest_checkpoint(model_dir):
        source = folder.read_sidecar(model_dir).get("source", {})
        keras_file = checkpoint.endswith(load.KERAS_FILES)
        if source.get("path") == (checkpoint if keras_file else files.find(checkpoint)):
            wrong = {k: v for k, v in settings.items() if v not in (None, source.get(k))}
            if wrong:
                name = next(iter(wrong))
                raise ValueError(
                    f"{model_dir} has the weights of {checkpoint} with {name}={source.get(name)}: "
                    "give another --model_dir"
                )
            print(f"{model_dir} has the weights of {checkpoint} already")
            return
    convert(checkpoint, model_dir, **settings)


def profile(as_json: bool = False) -> dict:
    """Prints what the recipe's model costs for one image."""
    task = make_task()
    model = task.build()
    counts = count(model, task.runs())
    figures = counts._asdict() | {
        "model": model.name,
        "input": list(model.inputs[0].shape[1:]),
        "weight_bytes_float32": 4 * (counts.parameters + counts.moving_statistics),
        "activation_bytes_bfloat16": 2 * counts.activations,
    }
    print(json.dumps(figures) if as_json else _profile_text(figures))
    return figures


def tpu_compile(
    tpu_types: Sequence[str], output: str = "", as_json: bool = False, plan: bool = False
) -> list[dict]:
    """Compiles the recipe's training step and prediction for TPUs, and prints what they cost."""
    recipe, found = (make_task(), Training(), scoped_data("train"), Schedule()), []
    for one in tpu_report.compile_recipe(*recipe, tpu_types, output, plan):
        print(json.dumps(tpu_report.rounded(one)) if as_json else tpu_report.text(one), flush=True)
        found.append(one)
    return found


def draw(output: str) -> None:
    """Draws the graph of the recipe's SpineNet as a PNG or SVG file.

    Raises:
      ValueError: the recipe's network is no SpineNet.
    """
    size = gin.get_bindings(make_task().network).get("size", "49")
    sizes = specs.SIZES | specs.MOBILE_SIZES
    if size not in sizes:
        raise ValueError(f"{size} is no SpineNet: --mode=draw draws {sorted(sizes)}")
    mobile = size in specs.MOBILE_SIZES
    graph = graphs.SPINENET_MOBILE if mobile else sizes[size].graph
    rows = gin.get_bindings("SpineNetMobile" if mobile else "SpineNet")
    repeats = 1 if mobile else rows.get("repeats", sizes[size].repeats)
    graph = graphs.override(graph, rows.get("stem"), rows.get("blocks"))
    tf.io.gfile.makedirs(os.path.dirname(os.path.abspath(output)))
    draw_graph(
        graph, output, title=f"SpineNet-{size}" if size[0] in "1459" else size, repeats=repeats
    )
    print(f"{size}: {len(graph.blocks)} permuted blocks drawn in {output}")


def _profile_text(figures: dict) -> str:
    height, width, _ = figures["input"]
    return (
        f"{figures['model']} at {height}x{width}\n"
        f"  parameters     {figures['parameters'] / 1e6:.3f} M trainable, "
        f"{figures['moving_statistics'] / 1e6:.3f} M batch-norm statistics\n"
        f"  multiply-adds  {figures['multiply_adds'] / 1e9:.2f} B an image (the paper's count)\n"
        f"  memory         {figures['weight_bytes_float32'] / 2**20:.0f} MiB of float32 weights, "
        f"{figures['activation_bytes_bfloat16'] / 2**20:.0f} MiB an image for all layer outputs in "
        "bfloat16 (an upper bound)"
    )


def _make_run(model_dir: str, data: Data) -> Run:
    strategy, task = make_strategy(), make_task()
    folder.check_fits(model_dir, task)
    with images_a_device(data.batch_size // strategy.num_replicas_in_sync):
        return Run(task, Training(), model_dir, strategy)


def _train(model_dir: str, run: Run | None = None, after_loop=lambda step: None) -> Run:
    data = scoped_data("train")
    run = run or _make_run(model_dir, data)
    _check_classes(run.task, data)
    _check_records(run, data)
    begun = folder.check_start(model_dir, run.trainer.init_from)
    run.resume()  # before anything is written: the checkpoint may be of another recipe
    print(f"training {run.model.name} with {in_words(run.strategy)}", flush=True)
    if run.is_chief:
        about = describe.of_run(run.task, data.categories())
        folder.write_sidecar(model_dir, about | {"init_from": begun})
        _write(f"{model_dir}/config.gin", gin.config_str())
    run.train(data, Schedule(), after_loop)
    if run.is_chief:
        _write(f"{model_dir}/operative_config.gin", gin.operative_config_str())
    return run


def _check_classes(task: Any, data: Data) -> None:
    labels = [c["label"] for c in data.categories()] or data.some_labels()
    highest = max(labels, default=0)
    if highest >= task.num_classes:
        name = type(task).__name__
        raise ValueError(
            f"the records have labels up to {highest}, {name}.num_classes={task.num_classes}: "
            f"set --gin_param='{name}.num_classes={highest + 1}' (the background counts)"
        )


def _check_records(run: Run, data: Data) -> None:
    """What the sidecars tell against training on these records."""
    said, there = run.trainer.examples, data.known_examples()
    if said and there and abs(said - there) > MISSING * there:  # epochs are as long as it says
        raise ValueError(
            f"Training.examples={said}, but Data.pattern={data.pattern!r} has {there} images: set "
            "--gin_param='Training.examples=0'"
        )
    side = getattr(run.task, "image_size", 0)
    if "class" not in run.task.labels and data.canvas < min(side, data.some_side()):
        print(
            f"images are reduced to Data.canvas={data.canvas} pixels and enlarged to the network's "
            f"{side}: a canvas of {side} would keep what they show"
        )
    objects = {path: s for path, s in data.sidecars().items() if s.get("num_instances", 1)}
    if data.sidecars() and not objects:
        raise ValueError(f"Data.pattern={data.pattern!r}: these records have no objects to learn")
    for path, sidecar in objects.items():
        if run.task.labels[0] == "masks" and not sidecar.get("masks", True):
            raise ValueError(
                f"{path}: these records have no masks: their JSON had no segmentations, or they "
                "were made with --nomasks"
            )


def _check_validation(run: Run, training: Data, data: Data) -> None:
    """What would stop an evaluation, found before the training."""
    data.files()
    where = f"the records of train/Data.pattern={training.pattern!r}"
    folder.compare_categories(training.categories(), where, data.categories())
    if data.batch_size % run.strategy.num_replicas_in_sync:
        raise ValueError(
            f"eval/Data.batch_size={data.batch_size} does not divide by {in_words(run.strategy)}"
        )
    run.task.metric(data)


def _evaluate(run: Run, data: Data, output: str = "") -> dict:
    """Evaluates; prints, saves and summarises the figures, and some drawn images.

    They are summarised if `output` is the run's own folder, its default.
    """
    output = output or run.model_dir
    start, step = time.monotonic(), int(run.step.numpy())
    folder.check_categories(run.model_dir, data.categories())
    pictures, names = [], {c["label"]: c["name"] for c in data.categories()}

    def look(batch, detections):
        shown = range(min(len(batch["id"]), 8))
        pictures.extend(_picture(run.task, batch, detections, i, names) for i in shown)

    metric = run.evaluate(data, look)
    figures = metric.result()
    if run.is_chief:
        for name, value in figures.items():
            print(f"{name:6} {value:.4f}")
        print(f"evaluated step {step} in {time.monotonic() - start:.0f} s")
        metric.write(f"{output}/results.json")
        _write(f"{output}/metrics-{step}.json", json.dumps({"step": step} | figures, indent=1))
        if output == run.model_dir:
            _summarize(run, step, figures, pictures)
    return figures


def _summarize(run: Run, step: int, figures: dict, pictures: list) -> None:
    with run.summary_writer("eval").as_default(step):
        for name, value in figures.items():
            tf.summary.scalar(name, value)
        for i, picture in enumerate(pictures):
            tf.summary.image(f"detections/{i}", picture[None])
        tf.summary.flush()


def _picture(task: Any, batch: dict, detections: tuple, i: int, names: dict) -> np.ndarray:
    found = type(detections)(*(part[i] for part in detections))
    if hasattr(found, "boxes"):
        to_canvas = np.tile(batch["image_size"][i] / batch["source_size"][i], 2)
        found = found._replace(boxes=found.boxes * to_canvas)
    return task.draw(batch["image"][i].astype(np.uint8), found, names, 0.3)


def _load(model_dir: str) -> tuple[Any, keras.Model, list[dict]]:
    keras.config.set_dtype_policy("float32")  # whatever a training before it has set
    task = make_task()
    model = folder.load_model(task, model_dir)
    return task, model, folder.read_sidecar(model_dir).get("categories", [])


def _write(path: str, text: str) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(text)
