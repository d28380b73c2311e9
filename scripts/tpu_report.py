"""Compiles recipes for TPUs and writes docs/tpu_report.md: what fits on which slice, at what cost.

    python scripts/tpu_report.py --recipes='table2/*' --tpus=v3,v5e

Of a chip's slices, the smallest is taken on which the recipe's batch fits, from --most images a
device down. A compilation takes 5 minutes to an hour on 2 cores; what is in docs/tpu_report.jsonl
is not done again, so the report grows with every call. Delete its lines to have them made anew.
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
RECIPES = flags.DEFINE_list("recipes", ["table*/*"], "Globs of recipes within gin_configs.")
TPUS = flags.DEFINE_list("tpus", ["v3", "v4", "v5e", "v6e"], "Chips.")
MOST = flags.DEFINE_integer("most", 8, "Images a device to begin with; 16 times that of classes.")
REPORT = flags.DEFINE_string("report", str(ROOT / "docs/tpu_report"), "Path without ending.")

HEAD = """# Recipes compiled for TPUs

libtpu 0.0.52's estimates for one replica, whose sums with others are not in them.
They are no run times. "limit" is what the multiply-adds take at the chip's peak. Only what is in
the table was compiled. `scripts/tpu_report.py` adds to it.

| recipe | slice | images a device | program | fits | HBM, GiB | ms | limit, ms | compiled |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def slices(recipe: str, tpu: str) -> list[str]:
    """Names of the slices to try, the smallest first."""
    import gin

    from spinenet_tf import main, modes
    from spinenet_tf.tpu import chips

    main.parse_gin([str(ROOT / f"gin_configs/{recipe}.gin")], [], None)
    batch, chip = modes.scoped_data("train").batch_size, chips.CHIPS[tpu]
    most = MOST.value * (16 if modes.make_task().network == "Classifier" else 1)
    gin.clear_config()
    fitting = [n for n in chip.devices if batch % n == 0 and 1 <= batch // n <= most]
    return [f"{tpu}-{n * chip.counted}" for n in fitting]


def compiled(recipe: str, tpu_type: str) -> list[dict]:
    """The figures of a recipe's programs; a process of its own, since TensorFlow keeps memory."""
    argv = [sys.executable, "-m", "spinenet_tf.main", "--mode=tpu_compile", "--json"]
    argv += [f"--tpu_type={tpu_type}", f"--gin_file={ROOT}/gin_configs/{recipe}.gin"]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {recipe} on {tpu_type}: {done.stderr[-1000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    about = {"recipe": recipe, "slice": tpu_type, "date": str(datetime.date.today())}
    return [about | {k: v for k, v in row.items() if k != "layers"} for row in rows]


def row_of(figures: dict) -> str:
    """A line of the table."""
    head = "| {recipe} | {slice} | {batch} | {program} |".format(**figures)
    if "error" in figures:
        return f"{head} no |  |  |  | {figures['date']} |"
    total = figures["estimated_ms"] + figures["copied_ms"]
    return (
        f"{head} {'yes' if figures['fits'] else 'no'} | {figures['hbm_gib']:.2f} | {total:.1f} | "
        f"{figures['limit_ms']:.1f} | {figures['date']} |"
    )


def main(_: list[str]) -> None:
    path = Path(REPORT.value).with_suffix(".jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = (p for glob in RECIPES.value for p in (ROOT / "gin_configs").glob(f"{glob}.gin"))
    recipes = sorted({str(p.relative_to(ROOT / "gin_configs").with_suffix("")) for p in found})
    if not recipes:
        sys.exit(f"error: --recipes={RECIPES.value} match nothing in gin_configs")
    for recipe in recipes:
        for tpu in TPUS.value:
            for tpu_type in slices(recipe, tpu):
                known = [r for r in rows if (r["recipe"], r["slice"]) == (recipe, tpu_type)]
                new = known or compiled(recipe, tpu_type)
                if not known:
                    rows += new
                    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                    print("\n".join(map(row_of, new)), flush=True)
                if all(row["fits"] for row in new):
                    break
    rows.sort(key=lambda row: (row["recipe"], row["slice"], row["program"]))
    path.with_suffix(".md").write_text(HEAD + "".join(f"{row_of(row)}\n" for row in rows))


if __name__ == "__main__":
    app.run(main)
