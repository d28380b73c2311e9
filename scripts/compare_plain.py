"""A recipe's training step as it is and built of plain Keras layers, compiled for a TPU.

    python scripts/compare_plain.py --recipe=gin_configs/table6/49_imagenet.gin --tpu=v3-32

Prints the compiler's estimates (no run times) and the memory of both. "Plain" is one convolution
and one batch norm for each of the paper's, with derived gradients, no pairs of columns and no
strips; losses, targets and input are the same. A compilation takes 4 minutes and more on 2 cores.
"""

import contextlib
import tempfile
from pathlib import Path
from unittest import mock

import keras
from absl import app, flags

from spinenet_tf import main as program
from spinenet_tf import modes
from spinenet_tf.models import layers, pairs, strips
from spinenet_tf.models.layers import Style
from spinenet_tf.tpu import chips, programs, report
from spinenet_tf.train.optimizer import Schedule
from spinenet_tf.train.trainer import Training

TPU = flags.DEFINE_string("tpu", "v3-32", "Slice, as --tpu_type of spinenet_tf.main.")
RECIPE = flags.DEFINE_string("recipe", None, "Gin file.", required=True)


def _sum(self, inputs, filters, names, name, columns=1):
    parts = [
        self.norm(self.plain_conv(filters, 1, name=f"{one}_conv")(x), f"{one}_bn")
        for x, one in zip(inputs, names, strict=True)
    ]
    return keras.layers.Add(name=name)(parts) if len(parts) > 1 else parts[0]


def _split(self, x, filters, names, name, columns=1):
    return [self.act(_sum(self, [x], filters, [one], one)) for one in names]


def _act(self, x, name=None):
    return keras.layers.Activation(self.activation, name=name)(x)


def _stem(self, image, filters, pairs):
    x = self.conv_bn(image, filters, 7, 2, name="stem")
    return layers.max_pool(x, 3, 2, "stem_pool")


@contextlib.contextmanager
def plain_layers():
    """Within it, networks are built of plain Keras layers."""
    methods = dict(act=_act, pointwise_sum=_sum, pointwise_split=_split, pooled_stem=_stem)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(Style, **methods))
        for module in (layers, pairs):
            stack.enter_context(mock.patch.object(module, "on_tpu", lambda: False))
        stack.enter_context(mock.patch.object(strips, "images_at_once", lambda: 0))
        yield


def main(_: list[str]) -> None:
    report.check_installed()
    program.parse_gin([RECIPE.value], [], None)
    task, data = modes.make_task(), modes.scoped_data("train")
    _, chip, devices = chips.find(TPU.value)
    batch = data.batch_size // devices
    print(f"{RECIPE.value}, {batch} images on each of {devices} devices of {TPU.value}")
    totals = {}
    for name, context in (("as it is", contextlib.nullcontext()), ("plain", plain_layers())):
        with context, tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.hlo"
            hlo = programs.train_step(task, Training(), data, Schedule(), batch)
            path.write_bytes(hlo)
            figures = report.compile_program(chip, path, path.with_suffix(""))
        if "error" in figures:
            print(f"{name:10} does not fit: {figures['error'][:200]}", flush=True)
            continue
        totals[name] = figures["estimated_ms"] + figures["copied_ms"], figures["hbm_gib"]
        print("{:10} {:8.1f} ms {:6.2f} GiB".format(name, *totals[name]), flush=True)
    if len(totals) == 2:
        ratios = (a / b for a, b in zip(totals["as it is"], totals["plain"], strict=True))
        print("{:10} {:8.2f} {:10.2f}".format("ratio", *ratios))


if __name__ == "__main__":
    app.run(main)
