"""Ours and Model Garden's detectors side by side: on this CPU, or compiled for a TPU.

    python scripts/compare_model_garden.py --size=49S --image_size=256 --batch=4      # times here
    python scripts/compare_model_garden.py --tpu_type=v3 --batch=8                    # estimates
    python scripts/compare_model_garden.py --tpu_type=v3 --network=mask_rcnn --programs=train

Here: training steps and predictions of both, in processes that run in turn, medians of --rounds;
and seconds from the start of a process to the end of its first training step. For a TPU: the
compiler's estimates (no run times) of a replica's training step, prediction with NMS and, of
RetinaNet, forward pass. Our step starts from uint8 images and boxes; Model Garden's from images and
targets that its input has made on the host. The programs are in garden_programs.py.
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
from garden_programs import MAKERS, Case

NETWORK = flags.DEFINE_enum("network", "retinanet", ["retinanet", "mask_rcnn"], "Which detector.")
SIZE = flags.DEFINE_enum("size", "49", ["49S", "49", "96", "143", "190"], "SpineNet.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 640, "Side of the network's input.")
BATCH = flags.DEFINE_integer("batch", 8, "Images of a step.", lower_bound=1)
PRECISION = flags.DEFINE_enum(
    "precision", None, ["mixed_bfloat16", "float32"],
    "Of both. Default: mixed_bfloat16 for a TPU; float32 here, as not all CPUs know bfloat16.",
)  # fmt: skip
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each.", lower_bound=1)
TPU = flags.DEFINE_string("tpu_type", None, "Compile for this TPU instead of running here.")
PROGRAMS = flags.DEFINE_list("programs", ["train", "predict"], "For a TPU: which; also forward.")
FOLDER = flags.DEFINE_string("folder", None, "For a TPU: where to keep the programs.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
CHILD = flags.DEFINE_enum("child", None, ["ours", "garden"], "Internal: whose process this is.")

GIVEN = [NETWORK, SIZE, IMAGE_SIZE, BATCH, TPU, PRECISION]  # to the children


def _precision() -> str:
    return PRECISION.value or ("mixed_bfloat16" if TPU.value else "float32")


def _child(whose: str) -> None:
    """Runs the program that a line on stdin names, once; answers with its seconds.

    Or, for a TPU, writes the program to the file that the line names besides.
    """
    from spinenet_tf.models.device import for_tpu

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    with for_tpu(BATCH.value) if TPU.value else contextlib.nullcontext():
        case = Case(NETWORK.value, SIZE.value, IMAGE_SIZE.value, BATCH.value, _precision())
        _answer(MAKERS[whose](case, not TPU.value), answers)


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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(FOLDER.value or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for whose in MAKERS:
            child = in_turn.start(__file__, whose, GIVEN)
            paths = {program: folder / f"{whose}_{program}" for program in PROGRAMS.value}
            for program, path in paths.items():
                in_turn.ask(child, f"{program} {path}.hlo")
            child.kill()  # a compilation needs its memory
            for program, path in paths.items():
                one = report.compile_program(chip, path.with_suffix(".hlo"), path)
                figures[whose][program] = report.rounded(one)
                print(f"{whose} {program}: compiled", file=sys.stderr, flush=True)
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
    priced = [v["copied_ms"] for v in (ours, garden)]  # in the times
    return (
        f"{program:8} {times[0]:8.1f} {times[1]:8.1f} {times[0] / times[1]:6.2f}   "
        f"{memory[0]:6.2f} {memory[1]:6.2f} {memory[0] / memory[1]:6.2f}   {once[0]:4} {once[1]:4}"
        f"   {priced[0]:6.1f} {priced[1]:6.1f}"
    )


def main(_: list[str]) -> None:
    if CHILD.value:
        return _child(CHILD.value)
    figures = estimate() if TPU.value else measure_here()
    if JSON.value:
        return print(json.dumps(figures))
    title = f"{NETWORK.value} SpineNet-{SIZE.value}, {IMAGE_SIZE.value} px, batch {BATCH.value}, "
    title += _precision()
    if TPU.value:
        print(f"{title}, a device of {TPU.value}: estimates of the compiler, no run times")
        print("            ours   garden  ratio     ours garden  ratio   loops once   priced, ms")
        print("              ms       ms              GiB    GiB         ours garden ours garden")
        for program in PROGRAMS.value:
            print(_row(program, *(figures[whose][program] for whose in MAKERS)))
        return None
    print(f"{title}, here: milliseconds, and seconds from start to first step")
    for name, unit in (("train", 1e3), ("predict", 1e3), ("start", 1)):
        mine, theirs = (figures[whose][name] * unit for whose in MAKERS)
        print(f"{name:8} ours {mine:8.1f}   Model Garden {theirs:8.1f}   {mine / theirs:.2f}")


if __name__ == "__main__":
    app.run(main)
