"""The tf.Example schema: round trips, foreign records, eager against tf.data."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from spinenet_tf.data.records import Instance, encode_example, parse_example

HEIGHT, WIDTH = 20, 40


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def instances(with_masks=False):
    masks = [np.zeros([HEIGHT, WIDTH], np.uint8) for _ in range(2)]
    masks[0][5:10, 4:14] = 1
    encoded = [png(mask) if with_masks else None for mask in masks]
    return [
        Instance((4.0, 5.0, 10.0, 5.0), 3, "cat", False, 49.5, encoded[0]),
        Instance((0.0, 0.0, 40.0, 20.0), 90, "dög", True, 300.0, encoded[1]),
    ]


def example(objects, image_id=17):
    image = png(np.zeros([HEIGHT, WIDTH, 3], np.uint8))
    return encode_example(image, HEIGHT, WIDTH, "a.png", image_id, objects)


def foreign(**features):
    kinds = {int: "int64_list", float: "float_list", bytes: "bytes_list"}
    record = tf.train.Example()
    for name, values in features.items():
        key = "image/" + name.replace("__", "/")
        getattr(record.features.feature[key], kinds[type(values[0])]).value.extend(values)
    return record.SerializeToString()


FOREIGN = {
    "encoded": [b"x"],
    "height": [HEIGHT],
    "width": [WIDTH],
    "source_id": [b"17"],
    "object__bbox__xmin": [0.1, 0.0],
    "object__bbox__xmax": [0.35, 1.0],
    "object__bbox__ymin": [0.25, 0.0],
    "object__bbox__ymax": [0.5, 1.0],
    "object__class__label": [3, 90],
}


def test_no_objects():
    parsed = parse_example(example([]), masks=True)
    assert parsed["boxes"].shape == (0, 4)
    assert all(parsed[key].shape == (0,) for key in ("labels", "crowd", "area", "masks"))


def test_round_trip():
    parsed = parse_example(example(instances(with_masks=True)), masks=True)
    assert (int(parsed["height"]), int(parsed["width"]), int(parsed["id"])) == (HEIGHT, WIDTH, 17)
    # x: 4 / 40 and 14 / 40; y: 5 / 20 and 10 / 20.
    np.testing.assert_allclose(parsed["boxes"], [[0.25, 0.1, 0.5, 0.35], [0, 0, 1, 1]], rtol=1e-6)
    assert parsed["labels"].numpy().tolist() == [3, 90]
    assert parsed["crowd"].numpy().tolist() == [False, True]
    assert parsed["area"].numpy().tolist() == [49.5, 300.0]
    mask = tf.io.decode_png(parsed["masks"][0], channels=1)[..., 0]
    assert mask.shape == (HEIGHT, WIDTH) and int(tf.reduce_sum(mask)) == 50
    assert int(tf.reduce_max(mask)) == 1


def test_keys_are_the_fields_own():
    features = tf.train.Example.FromString(example(instances(with_masks=True))).features.feature
    assert {key.removeprefix("image/") for key in features} == {
        *("height", "width", "filename", "source_id", "key/sha256", "encoded", "format"),
        *(f"object/bbox/{side}" for side in ("xmin", "xmax", "ymin", "ymax")),
        *(f"object/{k}" for k in ("class/text", "class/label", "is_crowd", "area", "mask")),
    }
    assert features["image/format"].bytes_list.value[0] == b"png"
    assert features["image/object/class/text"].bytes_list.value[1].decode() == "dög"


@pytest.mark.parametrize("record", [example(instances(True)), foreign(**FOREIGN), example([])])
def test_eager_equals_tf_data(record):
    eager = parse_example(record, masks=True)
    data = tf.data.Dataset.from_tensors(record).map(lambda r: parse_example(r, masks=True))
    (graph,) = data
    assert eager.keys() == graph.keys()
    for key, value in eager.items():
        assert value.dtype == graph[key].dtype
        np.testing.assert_array_equal(value, graph[key])


def test_foreign_record_without_optional_keys():
    parsed = parse_example(foreign(**FOREIGN), masks=True)
    assert parsed["crowd"].numpy().tolist() == [False, False]
    np.testing.assert_allclose(parsed["area"], [10 * 5, 40 * 20], rtol=1e-5)
    assert parsed["masks"].numpy().tolist() == [b"", b""]


def test_ids():
    ids = [
        int(parse_example(example([], image_id))["id"])
        for image_id in (0, 581929, "000000581929", "b3a1", "b3a2", "b3a1", "9" * 30)
    ]
    assert ids[:3] == [0, 581929, 581929]
    assert ids[3] == ids[5] != ids[4]
    assert all(i > 0 for i in ids[3:])


def test_some_masks_missing_is_an_error():
    with pytest.raises(ValueError, match="1 masks for 2 objects"):
        example([instances(True)[0], instances(False)[1]])


def test_same_input_same_bytes():
    assert example(instances(True)) == example(instances(True))
