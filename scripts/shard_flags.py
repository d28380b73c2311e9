"""What the two converters, make_coco_records.py and make_classification_records.py, share."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from spinenet_tf.data.beam import runner

OUTPUT = flags.DEFINE_string("output", None, "Prefix of the shards.", required=True)
NUM_SHARDS = flags.DEFINE_integer("num_shards", 8, "Number of shards.", lower_bound=1)
WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes; by default as many as cores, and at most one a shard.", 1
)
BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", None, "Convert by an Apache Beam pipeline with these options, such as "
    "'--runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp'."
)  # fmt: skip
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace shards made from other inputs.")
STRICT = flags.DEFINE_bool("strict", False, "Exit with status 1 if anything was rejected.")

REASONS_SHOWN = 20


def run(convert: Callable, about: Callable, where: Callable, **settings) -> Any:
    """Converts, and prints what was made and what was rejected, as the flags say.

    Returns the summary.

    Args:
      convert: `coco.convert` or `classes.convert`; takes `settings`.
      about: its summary -> lines to print. where: a rejection -> what it is of.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the worker processes' start-up lines
    start = time.monotonic()
    try:
        summary = convert(
            **settings, num_shards=NUM_SHARDS.value, overwrite=OVERWRITE.value,
            run=runner(BEAM_OPTIONS.value, WORKERS.value),
        )  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    seconds = time.monotonic() - start
    print("\n".join(about(summary)))
    rate = f"{summary.num_examples / seconds:.1f} images/s"
    print(f"{len(summary.shards)} shards {OUTPUT.value}-*.tfrecord in {seconds:.1f} s ({rate})")
    print(f"{len(summary.rejected)} rejected; the whole list is in {OUTPUT.value}.json")
    for entry in summary.rejected[:REASONS_SHOWN]:
        print(f"  {where(entry)}: {entry['field']} {entry['value']}: {entry['reason']}")
    if STRICT.value and summary.rejected:
        sys.exit(1)
    if not summary.num_examples:
        sys.exit("error: not one image could be converted; the reasons are above")
    return summary
