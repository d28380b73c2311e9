"""How fast the input is, and what memory it takes: ours, the JPEG decoder, Model Garden's.

    python scripts/benchmark_input.py --pattern='records/train-*.tfrecord' [--json]

Measures, on the same shards, in processes of their own that run in turn:

    raw             tf.data + decode_jpeg of whole images, nothing else: the limit
    raw_batches     the same, padded to 640 px and batched
    ours            training input with boxes, for any network size: the device does the rest
    ours_masks      the same with masks
    ours_skipping   `ours` with Data.bad_records > 0
    host_640 ...    Data.augment='host': views of 640 or 1280 px
    garden_640 ...  Model Garden's RetinaNet input of 640 or 1280 px, augmentation 0.5-2.0, bfloat16
    garden_masks_640 ...  its Mask R-CNN input
    raw_classes     decode_jpeg of whole images of classification shards (--class_pattern)
    classes         training input of 224 px from the same

Each round drops what was read ahead and times --images images (a quarter of them where they take
long); figures are medians of --rounds. Memory is a process' peak, of which TensorFlow and what else
is imported and built before the first image takes most; the last column is the rest: what reading
takes. Kinds that need what is not there (Model Garden, --class_pattern) are left out and named.
"""

import importlib.util
import itertools
import json
import os
import resource
import statistics
import sys
import time

import in_turn
from absl import app, flags

PATTERN = flags.DEFINE_string(
    "pattern", None, "Glob of detection shards with masks.", required=True
)
CLASS_PATTERN = flags.DEFINE_string(
    "class_pattern", None, "Glob of classification shards, or tfds:"
)
KINDS = flags.DEFINE_list("kinds", [], "Which to measure; by default all.")
IMAGES = flags.DEFINE_integer("images", 400, "Images of a timing.", lower_bound=8)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each kind.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 8, "Images of a batch.", lower_bound=1)
SHUFFLE = flags.DEFINE_integer("shuffle", 512, "Records in the shuffle buffers.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
CHILD = flags.DEFINE_string("child", None, "Internal: the kind that this process measures.")

SCALE = (0.5, 2.0)
SLOW = 4  # times fewer images are timed of the kinds that are many times slower


def _data(**kwargs):
    from spinenet_tf.data.pipeline import Data

    settings = dict(pattern=PATTERN.value, batch_size=BATCH.value, shuffle=SHUFFLE.value)
    return Data(**settings | kwargs)


def _raw(pattern: str, batches: bool):
    import tensorflow as tf

    def decode(record):
        feature = {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
        encoded = tf.io.parse_single_example(record, feature)["image/encoded"]
        image = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
        if not batches:
            return image
        height, width = tf.unstack(tf.shape(image)[:2])
        return tf.pad(image, [[0, 640 - height], [0, 640 - width], [0, 0]])

    files = tf.data.Dataset.from_tensor_slices(sorted(tf.io.gfile.glob(pattern))).repeat()
    stream = files.interleave(
        tf.data.TFRecordDataset, cycle_length=16, num_parallel_calls=tf.data.AUTOTUNE
    )
    stream = stream.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    if batches:
        stream = stream.batch(BATCH.value, drop_remainder=True)
    return stream.prefetch(tf.data.AUTOTUNE)


def _ours(labels: str = "boxes", **kwargs):
    from spinenet_tf.data.pipeline import train_batches

    return train_batches(_data(**kwargs), labels=labels, num_classes=91)


def _host(size: int):
    from spinenet_tf.data.pipeline import train_batches
    from spinenet_tf.ops.augment import Augmentation

    view = Augmentation(size, SCALE, True)
    return train_batches(_data(augment="host"), num_classes=91, augmentation=view)


def _classes():
    from spinenet_tf.data.pipeline import train_batches

    return train_batches(_data(pattern=CLASS_PATTERN.value, canvas=224), labels="class")


def _garden(size: int, masks: bool):
    if masks:
        from official.vision.configs import maskrcnn as configs
        from official.vision.tasks.maskrcnn import MaskRCNNTask as Task

        model, task = configs.MaskRCNN(input_size=[size, size, 3]), configs.MaskRCNNTask
    else:
        from official.vision.configs import retinanet as configs
        from official.vision.tasks.retinanet import RetinaNetTask as Task

        model, task = configs.RetinaNet(input_size=[size, size, 3]), configs.RetinaNetTask
    parser = configs.Parser(aug_rand_hflip=True, aug_scale_min=SCALE[0], aug_scale_max=SCALE[1])
    data = configs.DataConfig(
        input_path=PATTERN.value, is_training=True, global_batch_size=BATCH.value,
        dtype="bfloat16", parser=parser, shuffle_buffer_size=SHUFFLE.value,
    )  # fmt: skip
    return Task(task(model=model)).build_inputs(data)


MAKERS = {
    "raw": lambda: _raw(PATTERN.value, False),
    "raw_batches": lambda: _raw(PATTERN.value, True),
    "ours": _ours,
    "ours_masks": lambda: _ours("masks"),
    "ours_skipping": lambda: _ours(bad_records=1),
    "host_640": lambda: _host(640),
    "host_1280": lambda: _host(1280),
    "garden_640": lambda: _garden(640, False),
    "garden_1280": lambda: _garden(1280, False),
    "garden_masks_640": lambda: _garden(640, True),
    "garden_masks_1280": lambda: _garden(1280, True),
    "raw_classes": lambda: _raw(CLASS_PATTERN.value, False),
    "classes": _classes,
}


def _child(kind: str) -> None:
    """Times one round for every line on stdin; answers with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    stream = MAKERS[kind]()
    before = _resident_mib()
    size = 1 if kind in ("raw", "raw_classes") else BATCH.value
    images = IMAGES.value // (SLOW if kind.startswith(("garden", "host")) else 1)
    iterator = iter(stream)
    for _ in sys.stdin:
        for _ in itertools.islice(iterator, -(-images // 4 // size)):  # what was read ahead
            pass
        start, cpu = time.monotonic(), time.process_time()
        for _ in itertools.islice(iterator, -(-images // size)):
            pass
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        done = -(-images // size) * size
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        answer = {"images_per_second": done / seconds, "cpu_ms": 1e3 * cpu / done}
        answer |= {"peak_mib": peak, "reading_mib": peak - before}
        print(json.dumps(answer), file=answers, flush=True)


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def _wanted() -> list[str]:
    kinds = KINDS.value or list(MAKERS)
    if unknown := set(kinds) - set(MAKERS):
        sys.exit(f"error: --kinds={','.join(sorted(unknown))}: there are {list(MAKERS)}")
    missing = [] if CLASS_PATTERN.value else ["classes"]
    if not importlib.util.find_spec("official"):
        missing.append("garden")
    left_out = [kind for kind in kinds if any(part in kind for part in missing)]
    if left_out:
        print(f"left out, as what they need is not here: {left_out}", file=sys.stderr)
    return [kind for kind in kinds if kind not in left_out]


def _measure(kinds: list[str]) -> dict[str, dict]:
    """Medians of all rounds; memory is that at the end."""
    given = [PATTERN, CLASS_PATTERN, IMAGES, BATCH, SHUFFLE]
    children = {kind: in_turn.start(__file__, kind, given) for kind in kinds}
    answers = {kind: [] for kind in kinds}
    for number in range(ROUNDS.value + 1):  # the first traces and fills caches
        for kind, child in children.items():
            answer = json.loads(in_turn.ask(child))
            answers[kind] += [answer] if number else []
        print(f"round {number} of {ROUNDS.value}", file=sys.stderr, flush=True)
    for child in children.values():
        child.kill()
    medians = ("images_per_second", "cpu_ms")
    return {
        kind: {name: statistics.median(a[name] for a in rounds) for name in medians}
        | {name: rounds[-1][name] for name in ("peak_mib", "reading_mib")}
        for kind, rounds in answers.items()
    }


def _table(figures: dict[str, dict]) -> str:
    lines = [
        f"{'kind':18} {'images/s':>9} {'of raw':>7} {'CPU ms':>7} {'peak MiB':>9} {'reading':>8}"
    ]
    for kind, row in figures.items():
        raw = figures.get("raw_classes" if "classes" in kind else "raw")
        share = f"{row['images_per_second'] / raw['images_per_second']:.2f}" if raw else ""
        lines.append(
            f"{kind:18} {row['images_per_second']:9.1f} {share:>7} {row['cpu_ms']:7.2f} "
            f"{row['peak_mib']:9.0f} {row['reading_mib']:8.0f}"
        )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    if CHILD.value:
        return _child(CHILD.value)
    figures = _measure(_wanted())
    print(json.dumps(figures) if JSON.value else _table(figures))


if __name__ == "__main__":
    app.run(main)
