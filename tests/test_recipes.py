"""Every recipe of gin_configs trains two steps and evaluates, at reduced size: one of each kind by
default, all with -m slow. All of them are read, all their networks built by default.

Functions run eagerly: tracing 60 networks would take longer than they do. The compiled paths have
their own tests.
"""

import math

import gin
import pytest
import tensorflow as tf
import tiny

from spinenet_tf import main, modes

CONFIGS = tiny.ROOT / "gin_configs"
PARTS = {"models", "protocols"}  # not recipes, but what they include
RECIPES = sorted(p for p in CONFIGS.rglob("*.gin") if p.parent.name not in PARTS)
QUICK = {
    "finetune_masks", "table2/49_640_c", "table6/R34_inat", "table9/mobile-49XS_256",
    "table9/MobileNetV2-SSDLite_320",
}  # fmt: skip


def name_of(path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


# What makes any recipe small. Names that a recipe's network does not have are bound in vain.
SMALL = [
    "SpineNet.width = 0.125", "SpineNet.repeats = 1", "SpineNetMobile.width = 0.5",
    "RetinaNet.endpoints = 8", "RetinaNet.filters = 8", "RetinaNet.convs = 1",
    "MaskRCNN.endpoints = 8", "MaskRCNN.filters = 8", "MaskRCNN.convs = 1",
    "MaskRCNN.rpn_convs = 1", "MaskRCNN.fc = 8",
    "Detection.image_size = 64", "Detection.num_classes = 7", "Detection.max_detections = 5",
    "InstanceSegmentation.image_size = 64", "InstanceSegmentation.num_classes = 7",
    "InstanceSegmentation.proposals_before = 20", "InstanceSegmentation.proposals_after = 10",
    "InstanceSegmentation.region_samples = 8", "InstanceSegmentation.mask_samples = 2",
    "InstanceSegmentation.max_detections = 5",
    "Classification.image_size = 64", "Classification.num_classes = 21",
    "Data.canvas = 64", "Data.max_boxes = 12", "Data.mask_size = 14", "Data.shuffle = 4",
    "Data.batch_size = 4", "train/Data.batch_size = 4", "eval/Data.batch_size = 16",
    "train/Data.shuffle = 4", "Training.steps = 2", "Training.steps_per_loop = 2",
    "Training.examples = 0", "make_strategy.kind = 'one_device'", "Training.precision = 'float32'",
]  # fmt: skip


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return tiny.make_records(tmp_path_factory.mktemp("recipes"), images=4)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return tiny.make_class_records(tmp_path_factory.mktemp("recipe_classes"), images=20)


def test_the_quick_ones_exist():
    assert QUICK <= set(map(name_of, RECIPES))


@pytest.fixture(scope="module")
def built():
    """What distinguishes the networks built so far: that of several protocols is built once."""
    return []


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_builds(path, built):
    main.parse_gin([str(path)], SMALL, None)
    modes.scoped_data("train"), modes.Schedule(), modes.Training()
    task = modes.make_task()
    names = (task.network, "SpineNet", "SpineNetMobile", "Style", "Anchors")
    network = [task.num_classes, *({"": name} | gin.get_bindings(name) for name in names)]
    if network not in built:
        assert task.build().count_params() > 0
        built.append(network)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (name_of(p) not in QUICK)) for p in RECIPES],
    ids=name_of,
)
def test_a_recipe_trains_and_evaluates(path, boxes, classes, tmp_path, eagerly):
    main.parse_gin([str(path)], SMALL, None)
    network = modes.make_task().network
    records = classes if network == "Classifier" else boxes
    pattern = [f"Data.pattern = '{records}/set-*'"]
    gin.clear_config()
    main.parse_gin([str(path)], SMALL + pattern, None)
    figures = modes.train_and_eval(str(tmp_path))
    assert tf.train.latest_checkpoint(str(tmp_path)).endswith("-2")
    assert figures and all(math.isfinite(v) for v in figures.values())
    assert set(figures) >= ({"top1", "top5"} if network == "Classifier" else {"AP", "AP50"})
    assert ("mask_AP" in figures) == (network == "MaskRCNN")
