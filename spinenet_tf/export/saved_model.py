"""A SavedModel that takes images as they come and returns boxes in their pixels."""

import json
from typing import Any

import keras
import tensorflow as tf

from spinenet_tf.data import records


def export(
    task: Any, model: keras.Model, folder: str, *, canvas: int, categories: list[dict] = ()
) -> None:
    """Writes a SavedModel with three signatures.

    `serving_default` and `image_bytes`: [b] string, encoded JPEG, PNG, GIF or BMP; `image_tensor`:
    [b, h, w, 3] uint8 RGB; `tf_example`: [b] string, serialized with image/encoded. Each returns
    what `task.serve` says, for detection: num_detections [b] int32, detection_boxes [b, k, 4]
    float32 (yxyx, source pixels), detection_scores [b, k] float32 and detection_classes [b, k]
    int32, best first, padded with 0; and detection_masks [b, k, 28, 28] with Mask R-CNN.

    Args:
      canvas: as `Data.canvas` in training.
      categories: [{'id', 'name', 'label'}], written beside it as assets.extra/labels.json; classes
        are labels.
    """
    endpoints = _endpoints(task, model, canvas)
    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, (function, shape, dtype) in endpoints.items():
        archive.add_endpoint(name, function, [tf.TensorSpec(shape, dtype, name="inputs")])
    archive.write_out(folder, verbose=False)
    if categories:
        tf.io.gfile.makedirs(f"{folder}/assets.extra")
        with tf.io.gfile.GFile(f"{folder}/assets.extra/labels.json", "w") as file:
            json.dump(list(categories), file)


def _endpoints(task: Any, model: keras.Model, canvas: int) -> dict:
    def detect(inputs, to_image):
        def row(value):  # encoded images are decoded as those of training
            return task.row(to_image(value), canvas)

        # map_fn wants to know what a row looks like before it has seen one.
        example = tf.function(lambda: task.row(tf.zeros([8, 8, 3], tf.uint8), canvas))
        rows = example.get_concrete_function().structured_outputs
        spec = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), rows)
        batch = tf.map_fn(row, inputs, fn_output_signature=spec)
        return task.serve(task.predict(model, batch, native=True))

    def from_example(value):
        return records.parse_example(value)["encoded"]

    def bytes_endpoint(inputs):
        return detect(inputs, tf.identity)

    return {
        "serving_default": (bytes_endpoint, [None], tf.string),
        "image_bytes": (bytes_endpoint, [None], tf.string),
        "image_tensor": (lambda x: detect(x, tf.identity), [None, None, None, 3], tf.uint8),
        "tf_example": (lambda x: detect(x, from_example), [None], tf.string),
    }
