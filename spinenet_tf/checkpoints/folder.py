"""Finding and restoring the checkpoints of a model folder."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from spinenet_tf.models.layers import Style

SIDECAR = "model.json"
# The layers whose shapes depend on the number of classes.
PREDICTORS = ("class_predict/", "box_head_class/", "box_head_box/", "mask_head_predict/")


# What weights of the same names and shapes may mean otherwise: fields of a task and of `Style`.
MEANING = ("num_classes", "inclusive_boxes")
STYLE = ("activation", "numerics", "epsilon")


def write_sidecar(model_dir: str, description: dict) -> None:
    """Writes `model.json` beside the checkpoints."""
    tf.io.gfile.makedirs(model_dir)
    path = f"{model_dir}/{SIDECAR}"
    with tf.io.gfile.GFile(f"{path}.partial", "w") as file:
        json.dump(description, file, indent=1)
    tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)  # other workers may read it now


def read_sidecar(model_dir: str) -> dict:
    """Reads `model.json`; {} if there is none."""
    path = f"{model_dir}/{SIDECAR}"
    if not tf.io.gfile.exists(path):
        return {}
    with tf.io.gfile.GFile(path) as file:
        return json.load(file)


def latest(model_dir: str) -> str:
    """The newest checkpoint of a folder that was saved to its end.

    Raises:
      FileNotFoundError: there is none.
    """
    path = tf.train.latest_checkpoint(model_dir)
    if not path:
        raise FileNotFoundError(
            f"{model_dir!r} holds no checkpoint: train first, or fix --model_dir"
        )
    return path


def check_fits(model_dir: str, task: Any) -> None:
    """Compares a recipe with the one its checkpoint was trained with.

    Raises:
      ValueError: they differ in what the weights mean; says in which field and how to cure it.
    """
    sidecar = read_sidecar(model_dir)
    style, bound = dataclasses.asdict(Style()), sidecar.get("bindings", {}).get("Style", {})
    trained, recipe = sidecar.get("task", {}), dataclasses.asdict(task)
    _compare(model_dir, type(task).__name__, MEANING, trained, recipe)
    _compare(model_dir, "Style", STYLE, bound, style)
    check_anchors(model_dir, task)


def check_anchors(model_dir: str, task: Any) -> None:
    """`check_fits` for anchors alone."""
    trained = read_sidecar(model_dir).get("task", {}).get("anchors", {})
    recipe = dataclasses.asdict(task).get("anchors", {})
    _compare(model_dir, "Anchors", recipe, trained, recipe)


def _compare(model_dir: str, name: str, fields: Iterable[str], old: dict, new: dict) -> None:
    new = json.loads(json.dumps(new))  # JSON has lists for tuples
    for field in fields:
        if field in old and field in new and old[field] != new[field]:
            raise ValueError(
                f"the checkpoint in {model_dir} was trained with {name}.{field}={old[field]}, the "
                f"recipe says {new[field]}: use the recipe of that run ({model_dir}/config.gin), "
                f'--gin_param="{name}.{field}={old[field]!r}", or another --model_dir'
            )


def check_start(model_dir: str, init_from: str) -> str:
    """What the run in a folder was started from; `init_from` if it has not begun.

    Raises:
      ValueError: it has begun from something else, so that `init_from` would not be read.
    """
    if not tf.train.latest_checkpoint(model_dir):
        return init_from
    begun = read_sidecar(model_dir).get("init_from", init_from)
    if init_from and init_from.rstrip("/") != begun.rstrip("/"):
        raise ValueError(
            f"{model_dir} holds a run that was started from {begun or 'random weights'}, not from "
            f"--init_checkpoint={init_from}: give another --model_dir, or leave it out to go on"
        )
    return begun


def check_categories(model_dir: str, categories: list[dict]) -> None:
    """Compares the classes of a data set with those that the model has learned.

    Raises:
      ValueError: a label stands for another category.
    """
    learned = read_sidecar(model_dir).get("categories", [])
    compare_categories(learned, f"{model_dir}/{SIDECAR}", categories)


def compare_categories(learned: list[dict], where: str, categories: list[dict]) -> None:
    """`check_categories` for classes that are listed `where`."""
    by_label = {c["label"]: c for c in learned}
    for category in categories:
        known = by_label.get(category["label"], category)
        if known != category:
            raise ValueError(
                f"label {category['label']} is {known['name']!r} in {where} and "
                f"{category['name']!r} in the evaluation records: convert both from files that "
                "list the same categories"
            )


def checkpoint(model: keras.Model, optimizer: Any, step: tf.Variable) -> tf.train.Checkpoint:
    """All of a training run that is saved, by the names of the weights and of random layers' seeds.

    So the same file fits a model however its layers are put together: on a TPU they are otherwise.
    """
    # tf.train.Checkpoint does not find the states of Keras' random layers by itself.
    seeds = {v.path: v.value for v in model.variables if v.dtype == "int64"}
    names = [v.path for v in model.trainable_variables]
    velocities = dict(zip(names, optimizer.velocities, strict=True))
    return tf.train.Checkpoint(
        model=weights(model), velocities=velocities, step=step, seeds=seeds
    )  # fmt: skip


def weights(model: keras.Model) -> dict[str, tf.Variable]:
    """{name: weight} of a model, without the states of random layers.

    Raises:
      ValueError: two have the same name.
    """
    variables = [v for v in model.variables if v.dtype != "int64"]
    named = {v.path: v.value for v in variables}
    if len(named) < len(variables):
        twice = sorted(n for n in named if sum(v.path == n for v in variables) > 1)
        raise ValueError(f"{model.name}: several weights are named {', '.join(twice)}")
    return named


def restore(checkpoint: tf.train.Checkpoint, path: str) -> None:
    """Restores every value of `checkpoint`, which may hold less than the file.

    Raises:
      ValueError: the file lacks a value or has one of another shape.
    """
    try:
        status = checkpoint.restore(path)
        status.assert_existing_objects_matched().expect_partial()
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"checkpoint {path} is not of the model that the recipe builds; give the recipe it was "
            f"trained with (config.gin beside it). TensorFlow says: {error}"
        ) from error


def load_model(task: Any, model_dir: str) -> keras.Model:
    """Builds the task's model with the newest weights of a folder.

    Raises:
      FileNotFoundError: no checkpoint. ValueError: one of another model.
    """
    path = latest(model_dir)
    check_fits(model_dir, task)
    model = task.build()
    restore(tf.train.Checkpoint(model=weights(model)), path)
    return model
