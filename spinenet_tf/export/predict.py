"""Detections of image files: drawn pictures and a COCO results file."""

import io
import os
from typing import Any

import gin
import numpy as np
import tensorflow as tf
from PIL import Image

from spinenet_tf.data import pipeline
from spinenet_tf.draw import draw_boxes
from spinenet_tf.ops.nms import Detections


def expand(patterns: list[str]) -> list[str]:
    """Files of paths and globs, sorted, once each.

    Raises:
      FileNotFoundError: a pattern matches nothing.
    """
    found = set()
    for pattern in patterns:
        files = tf.io.gfile.glob(pattern)
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
) -> list[dict]:
    """Draws `<output>/<name>.png` for every file.

    Args:
      canvas: as `Data.canvas` in training.
      min_score: lowest score drawn; the returned results hold all.

    Returns:
      COCO results. `image_id` is the file's number where its name is one (as COCO's are), otherwise
      its place in `files`; each result also carries `file_name`.

    Raises:
      ValueError: a file is no image; names it.
    """
    tf.io.gfile.makedirs(output)
    predict = tf.function(lambda batch: task.predict(model, batch, native=True))
    results = []
    for number, path in enumerate(files):
        image = _read(path)
        row = pipeline.place(image, canvas)
        found = Detections(
            *(part[0].numpy() for part in predict({k: v[None] for k, v in row.items()}))
        )
        stem = os.path.splitext(os.path.basename(path))[0]
        results += _results(
            found, int(stem) if stem.isdigit() else number, path, category_ids or {}
        )
        keep = found.scores >= min_score
        drawn = draw_boxes(
            image.numpy(), found.boxes[keep], found.classes[keep], found.scores[keep], names
        )
        _write_png(f"{output}/{stem}.png", drawn)
    return results


def _read(path: str) -> tf.Tensor:
    try:
        return pipeline.decode_image(tf.io.read_file(path))
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(f"{path} is not a JPEG, PNG, GIF or BMP image") from error


def _results(found: Detections, image_id: int, path: str, ids: dict[int, int]) -> list[dict]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "file_name": os.path.basename(path),
            "category_id": ids.get(label, label),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for (y0, x0, y1, x1), score, label in list(rows)[: int(found.count)]
    ]


def _write_png(path: str, image: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(buffer.getvalue())
