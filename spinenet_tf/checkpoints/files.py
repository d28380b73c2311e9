"""Reads checkpoint files of three kinds into arrays under our names."""

import os
import re
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

from spinenet_tf.checkpoints import garden, official

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
OWN = re.compile(r"model/([^/]+)\.S(?=[^/]+/\.ATTRIBUTES)")  # of a weight; a slash is written .S
# What a training loop saves beside the model.
BOOKKEEPING = re.compile(r"optimizer|save_counter|global_step")


# What TensorFlow's reader raises on files cut or overwritten.
UNREADABLE = (tf.errors.OpError, RuntimeError, ValueError, IndexError)


class Weights(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      path: of the file, without its endings.
      kind: 'official' (TF1 names), 'model_garden' (TF2 objects) or 'own'.
      tensors: {our name: array}, such as 'stem_conv/kernel'.
      layers: {our layer: the file's layer}, of all that its network should have.
      unknown: names in the file that are none of ours; nothing of the model may be left there.
      velocities: {our name: array}, the optimizer's momentum; official files only.
      step: steps trained.
    """

    path: str
    kind: str
    tensors: dict[str, np.ndarray]
    layers: dict[str, str]
    unknown: list[str]
    velocities: dict[str, np.ndarray]
    step: int

    def in_file(self, name: str) -> str:
        """What the file calls one of our variables."""
        layer, _, variable = name.rpartition("/")
        if layer not in self.layers:
            return name
        return f"{self.layers[layer]}/{official.variable_name(layer, variable)}"


def read(path: str) -> Weights:
    """Reads every tensor of a checkpoint: a damaged file is found here, before a model is built.

    Args:
      path: a folder, `model.ckpt-123` or `model.ckpt-123.index`; gs:// works.

    Raises:
      FileNotFoundError: no checkpoint there. ValueError: it is damaged, or of a network that this
        package does not have.
    """
    prefix = find(path)
    raw = _read_all(prefix)
    if OBJECT_GRAPH not in raw:
        return _official(prefix, raw)
    names = _object_names(raw.pop(OBJECT_GRAPH))
    named = {OWN.sub(r"\1/", key): value for key, value in raw.items() if OWN.match(key)}
    # Checkpoints of earlier versions had the places of layers for keys.
    placed = {names[key]: value for key, value in raw.items() if "/_operations/" in key}
    if named or placed:
        return _own(prefix, named or placed, raw)
    return _garden(prefix, raw, names)


def find(path: str) -> str:
    """The whole path of a checkpoint without .index or .data; folders in it may name a release.

    Raises:
      FileNotFoundError: none, or several in a folder that names no newest one.
    """
    path = str(path) if "://" in str(path) else os.path.abspath(path)
    if tf.io.gfile.isdir(path):
        newest = tf.train.latest_checkpoint(path)
        if newest:
            return newest
        found = tf.io.gfile.glob(os.path.join(path, "*.index"))
        if len(found) != 1:
            here = sorted(map(os.path.basename, found)) or "none"
            raise FileNotFoundError(f"{path}: give one checkpoint; *.index files here: {here}")
        return found[0].removesuffix(".index")
    prefix = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path)
    if not tf.io.gfile.exists(f"{prefix}.index"):
        packed = path.endswith((".gz", ".tar", ".zip"))
        hint = "unpack it first" if packed else f"there is no {prefix}.index"
        raise FileNotFoundError(f"{path} is no checkpoint: {hint}")
    return prefix


def _read_all(prefix: str) -> dict[str, np.ndarray]:
    try:
        reader = tf.train.load_checkpoint(prefix)
        names = sorted(reader.get_variable_to_shape_map())
    except UNREADABLE as error:
        raise ValueError(f"{prefix}.index cannot be read: {_first_line(error)}") from error
    tensors, broken = {}, []
    for name in names:
        try:
            tensors[name] = reader.get_tensor(name)
        except UNREADABLE as error:
            broken.append(name)
            reason = _first_line(error)
    if broken:
        sizes = {f: tf.io.gfile.stat(f).length for f in tf.io.gfile.glob(f"{prefix}.data-*")}
        raise ValueError(
            f"{prefix}: {len(broken)} of {len(names)} tensors cannot be read, the first is "
            f"{broken[0]} ({reason}). Data files and their bytes: {sizes}. Was it copied whole?"
        )
    return tensors


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _object_names(graph: bytes) -> dict[str, str]:
    """{checkpoint key: the name that Keras gave the variable}."""
    proto = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph)
    attributes = (attribute for node in proto.nodes for attribute in node.attributes)
    return {attribute.checkpoint_key: attribute.full_name for attribute in attributes}


def _official(prefix: str, raw: dict[str, np.ndarray]) -> Weights:
    step = int(raw.pop("global_step", 0))
    slots = {name: raw.pop(name) for name in list(raw) if name.endswith(official.SLOTS)}
    layers_here = {name.rpartition("/")[0] for name in raw}
    try:
        known = official.layers(official.plan_of(layers_here))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{prefix}: {error}") from error
    weights = _translate(prefix, "official", raw, known)
    momentum = {name: slots.get(f"{weights.in_file(name)}/Momentum") for name in weights.tensors}
    velocities = {name: value for name, value in momentum.items() if value is not None}
    return weights._replace(velocities=velocities, step=step)


def _garden(prefix: str, raw: dict[str, np.ndarray], names: dict[str, str]) -> Weights:
    step = int(raw.get(f"global_step{VALUE}", 0))
    tensors, full_names = {}, {}
    for key, value in raw.items():
        path = key.removesuffix(VALUE).removeprefix("model/")
        if BOOKKEEPING.match(path) or "/.OPTIMIZER_SLOT/" in key:
            continue
        tensors[path], full_names[path] = value, names.get(key, "")
    try:
        known = garden.layers(full_names)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{prefix}: {error}") from error
    return _translate(prefix, "model_garden", tensors, known)._replace(step=step)


def _own(prefix: str, tensors: dict[str, np.ndarray], raw: dict[str, np.ndarray]) -> Weights:
    """Our variables carry their names."""
    tensors = {
        name.removesuffix(VALUE): value
        for name, value in tensors.items()
        if not name.endswith("/seed_generator_state")
    }
    step = int(raw.get(f"step{VALUE}", 0))
    return Weights(prefix, "own", tensors, {}, [], {}, step)


def _translate(prefix: str, kind: str, raw: dict[str, np.ndarray], known: dict) -> Weights:
    """`known`: {their layer: our layer}."""
    tensors, unknown = {}, []
    for name, value in raw.items():
        layer, _, variable = name.rpartition("/")
        if layer not in known:
            unknown.append(name)
            continue
        ours = known[layer]
        if official.variable_name(ours, "kernel") == variable:
            variable = "kernel"
        tensors[f"{ours}/{variable}"] = value
    layers = {ours: theirs for theirs, ours in known.items()}
    return Weights(prefix, kind, tensors, layers, unknown, {}, 0)
