"""Compiles recipes for TPUs and writes docs/tpu_report.md: what fits on which slice, at what cost.

    python scripts/tpu_report.py --recipes='table2/*' --tpus=v3,v5e

Of a chip's slices, the smallest is taken on which the recipe's batch fits, from --most images a
device down (fewer where they are larger than 640 px). A compilation takes 5 minutes to an hour on 2
cores; with --plans, which ends where the compiler has assigned memory, one to twenty. What is in
docs/tpu_report.jsonl is not done again, so the report grows with every call, and a compiled program
takes the place of its plan. Delete its lines to have them made anew.
"""

import datetime
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

PROGRAMS = ("train", "predict")
ROOT = Path(__file__).resolve().parents[1]
RECIPES = flags.DEFINE_list(
    "recipes", ["table*/*", "section*/*"], "Globs of recipes within gin_configs."
)
TPUS = flags.DEFINE_list("tpus", ["v3", "v4", "v5e", "v6e"], "Chips.")
MOST = flags.DEFINE_integer(
    "most", 8, "Images of 640 px a device to begin with; 16 times that of classes."
)
PLANS = flags.DEFINE_bool("plans", False, "What fits, without machine code and times.")
REPORT = flags.DEFINE_string("report", str(ROOT / "docs/tpu_report"), "Path without ending.")

HEAD = """# Recipes compiled for TPUs

libtpu 0.0.52's estimates for one replica, whose sums with others are not in them.
They are no run times; ">=": loops whose length the program does not tell (those of non-maximum
suppression) are counted once. "limit" is what the multiply-adds take at the chip's peak. Only what
is in the table was compiled. `scripts/tpu_report.py` adds to it. A row without
times is a plan: the compiler optimised the program and assigned its memory, but wrote no machine
code. The code's memory, 0.35 GiB at most in the other rows, is not in the figure; of the device's,
1 GiB is left for it. v6e's programs do without its SparseCores, whose parts could not be read.

| recipe | slice | images a device | program | fits | HBM, GiB | ms | limit, ms | compiled |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def slices(recipe: str) -> dict[str, list[str]]:
    """Of each chip the names of the slices to try, the smallest first."""
    import gin

    from spinenet_tf import main, modes
    from spinenet_tf.tpu import chips

    main.parse_gin([str(ROOT / f"gin_configs/{recipe}.gin")], [], None)
    batch = modes.scoped_data("train").batch_size
    task = modes.make_task()
    halvings = max(0, round(2 * math.log2(task.image_size / 640)))  # of the images: by their area
    most = MOST.value * 16 if task.network == "Classifier" else MOST.value // 2**halvings
    gin.clear_config()
    return {
        tpu: [
            f"{tpu}-{n * chips.CHIPS[tpu].counted}"
            for n in chips.CHIPS[tpu].devices
            if batch % n == 0 and 1 <= batch // n <= most
        ]
        for tpu in TPUS.value
    }


def compiled(recipe: str, tpu_types: list[str]) -> Iterator[dict]:
    """Yields the figures of a recipe's programs as they are known.

    In a process of its own, since TensorFlow keeps memory.
    """
    argv = [sys.executable, "-m", "spinenet_tf.main", "--mode=tpu_compile", "--json"]
    argv += [f"--tpu_type={','.join(tpu_types)}", f"--gin_file={ROOT}/gin_configs/{recipe}.gin"]
    about = {"recipe": recipe, "date": str(datetime.date.today())}
    names = (name for name in tpu_types for _ in PROGRAMS)
    with tempfile.TemporaryFile("w+") as said:
        command = [*argv, *["--plan"] * PLANS.value]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            for line in filter(lambda line: line.startswith("{"), process.stdout):
                row = {k: v for k, v in json.loads(line).items() if k != "layers"}
                yield about | {"slice": next(names)} | row
        except BaseException:
            process.kill()
            raise
        if process.wait() or next(names, None):
            said.seek(0)
            sys.exit(f"error: {recipe} on {tpu_types}: {said.read()[-1000:]}")


def add(rows: dict, recipe: str) -> Iterator[dict]:
    """Adds to `rows`, by `key`, what is not in it: of each chip, slices until one fits.

    Yields each row that it compiled.
    """
    left = slices(recipe)
    while left := {tpu: names for tpu, names in left.items() if names}:
        tried = [names[0] for names in left.values()]
        if missing := [name for name in tried if not known(rows, recipe, name)]:
            for row in compiled(recipe, missing):
                if not is_plan(row) or is_plan(rows.get(key(row), row)):
                    rows[key(row)] = row
                yield row
        left = {
            tpu: names[1:]
            for tpu, names in left.items()
            if not all(rows[recipe, names[0], program]["fits"] for program in PROGRAMS)
        }


def known(rows: dict, recipe: str, name: str) -> bool:
    """Whether a slice's programs are in `rows`, compiled to their ends if that is asked for."""
    of_slice = [rows.get((recipe, name, program)) for program in PROGRAMS]
    return all(row and (PLANS.value or not is_plan(row)) for row in of_slice)


def key(row: dict) -> tuple[str, str, str]:
    """What a row is about."""
    return row["recipe"], row["slice"], row["program"]


def is_plan(row: dict) -> bool:
    """Whether the program was not compiled to its end, though it fits."""
    return "error" not in row and "memory" not in row


def row_of(figures: dict) -> str:
    """A line of the table."""
    head = "| {recipe} | {slice} | {batch} | {program} |".format(**figures)
    if "error" in figures:
        return f"{head} no |  |  |  | {figures['date']} |"
    head += f" {'yes' if figures['fits'] else 'no'} | {figures['hbm_gib']:.2f} |"
    total = "" if is_plan(figures) else f"{figures['estimated_ms'] + figures['copied_ms']:.1f}"
    total = f">= {total}" if figures.get("unbounded_loops") else total
    return f"{head} {total} | {figures['limit_ms']:.1f} | {figures['date']} |"


def main(_: list[str]) -> None:
    path = Path(REPORT.value).with_suffix(".jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {key(row): row for row in map(json.loads, lines)}
    found = (p for glob in RECIPES.value for p in (ROOT / "gin_configs").glob(f"{glob}.gin"))
    recipes = sorted({str(p.relative_to(ROOT / "gin_configs").with_suffix("")) for p in found})
    if not recipes:
        sys.exit(f"error: --recipes={RECIPES.value} match nothing in gin_configs")
    for recipe in recipes:
        for row in add(rows, recipe):
            print(row_of(row), flush=True)
            path.write_text("".join(json.dumps(one) + "\n" for _, one in sorted(rows.items())))
    table = "".join(f"{row_of(row)}\n" for _, row in sorted(rows.items()))
    path.with_suffix(".md").write_text(HEAD + table)


if __name__ == "__main__":
    app.run(main)
