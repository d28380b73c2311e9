"""Parameters and multiply-adds of a built model, counted from its layers."""

import math
from typing import NamedTuple

import keras

from spinenet_tf.models.pointwise import Held, PointwiseSum
from spinenet_tf.models.recompute import Recomputed
from spinenet_tf.models.stem import Stem


class Counts(NamedTuple):
    """What a model costs for one image.

    Attributes:
      parameters: trainable, as in the paper's tables.
      moving_statistics: of batch norm, which checkpoints hold as well.
      multiply_adds: in the paper's convention: those of convolutions and dense layers, and one for
        every batch-normalised element (reproduces Table 2 to its rounding).
      activations: elements of all layer outputs; times 4 or 2 bytes, an upper bound of memory.
    """

    parameters: int
    moving_statistics: int
    multiply_adds: int
    activations: int


def count(model: keras.Model, times: dict[str, int] | None = None) -> Counts:
    """Counts a functional model of static input size, one image.

    Args:
      times: how often an image runs a model nested in this one, by its name; once if not given.

    Raises:
      ValueError: the input size is dynamic.
    """
    if None in model.inputs[0].shape[1:]:
        raise ValueError(f"{model.name}: counting needs a static size, not {model.inputs[0].shape}")
    multiply_adds = activations = 0
    for layer, shape, runs in _calls(model, times or {}, 1):
        multiply_adds += _multiply_adds(layer, shape) * runs
        activations += math.prod(shape) * runs
    return Counts(
        parameters=_size(model.trainable_variables),
        moving_statistics=_size(model.non_trainable_variables),
        multiply_adds=multiply_adds,
        activations=activations,
    )


def _calls(model: keras.Model, times: dict[str, int], runs: int):
    """(layer, output shape without batch, runs); a layer that five levels share comes 5 times."""
    for node in (n for nodes in model._nodes_by_depth.values() for n in nodes):
        if isinstance(node.operation, Recomputed):
            inner = _calls(node.operation.model, times, runs)
            yield from (one for one in inner if not isinstance(one[0], keras.layers.InputLayer))
            continue
        if isinstance(node.operation, keras.Model):
            yield from _calls(node.operation, times, runs * times.get(node.operation.name, 1))
            continue
        for output in node.output_tensors:
            yield node.operation, output.shape[1:], runs


def _multiply_adds(layer: keras.Layer, shape: tuple[int, ...]) -> int:
    if isinstance(layer, keras.layers.BatchNormalization):
        return math.prod(shape)
    if isinstance(layer, Stem):  # what is pooled was convolved and normalised at twice the size
        places = math.prod(-(-side // 2) for side in layer.input.shape[1:3])
        return places * layer.convs[0].filters * _of_held(layer.convs[0])
    if isinstance(layer, PointwiseSum):
        return math.prod(shape) * sum(map(_of_held, layer.convs))
    if isinstance(layer, Held):
        return math.prod(shape) * _of_held(layer.convs[0])
    if isinstance(layer, keras.layers.SeparableConv2D):  # both parts: at the places of the result
        kernels = (layer.depthwise_kernel, layer.pointwise_kernel)
        return math.prod(shape[:-1]) * sum(math.prod(kernel.shape) for kernel in kernels)
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return math.prod(shape) * math.prod(layer.kernel_size)
    if isinstance(layer, keras.layers.Conv2DTranspose):  # every input meets every kernel element
        places = math.prod(shape[:-1]) // math.prod(layer.strides)
        return places * math.prod(layer.kernel.shape)
    if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
        return math.prod(shape) * math.prod(layer.kernel.shape[:-1])
    return 0


def _of_held(conv: keras.layers.Conv2D) -> int:
    """Of an element of a convolution's output, normalised."""
    return math.prod(conv.kernel.shape[:-1]) + 1


def _size(variables) -> int:
    return sum(math.prod(v.shape) for v in variables if v.dtype.startswith("float"))
