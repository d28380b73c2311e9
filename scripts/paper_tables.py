"""The paper's tables: published parameters and multiply-adds, and those of the models we build.

    python scripts/paper_tables.py [--table=2] [--json]

Builds the model of every row's recipe, so what is counted is what would be trained. Multiply-adds
are those of convolutions and dense layers plus one for every batch-normalised element (see
spinenet_tf/models/count.py); Mask R-CNN's are for 1000 proposals and 100 masks.
"""

import json
from pathlib import Path

import gin
import keras
from absl import app, flags

from spinenet_tf import main as cli
from spinenet_tf import modes
from spinenet_tf.models.count import Counts, count
from spinenet_tf.published import ROWS, Row

CONFIGS = Path(__file__).resolve().parents[1] / "gin_configs"
TABLE = flags.DEFINE_multi_string("table", [], "Only this table; several may be given.")


OURS = (
    "our_parameters", "our_moving_statistics", "our_multiply_adds", "parameters_difference",
    "multiply_adds_difference",
)  # fmt: skip


def count_row(row: Row) -> Counts:
    """What the model of a row's recipe costs."""
    gin.clear_config()
    keras.backend.clear_session()
    cli.parse_gin([str(CONFIGS / f"{row.recipe}.gin")], [], None)
    task = modes.make_task()
    return count(task.build(), task.runs())


def compare(row: Row) -> dict:
    """A row beside our counts; differences relative to the published figures, None without one."""
    if not row.recipe:
        return row._asdict() | dict.fromkeys(OURS)
    counts = count_row(row)
    parameters, multiply_adds = counts.parameters / 1e6, counts.multiply_adds / 1e9
    return row._asdict() | {
        "our_parameters": parameters,
        "our_moving_statistics": counts.moving_statistics / 1e6,
        "our_multiply_adds": multiply_adds,
        "parameters_difference": _relative(parameters, row.parameters),
        "multiply_adds_difference": _relative(multiply_adds, row.multiply_adds),
    }


def _relative(ours: float, published: float | None) -> float | None:
    return None if published is None else ours / published - 1


def line(figures: dict) -> str:
    """One line of the printed table."""
    parts = [f"{figures['table']:>3}  {figures['model']:31}"]
    for name, unit in (("parameters", "M"), ("multiply_adds", "B")):
        published, difference = figures[name], figures[f"{name}_difference"]
        printed = "" if published is None else f"{published:g} {unit}"
        ours = figures[f"our_{name}"]
        parts.append(f"{printed:>9} {'-' if ours is None else format(ours, '.3f'):>9} {unit}")
        parts.append(f"{'' if difference is None else format(difference, '+.2%'):>7}")
    parts.append(f" {figures['result']}" + (f"  ({figures['note']})" if figures["note"] else ""))
    return " ".join(parts)


def main(_: list[str]) -> None:
    rows = [row for row in ROWS if not TABLE.value or row.table in TABLE.value]
    if not rows:
        raise app.UsageError(f"--table={TABLE.value} is none of {sorted({r.table for r in ROWS})}")
    if not flags.FLAGS.json:
        title = "published      ours    diff."
        print(f"{'table model':36} parameters: {title}   multiply-adds: {title}  published result")
    table = []
    for row in rows:
        table.append(compare(row))
        if not flags.FLAGS.json:
            print(line(table[-1]), flush=True)
    if flags.FLAGS.json:
        print(json.dumps(table, indent=1))


if __name__ == "__main__":
    app.run(main)
