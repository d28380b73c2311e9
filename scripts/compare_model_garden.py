"""Ours and Model Garden's RetinaNet side by side: on this CPU, or compiled for a TPU.

    python scripts/compare_model_garden.py --size=49S --image_size=256 --batch=4      # times here
    python scripts/compare_model_garden.py --tpu_type=v3 --batch=8                    # estimates

Here: training steps and predictions of both, in processes that run in turn, medians of --rounds;
and seconds from the start of a process to the end of its first training step. For a TPU: the
compiler's estimates (no run times) of a replica's training step, prediction with NMS and forward
pass. Our step starts from uint8 images and boxes; Model Garden's from images and
targets that its input has made on the host. Swish, synchronized batch norm, one replica.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import in_turn
from absl import app, flags

SIZE = flags.DEFINE_enum("size", "49", ["49S", "49", "96", "143", "190"], "SpineNet.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 640, "Side of the network's input.")
BATCH = flags.DEFINE_integer("batch", 8, "Images of a step.", lower_bound=1)
PRECISION = flags.DEFINE_enum(
    "precision", "mixed_bfloat16", ["mixed_bfloat16", "float32"], "Of both."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each.", lower_bound=1)
TPU = flags.DEFINE_string("tpu_type", None, "Compile for this TPU instead of running here.")
PROGRAMS = flags.DEFINE_list("programs", ["train", "predict", "forward"], "For a TPU: which.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
CHILD = flags.DEFINE_enum("child", None, ["ours", "garden"], "Internal: whose process this is.")

GIVEN = [SIZE, IMAGE_SIZE, BATCH, TPU, PRECISION]  # to the children
OBJECTS = 8  # in an image
WIDTHS = {"49S": 128, "49": 256, "96": 256, "143": 256, "190": 512}  # of the subnets
CONVS = {"49S": 4, "49": 4, "96": 4, "143": 5, "190": 7}


def ours() -> dict:
    """{program: (function, example arguments)} of this package."""
    import keras
    import numpy as np
    import tensorflow as tf

    from spinenet_tf import RetinaNet
    from spinenet_tf.data.pipeline import Data, batch_spec
    from spinenet_tf.tasks import detection
    from spinenet_tf.train.trainer import Run, Training

    size, batch = IMAGE_SIZE.value, BATCH.value

    class Task(detection.Detection):
        def build(self):
            return RetinaNet(
                SIZE.value,
                input_shape=(size, size, 3),
                activation="swish",
                synchronized=True,
                endpoints=128 if SIZE.value == "49S" else None,  # Model Garden's; released: 256
            )

    run = Run(Task(image_size=size), Training(precision=PRECISION.value), "")
    spec = batch_spec(Data(canvas=size), batch, "boxes")
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, size / 2, (batch, OBJECTS, 2))
    example = {k: np.zeros(v.shape, v.dtype.as_numpy_dtype) for k, v in spec.items()}
    example["image"] = rng.integers(0, 256, example["image"].shape, np.uint8)
    example["boxes"][:, :OBJECTS] = np.concatenate([corner, corner + size / 4], -1)
    example["classes"][:, :OBJECTS] = rng.integers(1, 91, (batch, OBJECTS))
    example["image_size"][:], example["source_size"][:] = size, size
    names = sorted(spec)

    def step(*columns):
        return run.replica_step(dict(zip(names, columns, strict=True)), tf.constant(0.01), 1000)

    def predict(*columns):
        batch = dict(zip(names, columns, strict=True))
        return run.task.predict(run.model, batch, native=not TPU.value)

    columns = [tf.constant(example[name]) for name in names]
    images = tf.zeros([batch, size, size, 3])
    assert keras.backend.backend() == "tensorflow"
    return {
        "train": (step, columns),
        "predict": (predict, columns),
        "forward": (lambda x: run.model(x, training=False), [images]),
    }


def _garden_labels(batch: int, size: int) -> dict:
    """What Model Garden's RetinaNet input makes besides images, without an object."""
    import numpy as np
    import tensorflow as tf

    sides = {str(level): -(-size // 2**level) for level in range(3, 8)}
    anchors = sum(9 * side**2 for side in sides.values())
    rng = np.random.default_rng(0)

    def maps(values, dtype):
        return {k: tf.zeros([batch, n, n, 9 * values], dtype) for k, n in sides.items()}

    return {
        "cls_targets": maps(1, tf.int32),
        "box_targets": maps(4, tf.float32),
        "anchor_boxes": {
            k: tf.constant(rng.uniform(0, size, [batch, n, n, 36]), tf.float32)
            for k, n in sides.items()
        },
        "cls_weights": tf.ones([batch, anchors]),
        "box_weights": tf.ones([batch, anchors]),
        "image_info": tf.tile(tf.constant([[[size] * 2, [size] * 2, [1, 1], [0, 0]]], tf.float32),
                              [batch, 1, 1]),
    }  # fmt: skip


def garden() -> dict:
    """The same of Model Garden: its task, its optimizer, its `train_step`."""
    import tensorflow as tf
    import tf_keras
    from official.core import exp_factory
    from official.vision.configs import retinanet as configs  # noqa: F401 - registers them
    from official.vision.tasks.retinanet import RetinaNetTask

    size, batch = IMAGE_SIZE.value, BATCH.value
    tf_keras.mixed_precision.set_global_policy(PRECISION.value)
    config = exp_factory.get_exp_config("retinanet_spinenet_coco")
    model = config.task.model
    model.input_size, model.num_classes = [size, size, 3], 91
    model.backbone.spinenet.model_id = SIZE.value
    model.head.num_filters, model.head.num_convs = WIDTHS[SIZE.value], CONVS[SIZE.value]
    model.norm_activation.activation, model.norm_activation.use_sync_bn = "swish", True
    task = RetinaNetTask(config.task)
    model = task.build_model()
    optimizer = task.create_optimizer(config.trainer.optimizer_config)
    images = tf.random.stateless_normal([batch, size, size, 3], [0, 0])
    images = tf.cast(images, tf.bfloat16) if "bfloat16" in PRECISION.value else images
    labels = _garden_labels(batch, size)
    flat = tf.nest.flatten(labels)

    def step(images, *labels_):
        packed = tf.nest.pack_sequence_as(labels, labels_)
        return task.train_step((images, packed), model, optimizer, metrics=[])["loss"]

    def predict(images, *labels_):
        packed = tf.nest.pack_sequence_as(labels, labels_)
        return model(
            images,
            anchor_boxes=packed["anchor_boxes"],
            image_shape=packed["image_info"][:, 1],
            training=False,
        )

    def forward(images):
        features = model.backbone(images, training=False)
        return model.head(features, training=False)

    return {
        "train": (step, [images, *flat]),
        "predict": (predict, [images, *flat]),
        "forward": (forward, [images]),
    }


MAKERS = {"ours": ours, "garden": garden}


def _child(whose: str) -> None:
    """Runs the program that a line on stdin names, once; answers with its seconds.

    Or, for a TPU, writes the program to the file that the line names besides.
    """
    from spinenet_tf.models.pairs import for_tpu

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    with for_tpu() if TPU.value else contextlib.nullcontext():
        _answer(MAKERS[whose](), answers)


def _answer(programs: dict, answers) -> None:
    import tensorflow as tf

    compiled = {
        name: (tf.function(function, autograph=False, jit_compile=bool(TPU.value)), arguments)
        for name, (function, arguments) in programs.items()
    }
    for line in sys.stdin:
        name, *path = line.split()
        function, arguments = compiled[name]
        start = time.monotonic()
        if path:
            specs = [tf.TensorSpec(v.shape, v.dtype) for v in arguments]
            module = function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")
            Path(path[0]).write_bytes(module)
        else:
            tf.nest.map_structure(lambda v: v.numpy(), function(*arguments))
        print(time.monotonic() - start, file=answers, flush=True)


def measure_here() -> dict:
    """{whose: {'start', 'train', 'predict': seconds}}."""
    seconds = {whose: {"start": [], "train": [], "predict": []} for whose in MAKERS}
    for _ in range(min(ROUNDS.value, 3)):
        children = {}
        for whose in MAKERS:
            start = time.monotonic()
            children[whose] = in_turn.start(__file__, whose, GIVEN)
            in_turn.ask(children[whose], "train")
            seconds[whose]["start"].append(time.monotonic() - start)
        last = children
        if len(seconds["ours"]["start"]) < min(ROUNDS.value, 3):
            for child in children.values():
                child.kill()
    for number in range(ROUNDS.value + 1):
        for program in ("train", "predict"):
            for whose, child in last.items():
                taken = float(in_turn.ask(child, program))
                if number:  # the first traces
                    seconds[whose][program].append(taken)
    for child in last.values():
        child.kill()
    return {
        whose: {name: statistics.median(v) for name, v in rows.items()}
        for whose, rows in seconds.items()
    }


def estimate() -> dict:
    """{whose: {program: the figures of `tpu.report`}}."""
    from spinenet_tf.tpu import chips, report

    report.check_installed()
    _, chip, _ = chips.find(TPU.value)
    figures = {whose: {} for whose in MAKERS}
    with tempfile.TemporaryDirectory() as folder:
        for whose in MAKERS:
            child = in_turn.start(__file__, whose, GIVEN)
            for program in PROGRAMS.value:
                path = Path(folder) / f"{whose}_{program}"
                in_turn.ask(child, f"{program} {path}.hlo")
                hlo = path.with_suffix(".hlo").read_bytes()
                figures[whose][program] = report.rounded(report.compile_program(hlo, chip, path))
                print(f"{whose} {program}: compiled", file=sys.stderr, flush=True)
            child.kill()
    return figures


def _row(program: str, ours: dict, garden: dict) -> str:
    if "error" in ours or "error" in garden:
        errors = [
            f"{name}: {v['error'][:100]}"
            for name, v in (("ours", ours), ("Model Garden", garden))
            if "error" in v
        ]
        return f"{program:8} does not fit: {errors}"
    times = [v["estimated_ms"] + v["copied_ms"] for v in (ours, garden)]
    memory = [v["hbm_gib"] for v in (ours, garden)]
    once = [v["unbounded_loops"] for v in (ours, garden)]
    return (
        f"{program:8} {times[0]:8.1f} {times[1]:8.1f} {times[0] / times[1]:6.2f}   "
        f"{memory[0]:6.2f} {memory[1]:6.2f} {memory[0] / memory[1]:6.2f}   {once[0]:4} {once[1]:4}"
    )


def main(_: list[str]) -> None:
    if CHILD.value:
        return _child(CHILD.value)
    figures = estimate() if TPU.value else measure_here()
    if JSON.value:
        return print(json.dumps(figures))
    title = f"RetinaNet SpineNet-{SIZE.value}, {IMAGE_SIZE.value} px, batch {BATCH.value}, "
    title += PRECISION.value
    if TPU.value:
        print(f"{title}, a device of {TPU.value}: estimates of the compiler, no run times")
        print("            ours   garden  ratio     ours garden  ratio   loops counted once")
        print("              ms       ms              GiB    GiB          ours garden")
        for program in PROGRAMS.value:
            print(_row(program, *(figures[whose][program] for whose in MAKERS)))
        return None
    print(f"{title}, here: milliseconds, and seconds from start to first step")
    for name, unit in (("train", 1e3), ("predict", 1e3), ("start", 1)):
        mine, theirs = (figures[whose][name] * unit for whose in MAKERS)
        print(f"{name:8} ours {mine:8.1f}   Model Garden {theirs:8.1f}   {mine / theirs:.2f}")


if __name__ == "__main__":
    app.run(main)
