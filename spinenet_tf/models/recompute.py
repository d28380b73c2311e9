"""Blocks whose inner maps are computed again in the backward pass, to save their memory."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("spinenet_tf")
class Recomputed(keras.layers.Layer):
    """A model of one map that keeps its input alone for the gradient (arXiv 1604.06174).

    Call arguments and results are those of the model, as are weights, averages and random numbers.
    With other backends than TensorFlow it is the model.
    """

    def __init__(self, model: keras.Model, **kwargs):
        super().__init__(autocast=False, **kwargs)  # the model's layers have policies of their own
        self.model = model

    def build(self, shape):
        pass  # the model is built

    def call(self, x, training=False):
        if not training or keras.backend.backend() != "tensorflow":
            return self.model(x, training=training)
        y, *states = self._run(x)
        for variable, state in zip(self.model.non_trainable_variables, states, strict=True):
            variable.assign(state)
        return y

    def _run(self, x):
        """The model's result, and what its averages and seeds are afterwards."""
        import tensorflow as tf  # not at the top: the same model runs without TensorFlow

        trained, others = self.model.trainable_variables, self.model.non_trainable_variables
        weights = [tf.convert_to_tensor(v.value) for v in trained]
        before = [tf.convert_to_tensor(v.value) for v in others]

        def forward(x, *weights):  # not `stateless_call`, which casts the weights of `Held` layers
            values = zip([*trained, *others], [*weights, *before], strict=True)
            with keras.StatelessScope(state_mapping=values) as scope:
                y = self.model(x, training=True)
            return [y, *map(scope.get_current_value, others)]

        @tf.custom_gradient
        def run(x, *weights):
            def gradient(upstream, *_):
                sources = [_after(x, upstream), *weights]
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    y = forward(*sources)[0]
                return tape.gradient(y, sources, output_gradients=upstream)

            return forward(x, *weights), gradient

        return run(x, *weights)

    def compute_output_shape(self, shape):
        return (shape[0], *self.model.output.shape[1:])

    def get_config(self):
        return super().get_config() | {"model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config):
        config.pop("autocast", None)
        return cls(keras.saving.deserialize_keras_object(config.pop("model")), **config)


def _after(x, upstream):
    """x, in a way that a compiler must wait for `upstream`: else it finds that it has all of this.

    By adding a zero that is one whatever `upstream` is, if finite, which compilers do not know.
    """
    zero = ops.minimum(ops.abs(upstream[:1, :1, :1, :1]), 0.0)
    return x + ops.cast(zero, x.dtype)
