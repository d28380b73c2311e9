"""Writes the weights of a loaded checkpoint in another format."""

import json
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from spinenet_tf.checkpoints import describe, folder, official, order
from spinenet_tf.checkpoints.load import KERAS_FILES, Loaded
from spinenet_tf.train.optimizer import Momentum

FORMATS = ("own", "official_tf1")


def convert(loaded: Loaded, output: str, form: str = "own", *, optimizer: bool = False) -> None:
    """Writes what `load.open_checkpoint` returned.

    Args:
      output: with form 'own' a `.keras` or `.weights.h5` file, which gets a .json beside it, or a
        model folder: checkpoint, model.json and config.gin, ready for every mode. With
        'official_tf1' a TF1 checkpoint, such as `out/model.ckpt-0`.
      optimizer: with the momentum, so that training goes on; folders and TF1 files only.

    Raises:
      ValueError: the momentum is not there, or the format cannot hold the model.
    """
    if optimizer:
        _check_velocities(loaded)
    if form == "official_tf1":
        write_official(loaded, output, optimizer=optimizer)
    elif output.endswith(KERAS_FILES):
        if optimizer:
            raise ValueError(f"{output}: Keras files hold no momentum of ours, give a folder")
        _write_keras(loaded, output)
    else:
        write_folder(loaded, output, optimizer=optimizer)


def write_folder(loaded: Loaded, output: str, *, optimizer: bool = False) -> None:
    """A model folder: a training checkpoint at the file's step, its description and a recipe.

    Raises:
      ValueError: the folder has a checkpoint, or the weights are of a backbone alone.
    """
    if loaded.task is None:
        raise ValueError("a backbone alone is no task: give a .keras or .weights.h5 file")
    if tf.train.latest_checkpoint(output):
        raise ValueError(f"{output} already holds a checkpoint")
    variables = list(loaded.model.trainable_variables)
    momentum = Momentum([v.value for v in variables], 0.9)
    if optimizer:
        for variable, velocity in zip(variables, momentum.velocities, strict=True):
            velocity.assign(loaded.velocities[variable.path])
    step = tf.Variable(loaded.step, dtype=tf.int64)
    saved = folder.checkpoint(loaded.model, momentum, step)
    tf.train.CheckpointManager(saved, output, 1).save(checkpoint_number=loaded.step)
    folder.write_sidecar(output, loaded.description)
    with tf.io.gfile.GFile(f"{output}/config.gin", "w") as file:
        file.write(describe.recipe(loaded.description))


def write_official(loaded: Loaded, output: str, *, optimizer: bool = False) -> None:
    """A TF1 checkpoint with the official code's names, to check results with that code.

    Prints what that code would do otherwise than ours.

    Raises:
      ValueError: the model is none of that code's, or reads its weights otherwise.
    """
    model, style = loaded.model, loaded.description["bindings"]["Style"]
    if style["numerics"] != "official":
        raise ValueError(
            f"weights for numerics {style['numerics']!r} mean another function in the official code"
        )
    _check_boxes(loaded.task)
    variables = [v for v in model.variables if v.dtype != "int64"]
    names = _official_names([v.path for v in variables])
    tensors = {names[v.path]: np.asarray(v) for v in variables}
    if optimizer:
        for variable in model.trainable_variables:
            tensors[f"{names[variable.path]}/Momentum"] = loaded.velocities[variable.path]
    tensors["global_step"] = np.int64(loaded.step)
    tf.io.gfile.makedirs(output.rpartition("/")[0] or ".")
    keys = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=output, tensor_names=keys, shape_and_slices=[""] * len(keys),
        tensors=[tf.constant(tensors[key]) for key in keys],
    )  # fmt: skip


def _check_boxes(task: Any) -> None:
    ratios = describe.ASPECT_RATIOS["official"]
    anchors = getattr(task, "anchors", None)
    if anchors and tuple(anchors.aspect_ratios) != ratios:
        raise ValueError(
            f"Anchors.aspect_ratios={anchors.aspect_ratios}: the official code's are {ratios}"
        )
    if anchors and not task.inclusive_boxes:
        print("the official code counts a box's last pixel, which this model was not trained to do")


def _official_names(paths: list[str]) -> dict[str, str]:
    """{our variable: the official code's}."""
    plan = order.plan_of({path.rpartition("/")[0] for path in paths})
    theirs = {ours: theirs for theirs, ours in official.layers(plan).items()}
    split = {path: path.rpartition("/")[::2] for path in paths}
    strange = sorted({layer for layer, _ in split.values() if layer not in theirs})
    if strange:
        raise ValueError(f"the official code has no layers {', '.join(strange[:10])}")
    return {
        path: f"{theirs[layer]}/{official.variable_name(layer, variable)}"
        for path, (layer, variable) in split.items()
    }


def _write_keras(loaded: Loaded, output: str) -> None:
    tf.io.gfile.makedirs(output.rpartition("/")[0] or ".")
    if output.endswith(".keras"):
        keras.saving.save_model(loaded.model, output)
    else:
        loaded.model.save_weights(output)
    with tf.io.gfile.GFile(f"{output}.json", "w") as file:
        json.dump(loaded.description, file, indent=1)


def _check_velocities(loaded: Loaded) -> None:
    wanted = [v.path for v in loaded.model.trainable_variables]
    missing = [path for path in wanted if path not in loaded.velocities]
    if missing:
        raise ValueError(
            f"the file lacks the momentum of {len(missing)} of {len(wanted)} weights, such as "
            f"{missing[0]}; only files of the official code are read with it (Model Garden's has "
            "the learning rate in it, which its files do not say)"
        )
