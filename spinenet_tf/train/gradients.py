"""The gradient of a loss, without what is known to be zero."""

import keras
import tensorflow as tf


def gradient(tape: tf.GradientTape, loss: tf.Tensor, model: keras.Model) -> list[tf.Tensor]:
    """The gradient of `loss` with respect to each of the model's trainable variables.

    Batch norm subtracts the mean, and with it the bias of a layer before it. The gradient of such a
    bias is zero, and would be the rounding of a sum over whole maps, which costs a TPU a pass over
    each; so it is set to zero.
    """
    hidden = _biases_before_norm(model)
    variables = [v.value for v in model.trainable_variables if v.path not in hidden]
    found = iter(tape.gradient(loss, variables))
    return [
        tf.zeros_like(v.value) if v.path in hidden else next(found)
        for v in model.trainable_variables
    ]


def _biases_before_norm(model: keras.Model) -> set[str]:
    """Paths of the biases whose layers feed nothing but batch norms that train."""
    paths = set()
    for layer in model._flatten_layers():
        readers = [node.operation for node in layer._outbound_nodes]
        normed = readers and all(
            isinstance(reader, keras.layers.BatchNormalization) and reader.trainable
            for reader in readers
        )
        if normed and getattr(layer, "bias", None) is not None:
            paths.add(layer.bias.path)
    return paths
