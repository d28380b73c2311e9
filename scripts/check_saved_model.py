"""Runs all three signatures of an exported SavedModel and compares them with predict's results.

    python scripts/check_saved_model.py --saved_model=DIR --images='photos/*.jpg' \\
        --results=results.json

Exits with 1 if any box, score or class differs by more than rounding. A classifier's scores are
compared class by class: rounding may change the order of two whose scores are nearly one.
"""

import json
import os
import sys
from collections import defaultdict

import numpy as np
import tensorflow as tf
from absl import app, flags

from spinenet_tf.data.pipeline import decode_image
from spinenet_tf.data.records import encode_example
from spinenet_tf.export.predict import expand

SAVED_MODEL = flags.DEFINE_string("saved_model", None, "Folder of the SavedModel.", required=True)
IMAGES = flags.DEFINE_multi_string("images", None, "Image files or globs.", required=True)
RESULTS = flags.DEFINE_string("results", None, "results.json of predict.", required=True)

TOLERANCE = 0.01  # pixels, or of the score; batched and single images round differently


def detections(outputs: dict, i: int) -> np.ndarray:
    """Row i of a signature's outputs as [n, 5]: xywh and score; a classifier's as [n, 2]."""
    if "classes" in outputs:
        return np.stack([outputs["classes"][i], outputs["scores"][i]], 1).astype(float)
    count = int(outputs["num_detections"][i])
    y0, x0, y1, x1 = np.asarray(outputs["detection_boxes"][i][:count]).T
    return np.stack([x0, y0, x1 - x0, y1 - y0, outputs["detection_scores"][i][:count]], 1)


def expected(path: str) -> dict[str, np.ndarray]:
    """{file name: [n, 5]}, or [n, 2] of a classifier, of predict's results."""
    rows = defaultdict(list)
    with tf.io.gfile.GFile(path) as file:
        for result in json.load(file):
            if "bbox" in result:
                rows[result["file_name"]].append([*result["bbox"], result["score"]])
            else:
                pairs = zip(result["labels"], result["scores"], strict=True)
                rows[result["file_name"]] += map(list, pairs)
    return {name: np.array(found) for name, found in rows.items()}


def signature_outputs(signatures, encoded: list[bytes]) -> dict[str, list[np.ndarray]]:
    """{signature: detections of every image}; strings in one batch, images one by one."""
    images = [decode_image(data).numpy() for data in encoded]
    examples = [
        encode_example(data, *im.shape[:2], "", 0, [])
        for data, im in zip(encoded, images, strict=True)
    ]
    batched = {"image_bytes": encoded, "tf_example": examples}
    found = {}
    for name, batch in batched.items():
        outputs = signatures[name](tf.constant(batch))
        found[name] = [detections(outputs, i) for i in range(len(batch))]
    found["image_tensor"] = [
        detections(signatures["image_tensor"](tf.constant(image[None])), 0) for image in images
    ]
    return found


def largest_difference(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """Of any number; infinite where the numbers of detections differ."""
    pairs = list(zip(found, reference, strict=True))
    if any(len(a) != len(b) for a, b in pairs):
        return float("inf")
    return max(_difference(a, b) for a, b in pairs)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape[1:] != (2,):
        return float(np.abs(a - b).max(initial=0))
    scores = dict(a), dict(b)
    return max(abs(scores[0].get(k, 0) - scores[1].get(k, 0)) for k in {*scores[0], *scores[1]})


def main(_: list[str]) -> None:
    files = expand(IMAGES.value)
    encoded = [tf.io.read_file(path).numpy() for path in files]
    signatures = tf.saved_model.load(SAVED_MODEL.value).signatures
    by_name, failed = expected(RESULTS.value), False
    reference = [by_name.get(os.path.basename(path), np.empty((0, 5))) for path in files]
    for name, found in signature_outputs(signatures, encoded).items():
        worst = largest_difference(found, reference)
        failed |= worst > TOLERANCE
        verdict = "DIFFERS from" if worst > TOLERANCE else "agrees with"
        print(f"{name} {verdict} predict on {len(files)} images; largest difference {worst:.2g}")
    sys.exit(int(failed))  # of NumPy, False would be an error


if __name__ == "__main__":
    app.run(main)
