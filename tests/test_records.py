"""The tf.Example schema: round trips, foreign records, eager against tf.data."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from spinenet_tf.data.records import (
    Instance,
    encode_class_example,
    encode_example,
    parse_class_example,
    parse_example,
    parse_labels,
)

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


def test_class_round_trip_has_the_fields_own_keys():
    image = png(np.zeros([HEIGHT, WIDTH, 3], np.uint8))
    record = encode_class_example(image, HEIGHT, WIDTH, "n01/a.png", 17, 1000, "tönch")
    parsed = parse_class_example(record)
    assert {k: (v.shape.rank, v.dtype.name) for k, v in parsed.items()} == {
        "encoded": (0, "string"), "id": (0, "int64"), "label": (0, "int32"),
    }  # fmt: skip
    assert (parsed["encoded"].numpy(), int(parsed["id"]), int(parsed["label"])) == (image, 17, 1000)
    features = tf.train.Example.FromString(record).features.feature
    assert {key.removeprefix("image/") for key in features} == {
        *("height", "width", "filename", "source_id", "key/sha256", "encoded", "format"),
        *("class/label", "class/text"),
    }
    assert features["image/class/text"].bytes_list.value[0].decode() == "tönch"
    assert record == encode_class_example(image, HEIGHT, WIDTH, "n01/a.png", 17, 1000, "tönch")


IMAGENET_TO_GCS = {  # of tensorflow/tpu
    "height": [HEIGHT], "width": [WIDTH], "colorspace": [b"RGB"], "channels": [3],
    "class__label": [1000], "class__synset": [b"n15075141"], "format": [b"JPEG"],
    "filename": [b"n15075141_1.JPEG"], "encoded": [b"x"],
}  # fmt: skip


def test_foreign_class_records():
    parsed = parse_class_example(foreign(**IMAGENET_TO_GCS))
    assert int(parsed["label"]) == 1000 and int(parsed["id"]) > 0
    other = parse_class_example(foreign(**IMAGENET_TO_GCS | {"filename": [b"n15075141_2.JPEG"]}))
    assert int(other["id"]) != int(parsed["id"])


def test_model_garden_reads_our_class_records():
    decoder = pytest.importorskip("official.vision.dataloaders.classification_input").Decoder
    image = png(np.zeros([HEIGHT, WIDTH, 3], np.uint8))
    record = encode_class_example(image, HEIGHT, WIDTH, "a.png", 17, 5, "x")
    decoded = decoder("image/encoded", "image/class/label").decode(record)
    assert decoded["image/encoded"].numpy() == image and int(decoded["image/class/label"]) == 5


def test_labels_of_either_kind():
    image = png(np.zeros([2, 2, 3], np.uint8))
    assert parse_labels(example(instances())).numpy().tolist() == [3, 90]
    of_class = encode_class_example(image, 2, 2, "a.png", 1, 7, "x")
    assert parse_labels(of_class).numpy().tolist() == [7]
    assert parse_labels(example([])).numpy().tolist() == []


def test_a_class_record_needs_one_label_from_1():
    with pytest.raises(ValueError, match="label=0 of a.png"):
        encode_class_example(b"x", 2, 2, "a.png", 1, 0, "x")
    for labels in ([], [1, 2]):
        record = {k: v for k, v in IMAGENET_TO_GCS.items() if k != "class__label"}
        record = foreign(**record | ({"class__label": labels} if labels else {}))
        with pytest.raises(tf.errors.InvalidArgumentError, match="image/class/label"):
            parse_class_example(record)
