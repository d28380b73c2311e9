"""Finding and restoring the checkpoints of a model folder."""

import dataclasses
import json
from typing import Any

import keras
import tensorflow as tf

SIDECAR = "model.json"
# The layers whose shapes depend on the number of classes.
PREDICTORS = ("class_predict/", "box_head_class/", "box_head_box/", "mask_head_predict/")


def write_sidecar(model_dir: str, description: dict) -> None:
    """Writes `model.json` beside the checkpoints."""
    tf.io.gfile.makedirs(model_dir)
    with tf.io.gfile.GFile(f"{model_dir}/{SIDECAR}", "w") as file:
        json.dump(description, file, indent=1)


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
      ValueError: they differ in what shapes the network; says in which field and how to cure it.
    """
    trained = read_sidecar(model_dir).get("task", {})
    recipe = json.loads(json.dumps(dataclasses.asdict(task)))
    pairs = [(type(task).__name__, "num_classes", trained, recipe)]
    old, new = trained.get("anchors", {}), recipe.get("anchors", {})
    pairs += [("Anchors", field, old, new) for field in new]
    for name, field, old, new in pairs:
        if field in old and old[field] != new[field]:
            raise ValueError(
                f"the checkpoint in {model_dir} was trained with {name}.{field}={old[field]}, the "
                f"recipe says {new[field]}: use the recipe of that run ({model_dir}/config.gin), "
                f"--gin_param='{name}.{field}={old[field]}', or another --model_dir"
            )


def check_categories(model_dir: str, categories: list[dict]) -> None:
    """Compares the classes of a data set with those that the model has learned.

    Raises:
      ValueError: a label stands for another category.
    """
    learned = {c["label"]: c for c in read_sidecar(model_dir).get("categories", [])}
    for category in categories:
        known = learned.get(category["label"], category)
        if known != category:
            raise ValueError(
                f"label {category['label']} is {known['name']!r} in {model_dir}/{SIDECAR} and "
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
