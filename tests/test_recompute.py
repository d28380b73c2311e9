"""Blocks computed again in the backward pass: the same results, and really computed again."""

import functools
import types

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

from spinenet_tf import SpineNet
from spinenet_tf.models import keras_layers
from spinenet_tf.models.count import count
from spinenet_tf.models.keras_layers import training_progress
from spinenet_tf.models.layers import Style, block
from spinenet_tf.models.recompute import Recomputed
from spinenet_tf.train import trainer

RNG = np.random.default_rng(7)
RANDOM = dict(stochastic_depth=0.5, dropblock_keep=0.7, dropblock_size=2, synchronized=True)
NODES = [
    (2, "bottleneck", (0, 1), False),
    (4, "residual", (0, 1), False),
    *((level, "bottleneck", (2, level - 1), True) for level in (4, 5, 6, 7)),
    (3, "bottleneck", (2, 7), True),
]  # all that a graph has: more and fewer rows, blocks of both kinds, one with two children


def network(recompute):
    keras.utils.set_random_seed(1)
    settings = dict(width=0.125, endpoints=8, input_shape=(64, 64, 3), **RANDOM)
    return SpineNet("49", blocks=NODES, recompute=recompute, **settings)


def step(model, x):
    """Outputs, gradients of all weights and of x, then averages and seeds as they are."""
    with training_progress(0.8):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = tf.nest.flatten(model(x, training=True))
            loss = tf.add_n([tf.reduce_sum(tf.sin(y)) for y in outputs])
        variables = sorted(model.trainable_variables, key=lambda v: v.path)
        gradients = tape.gradient(loss, [x, *(v.value for v in variables)])
    states = sorted(model.non_trainable_variables, key=lambda v: v.path)
    return [*outputs, *gradients], [v.value for v in states if v.dtype != "int64"]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_results_are_the_same(compiled):
    keras.config.set_dtype_policy("float64")
    models = [network(recompute) for recompute in (True, False)]
    kinds = [{type(layer) for layer in model.layers} for model in models]
    assert Recomputed in kinds[0] and Recomputed not in kinds[1]
    parity.randomize(models[1])
    values = {v.path: v for v in models[1].variables if v.dtype != "int64"}
    assert {v.path for v in models[0].variables if v.dtype != "int64"} == set(values)
    for variable in models[0].variables:
        if variable.dtype != "int64":
            variable.assign(values[variable.path])
    x, found = tf.constant(RNG.normal(0.3, 1.0, (2, 64, 64, 3))), []
    for model in models:
        seeds = sorted((v for v in model.variables if v.dtype == "int64"), key=lambda v: v.path)
        for i, seed in enumerate(seeds):
            seed.assign([i, 7])
        results, states = (tf.function(step) if compiled else step)(model, x)
        found.append([*results, *states, *(seed.numpy() for seed in seeds)])
    for ours, plain in zip(*found, strict=True):
        scale = np.abs(plain).max() + 1e-3
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-9 * scale)


def blocks(recompute, **style):
    style, image = Style(recompute=recompute, **style), keras.Input((8, 8, 8))
    x = image
    for i in range(2):
        x = block(x, "bottleneck", 4, style=style, drop_path=0.0, name=f"b{i}")
    return keras.Model(image, x)


def test_the_trainers_backward_pass_knows_how_far_training_is(monkeypatch):
    """DropBlock, computed again there, drops as much as in the forward pass."""
    seen, run = [], object.__new__(trainer.Run)
    run.step, run.model, run.trainer = tf.constant(3), None, trainer.Training()
    run.varying = False
    run.task = types.SimpleNamespace(loss=lambda *_, **__: (tf.constant(0.0), {}))
    run.optimizer = types.SimpleNamespace(apply=lambda *_: None)
    told = keras_layers._PROGRESS
    monkeypatch.setattr(trainer, "gradient", lambda *_: [seen.append(told.get()) or tf.zeros([])])
    run.replica_step({}, tf.constant(0.1), 6)
    assert [float(progress) for progress in seen] == [0.5]


def test_costs_are_counted_once():
    assert count(network(True)) == count(network(False))


def test_under_mixed_precision_the_gradient_is_of_the_same_weights():
    keras.config.set_dtype_policy("mixed_bfloat16")
    ours, plain = blocks(True), blocks(False)
    plain.set_weights(ours.get_weights())
    x = tf.cast(tf.constant(RNG.normal(size=(2, 8, 8, 8))), "bfloat16")
    found = [step(model, x)[0] for model in (ours, plain)]
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_compiler_does_not_find_out():
    """Who would else keep the maps: the forward pass's convolutions are there twice."""
    x, counts = tf.zeros((2, 8, 8, 8)), []
    for recompute in (True, False):
        model = blocks(recompute)
        function = tf.function(functools.partial(step, model), jit_compile=True)
        program = function.experimental_get_compiler_ir(x)(stage="optimized_hlo")
        counts.append(sum("convolution" in line and " fusion(" not in line
                          for line in program.splitlines()))  # fmt: skip
    assert counts[0] > counts[1], counts


def test_saved_and_loaded(tmp_path):
    model = blocks(True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = RNG.normal(size=(2, 8, 8, 8)).astype("f4")
    np.testing.assert_array_equal(loaded(x, training=True), model(x, training=True))
    assert any(isinstance(layer, Recomputed) for layer in loaded.layers)
