"""1x1 convolutions with batch norm, computed together where they share a map.

What they cost a TPU is the passes over wide maps, not the multiply-adds. So convolutions of one map
are one of all their filters, and a sum of convolutions is one of all their inputs, whose batch
statistics need no pass over the result: for y = x W, the mean of y is mean(x) W and its variance
the diagonal of W' cov(x) W. Weights and results are those of separate layers.
"""

import keras
from keras import ops

from spinenet_tf.models.device import on_tpu
from spinenet_tf.models.norm import affine, normalized, over_replicas, wide


class Held(keras.layers.Layer):
    """Holds convolutions without bias and their batch norms, of which only the weights are used."""

    def __init__(self, convs: list, norms: list, **kwargs):
        super().__init__(autocast=False, **kwargs)  # a kernel is rounded after it is scaled
        self.convs, self.norms = list(convs), list(norms)

    def build_held(self, shapes):
        """Builds what is not built, for inputs of these shapes."""
        for layer, norm, shape in zip(self.convs, self.norms, shapes, strict=True):
            if not layer.built:
                layer.build((None, None, None, shape[-1]))
                norm.build((None, None, None, layer.filters))

    def get_config(self):
        held = {"convs": self.convs, "norms": self.norms}
        serialize = keras.saving.serialize_keras_object
        return super().get_config() | {k: list(map(serialize, v)) for k, v in held.items()}

    @classmethod
    def from_config(cls, config):
        config.pop("autocast", None)
        deserialize = keras.saving.deserialize_keras_object
        held = {k: list(map(deserialize, config.pop(k))) for k in ("convs", "norms")}
        return cls(**held, **config)


@keras.saving.register_keras_serializable("spinenet_tf")
class PointwiseSum(Held):
    """The sum of 1x1 convolutions with batch norm, one for each input.

    Call arguments: [[b, h, w, c0], [b, h, w, c1], ...]; returns [b, h, w, filters].

    Args:
      columns: 2 for maps in pairs of columns, see `models.pairs`.
    """

    def __init__(self, convs: list, norms: list, columns: int = 1, **kwargs):
        super().__init__(convs, norms, **kwargs)
        self.columns, self.product = columns, exact_product if on_tpu() else ops.matmul

    def build(self, shapes):
        self.build_held([(*shape[:-1], shape[-1] // self.columns) for shape in shapes])

    def compute_output_shape(self, shapes):
        return (*shapes[0][:-1], self.convs[0].filters * self.columns)

    def call(self, inputs, training=False):
        inputs = [ops.cast(x, self.compute_dtype) for x in inputs]
        x = ops.concatenate(inputs, axis=-1) if len(inputs) > 1 else inputs[0]
        training = training and self.trainable
        mean, moment = _moments(x, self.norms[0].synchronized) if training else (None, None)
        kernels, offset, start = [], 0.0, 0
        for layer, norm in zip(self.convs, self.norms, strict=True):
            kernel = matrix(layer)
            one = slice(start, start := start + kernel.shape[0] * self.columns)
            if training:
                parts = _of_columns(mean[one], moment[one, one], self.columns)
                scale, shift = affine(norm, _through(kernel, *parts, self.product))
            else:
                scale, shift = affine(norm, None)
            kernels.append(kernel * scale)
            offset += shift
        if self.columns == 2:
            kernels, offset = map(block_diagonal, kernels), ops.tile(offset, 2)
        kernel = ops.concatenate(list(kernels))[None, None]
        y = ops.conv(x, ops.cast(kernel, x.dtype), padding="valid")
        return ops.cast(ops.cast(y, wide(x)) + offset, x.dtype)

    def get_config(self):
        return super().get_config() | {"columns": self.columns}


@keras.saving.register_keras_serializable("spinenet_tf")
class PointwiseSplit(Held):
    """1x1 convolutions of one input, as wide each, with batch norm and an activation.

    Call arguments: [b, h, w, c]; returns [[b, h, w, filters], ...].

    Args:
      columns: 2 for maps in pairs of columns, see `models.pairs`.
    """

    def __init__(
        self, convs: list, norms: list, activation: str, columns: int = 1, **kwargs
    ):  # fmt: skip
        super().__init__(convs, norms, **kwargs)
        self.activation, self.columns = activation, columns

    def build(self, shape):
        self.build_held([(*shape[:-1], shape[-1] // self.columns)] * len(self.convs))

    def compute_output_shape(self, shape):
        return [(*shape[:-1], layer.filters * self.columns) for layer in self.convs]

    def call(self, x, training=False):
        x = ops.cast(x, self.compute_dtype)
        kernels = [matrix(layer) for layer in self.convs]
        if self.columns == 2:
            kernels = map(block_diagonal, kernels)
        kernel = ops.concatenate(list(kernels), axis=-1)[None, None]
        y = ops.conv(x, ops.cast(kernel, x.dtype), padding="valid")
        y = normalized(y, self.norms, self.columns, training and self.trainable)
        y = keras.activations.get(self.activation)(y)
        return ops.split(y, len(self.convs), axis=-1)

    def get_config(self):
        return super().get_config() | {"activation": self.activation, "columns": self.columns}


def matrix(conv):
    """The kernel [1, 1, c, d] of a convolution as [c, d]; a slice has a dearer gradient."""
    return ops.reshape(conv.kernel, conv.kernel.shape[2:])


def block_diagonal(kernel):
    """[c, d] -> [2 c, 2 d], of two columns side by side."""
    zeros = ops.zeros_like(kernel)
    rows = [ops.concatenate(row, axis=1) for row in ((kernel, zeros), (zeros, kernel))]
    return ops.concatenate(rows)


def _of_columns(mean, moment, columns: int):
    """Mean [c] and second moments [c, c] of one column from those of `columns` side by side."""
    if columns == 1:
        return mean, moment
    half = mean.shape[0] // 2
    first, second = slice(None, half), slice(half, None)
    moments = (moment[first, first] + moment[second, second]) / 2
    return (mean[first] + mean[second]) / 2, moments


def _through(kernel, mean, moment, product):
    """Mean and variance [d] of x W, from W [c, d] and x's mean [c] and second moments [c, c]."""
    covariance = moment - mean[:, None] * mean
    variance = ops.sum(product(covariance, kernel) * kernel, axis=0)
    return ops.matmul(mean[None], kernel)[0], ops.maximum(variance, 0.0)


@ops.custom_gradient
def exact_product(a, b):
    """[m, n] @ [n, k], whose float32 factors a TPU rounds to bfloat16, to 16 bits of each.

    For variances: where channels correlate, the terms of their sums cancel.
    """

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        return ops.matmul(upstream, ops.transpose(b)), ops.matmul(ops.transpose(a), upstream)

    if a.dtype == "float32":  # in float64, nothing is rounded
        (high, low), (top, rest) = _halves(a), _halves(b)
        factors = [ops.concatenate([high, high, low], 1), ops.concatenate([top, rest, top])]
    else:
        factors = [a, b]
    return ops.matmul(*factors), gradient


def _halves(x):
    """Two float32 that sum to x, of which bfloat16 holds the first exactly."""
    import tensorflow as tf  # a TPU is TensorFlow's here

    # Not by casts: the compiler may leave out a rounding that it thinks nobody wants.
    bits = tf.bitwise.bitwise_and(tf.bitcast(x, tf.uint32), tf.constant(0xFFFF0000, tf.uint32))
    high = tf.bitcast(bits, tf.float32)
    return high, x - high


def _moments(x, synchronized: bool):
    """Mean [c] and second moments [c, c] of [b, h, w, c] over all places, of all replicas."""
    sums = _sums(x)
    count = ops.cast(ops.prod(ops.shape(x)[:-1]), sums.dtype)
    if synchronized:
        sums, count = over_replicas(sums), over_replicas(count)
    return sums[-1] / count, sums[:-1] / count


def _sums(x):
    """[c + 1, c], float32 at least: sums over all places of x_i x_j, and of x_j in the last row."""
    if keras.backend.backend() != "tensorflow":
        x = ops.cast(x, wide(x))
        return ops.concatenate([ops.einsum("bhwi,bhwj->ij", x, x), ops.sum(x, (0, 1, 2))[None]])
    return _tensorflow_sums(x)


def _tensorflow_sums(x):
    """The same as a convolution's filter gradient, for which a TPU need not move the map."""
    import tensorflow as tf

    @tf.custom_gradient
    def sums(x):
        exact, channels = tf.cast(x, wide(x)), x.shape[-1]
        moments = tf.raw_ops.Conv2DBackpropFilter(
            input=exact, filter_sizes=[1, 1, channels, channels], out_backprop=exact,
            strides=[1, 1, 1, 1], padding="VALID",
        )  # fmt: skip

        def gradient(upstream):
            kernel = upstream[:-1] + tf.transpose(upstream[:-1])
            back = tf.nn.conv2d(exact, kernel[None, None], 1, "VALID") + upstream[-1]
            return tf.cast(back, x.dtype)

        total = tf.reduce_sum(exact, [0, 1, 2])
        return tf.concat([moments[0, 0], total[None]], 0), gradient

    return sums(x)
