"""Checkpoints of any kind into models: every tensor is used, or the error says which is not."""

import dataclasses
import json
import os
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from spinenet_tf.checkpoints import describe, files, folder, recognize, released
from spinenet_tf.checkpoints.files import Weights
from spinenet_tf.models.layers import Style

KERAS_FILES = (".keras", ".weights.h5")
HEADS = ("class_", "box_", "rpn_", "mask_head_")  # how names of layers beyond the backbone begin
PARTS = ("model", "backbone")
SHOWN = 20  # names in an error


class Loaded(NamedTuple):
    """A model with the weights of a checkpoint.

    Attributes:
      model: see the builder that `description` names for inputs and outputs.
      task: decodes, evaluates and trains it; None for a backbone alone.
      description: what else is known; see `checkpoints.describe`.
      velocities: {our name: array}, the optimizer's momentum, if the file has it.
      step: steps trained.
    """

    model: keras.Model
    task: Any
    description: dict
    velocities: dict[str, np.ndarray]
    step: int


def load_checkpoint(path: str, **settings) -> keras.Model:
    """The model that a checkpoint is of, with its weights; see `open_checkpoint`."""
    return open_checkpoint(path, **settings).model


def open_checkpoint(
    path: str,
    *,
    activation: str | None = None,
    epsilon: float | None = None,
    image_size: int | None = None,
    anchor_size: float | None = None,
) -> Loaded:
    """Recognises a checkpoint by its tensors, builds its model and loads every weight.

    Args:
      path: a TF1 checkpoint of the official code (`model.ckpt-162050`), a TF2 checkpoint of Model
        Garden (`ckpt-277200`), a model folder of ours, or a .keras or .weights.h5 file that
        `--mode=convert` wrote, with its .json.
      activation: 'relu' or 'swish'; epsilon: of batch norm; image_size: side in pixels of the
        network's input; anchor_size: `Anchors.size` of a detector. For foreign files, whose tensors
        do not tell; what is not given comes from the name of a released file or is the
        likeliest, and is printed.

    Raises:
      FileNotFoundError: no checkpoint. ValueError: damaged, of a network that is not here, or with
        tensors too many, too few or of other shapes, which it lists.
    """
    settings = {
        "activation": activation, "epsilon": epsilon, "image_size": image_size,
        "anchor_size": anchor_size,
    }  # fmt: skip
    if str(path).endswith(KERAS_FILES):
        _no_settings(path, settings)
        return _open_keras(str(path))
    weights = files.read(path)
    if weights.kind == "own":
        _no_settings(path, settings)
        description = _own_description(weights.path)
    else:
        shapes = {name: value.shape for name, value in weights.tensors.items()}
        facts = _facts(weights.path, shapes)
        description = describe.of_foreign(weights.path, weights.kind, facts, settings)
    description["source"] = description.get("source", {}) | {"path": weights.path}
    task, model = describe.build(description)
    assign(model, weights)
    return Loaded(model, task, description, weights.velocities, weights.step)


def assign(model: keras.Model, weights: Weights) -> None:
    """Sets all variables of a model.

    Raises:
      ValueError: they are not exactly those of the file; lists what differs.
    """
    variables = {v.path: v for v in model.variables if v.dtype != "int64"}  # no random seeds
    missing = [weights.in_file(name) for name in variables if name not in weights.tensors]
    unused = [weights.in_file(name) for name in weights.tensors if name not in variables]
    shared = [name for name in variables if name in weights.tensors]
    misshaped = [
        f"{weights.in_file(name)} {weights.tensors[name].shape}, not {tuple(variables[name].shape)}"
        for name in shared
        if weights.tensors[name].shape != tuple(variables[name].shape)
    ]
    _complain(weights.path, missing, [*unused, *weights.unknown], misshaped)
    for name in shared:
        variables[name].assign(weights.tensors[name])


def initialize(model: keras.Model, task: Any, path: str, part: str = "model") -> None:
    """Sets a recipe's model to the weights of any checkpoint, to start training from.

    Args:
      path: see `open_checkpoint`; not a Keras file, which `--mode=convert` makes a folder of.
      part: 'model': all weights; predictors of another number of classes stay random, which is
        printed. 'backbone': only those of the backbone, with its endpoints or pyramid network.

    Raises:
      FileNotFoundError: no checkpoint. ValueError: it is damaged, or its model differs elsewhere
        from the recipe's; says in what.
    """
    if part not in PARTS:
        raise ValueError(f"Training.init_part={part!r} is not one of {PARTS}")
    if str(path).endswith(KERAS_FILES):
        raise ValueError(f"{path}: --mode=convert it to a model folder, to start from that")
    weights = files.read(path)
    _check_conventions(weights, task, part)
    wanted = {v.path: v for v in model.variables if v.dtype != "int64"}
    if part == "backbone":
        wanted = {name: v for name, v in wanted.items() if not name.startswith(HEADS)}
    kept, wrong = [], []
    for name, variable in wanted.items():
        value = weights.tensors.get(name)
        if value is not None and value.shape == tuple(variable.shape):
            variable.assign(value)
        elif name.startswith(folder.PREDICTORS):
            kept.append(name)
        else:
            wrong.append(name)
    if wrong:
        raise ValueError(_why(weights, model, wrong, part))
    count = len(wanted) - len(kept)
    print(f"{count} weights from {weights.path} ({weights.kind})" + _random(kept))


def _check_conventions(weights: Weights, task: Any, part: str) -> None:
    """Weights of the right shapes may still mean something else.

    Raises:
      ValueError: the recipe pads or activates otherwise, or has its anchors in another order.
    """
    style = dataclasses.asdict(Style())
    known = _style_of(weights)
    wanted = {f"Style.{k}": (style[k], v) for k, v in known.items()}
    _say_epsilon(weights, style["epsilon"])
    if "activation" not in known:
        print(f"{weights.path} does not tell activation and Anchors.size: taken from the recipe")
    anchors = getattr(task, "anchors", None) if part == "model" else None
    if anchors and weights.kind == "own":
        folder.check_anchors(os.path.dirname(weights.path), task)
    elif anchors:
        ratios = describe.ASPECT_RATIOS[weights.kind]
        wanted["Anchors.aspect_ratios"] = (tuple(anchors.aspect_ratios), ratios)
        if release := _release(weights):
            wanted["Anchors.size"] = (anchors.size, release.anchor_size)
    wrong = [
        f"{name} = {there!r} (the recipe has {here!r})"
        for name, (here, there) in wanted.items()
        if here != there
    ]
    if wrong:
        raise ValueError(f"{weights.path} ({weights.kind}) needs {' and '.join(wrong)}")


def _say_epsilon(weights: Weights, here: float) -> None:
    """Prints if batch norm's epsilon, where it is known, is another one than the recipe's."""
    if weights.kind == "own":
        sidecar = folder.read_sidecar(os.path.dirname(weights.path))
        there = sidecar.get("bindings", {}).get("Style", {}).get("epsilon", here)
    else:
        release = _release(weights)
        there = released.EPSILONS[release.network] if release else here
    if there != here:
        print(
            f"{weights.path}: batch norm's epsilon was {there}, the recipe's Style.epsilon {here}"
        )


def _style_of(weights: Weights) -> dict[str, str]:
    """Activation and numerics of the model of a checkpoint, as far as it is known."""
    if weights.kind == "own":
        sidecar = folder.read_sidecar(os.path.dirname(weights.path))
        style = sidecar.get("bindings", {}).get("Style", {})
        return {k: style[k] for k in ("activation", "numerics") if k in style}
    release = _release(weights)
    known = {"activation": release.activation} if release else {}
    return known | {"numerics": weights.kind}


def _release(weights: Weights) -> released.Release | None:
    """The release that the folder of a foreign file is named after."""
    facts = _facts(weights.path, {name: value.shape for name, value in weights.tensors.items()})
    return released.release_of(weights.path, weights.kind, facts["network"], facts["size"])


def _random(names: list[str]) -> str:
    return f"; random, for other classes: {', '.join(names)}" if names else ""


def _why(weights: Weights, model: keras.Model, wrong: list[str], part: str) -> str:
    """How a checkpoint's model is another than the recipe's, in words."""
    there = _facts(weights.path, {name: value.shape for name, value in weights.tensors.items()})
    here = _facts("the recipe", {v.path: tuple(v.shape) for v in model.variables})
    said = recognize.differences(there, here)
    if part == "backbone":
        said = [s for s in said if not s.startswith(("it ", "its sub"))]
    names = ", ".join(weights.in_file(name) for name in wrong[:SHOWN])
    reason = "; ".join(said) or "tensors are missing or of another shape"
    return f"{weights.path} is not of the recipe's model: {reason} ({len(wrong)} weights: {names})"


def _facts(what: str, shapes: dict) -> dict[str, Any]:
    try:
        return recognize.recognize(shapes)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _complain(path: str, missing: list[str], unused: list[str], misshaped: list[str]) -> None:
    lists = {
        "the file lacks": missing,
        "the model has no place for": unused,
        "of another shape": misshaped,
    }
    said = [f"{what} ({len(names)}): {_some(names)}" for what, names in lists.items() if names]
    if said:
        raise ValueError(f"{path}: " + "; ".join(said))


def _some(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def _no_settings(path: str, settings: dict) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"{path} says itself what it needs: {', '.join(given)} cannot be set")


def _own_description(prefix: str) -> dict:
    model_dir = prefix.rpartition("/")[0] or "."
    description = folder.read_sidecar(model_dir)
    if "bindings" not in description:
        raise ValueError(
            f"{model_dir}/{folder.SIDECAR} does not say what model this is; use --model_dir with "
            "the recipe it was trained with"
        )
    return description


def _open_keras(path: str) -> Loaded:
    """A file of Keras, and its description beside it."""
    if not tf.io.gfile.exists(f"{path}.json"):
        raise FileNotFoundError(f"{path}.json, which says what model {path} is, is not there")
    with tf.io.gfile.GFile(f"{path}.json") as file:
        description = json.load(file)
    description["source"] = description.get("source", {}) | {"path": path}
    task, model = describe.build(description)
    if path.endswith(".keras"):
        model = keras.models.load_model(path, compile=False)
    else:
        model.load_weights(path)
    return Loaded(model, task, description, {}, 0)
