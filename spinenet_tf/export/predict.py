"""Detections of image files: drawn pictures and a COCO results file."""

import io
import os
from typing import Any

import gin
import numpy as np
import tensorflow as tf
from PIL import Image

from spinenet_tf.data import pipeline


def expand(patterns: list[str]) -> list[str]:
    """Files of paths and globs, sorted, once each.

    Raises:
      FileNotFoundError: a pattern matches nothing.
    """
    found = set()
    for pattern in patterns:
        files = [f for f in tf.io.gfile.glob(pattern) if not tf.io.gfile.isdir(f)]
        if not files:
            raise FileNotFoundError(f"--images={pattern}: no such file")
        found.update(files)
    return sorted(found)


@gin.configurable
def predict_files(
    task: Any,
    model: Any,
    files: list[str],
    output: str,
    *,
    names: dict[int, str],
    canvas: int = 640,
    min_score: float = 0.3,
    category_ids: dict[int, int] | None = None,
) -> tuple[list[dict], list[str]]:
    """Draws `<output>/<name>.png` for every file.

    Args:
      canvas: as `Data.canvas` in training.
      min_score: lowest score drawn; the returned results hold all.

    Returns:
      COCO results, and a line for every file that is no image. `image_id` is the number in the
      file's name if all names are different numbers (as COCO's are), otherwise the file's place in
      `files`; each result also carries `file_name`.
    """
    tf.io.gfile.makedirs(output)
    predict = tf.function(lambda batch: task.predict(model, batch, native=True))
    results, bad = [], []
    for path, (image_id, stem) in zip(files, _identify(files), strict=True):
        try:
            encoded = tf.io.read_file(path)
            image = pipeline.decode_image(encoded)
        except tf.errors.InvalidArgumentError:
            bad.append(f"{path} is not a JPEG, PNG, GIF or BMP image")
            continue
        row = {k: v[None] for k, v in task.row(encoded, canvas).items()}
        found = predict(row)
        found = type(found)(*(part[0].numpy() for part in found))
        rows = task.results(found, image_id, category_ids or {}, image.shape[:2])
        results += [{"file_name": os.path.basename(path)} | result for result in rows]
        _write_png(f"{output}/{stem}.png", task.draw(image.numpy(), found, names, min_score))
    return results, bad


def _identify(files: list[str]) -> list[tuple[int, str]]:
    """(image id, name of the picture) of every file, all different."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in files]
    if all(s.isascii() and s.isdecimal() for s in stems) and len(set(map(int, stems))) == len(
        stems
    ):
        return [(int(s), s) for s in stems]
    twice = {s for s in stems if stems.count(s) > 1}
    return [(i, f"{s}-{i}" if s in twice else s) for i, s in enumerate(stems)]


def _write_png(path: str, image: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(buffer.getvalue())
