"""Official checkpoints in and out, what is wrong with damaged ones, and our own files."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import gin
import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
import tiny
from test_models import assert_close

import spinenet_tf
from spinenet_tf import specs
from spinenet_tf.checkpoints import (
    describe,
    files,
    folder,
    load,
    official,
    order,
    recognize,
    released,
)
from spinenet_tf.export.convert import convert

SHARED = tiny.ROOT.parent / "shared"
FIXTURES = SHARED / "fixtures/official_tf1"
NAMES = [
    "retinanet_spinenet_tiny_relu", "retinanet_mbconv_tiny_swish", "mask_rcnn_spinenet_tiny_relu",
    "classification_spinenet_tiny_swish",
]  # fmt: skip
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="needs ../shared")


def write_tf1(prefix, tensors):
    """A TF1 checkpoint of {name: array}."""
    keys = sorted(tensors)
    values = [tf.constant(tensors[key]) for key in keys]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=keys, shape_and_slices=[""] * len(keys), tensors=values
    )
    return str(prefix)


def read_tf1(prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


# --- the official code's outputs


@pytest.fixture(scope="module", params=NAMES)
def fixture(request):
    """A loaded fixture, the official code's inputs and outputs, and its settings."""
    if not FIXTURES.exists():
        pytest.skip("needs ../shared")
    path = FIXTURES / request.param
    settings = json.loads((path / "config.json").read_text())
    norm = settings["batch_norm_activation"]
    loaded = load.open_checkpoint(
        str(path), image_size=128, activation=norm["activation"], epsilon=norm["batch_norm_epsilon"]
    )
    task = loaded.task
    if "anchor" in settings:
        anchors = dataclasses.replace(task.anchors, size=float(settings["anchor"]["anchor_size"]))
        task = dataclasses.replace(task, anchors=anchors)
    return loaded, task, np.load(path / "io.npz")


def assert_levels_close(maps, stored, name):
    for level in range(3, 8):
        assert_close(maps[f"P{level}"], stored[f"{name}/{level}"])


def test_every_stored_output_of_the_official_code_is_reproduced(fixture):
    loaded, task, stored = fixture
    sizes, image = tf.fill([2, 2], 128.0), stored["image"]
    if task.network == "Classifier":
        return assert_close(loaded.model(image), stored["logits"])
    if task.network == "RetinaNet":
        outputs = loaded.model(image)
        assert_levels_close(outputs["class"], stored, "cls_outputs")
        assert_levels_close(outputs["box"], stored, "box_outputs")
        return parity.same_detections(task.detect(outputs, sizes), stored)
    rpn = loaded.model.get_layer("rpn")(image)
    assert_levels_close(rpn["score"], stored, "rpn_score_outputs")
    assert_levels_close(rpn["box"], stored, "rpn_box_outputs")
    proposals, scores = task.propose(rpn, sizes)
    classes, boxes = task._box_head(loaded.model, rpn["features"], proposals, False)
    assert_close(classes, stored["class_outputs"])
    assert_close(tf.reshape(boxes, [2, 1000, -1]), stored["box_outputs"])
    found = task.detect(loaded.model, rpn["features"], proposals, scores, sizes, native=False)
    masks = task._mask_head(loaded.model, rpn["features"], found.boxes, found.classes, False)
    parity.same_detections(found, stored, tf.sigmoid(masks), stored["detection_masks"])


def test_official_to_ours_to_official_is_bit_identical(fixture, tmp_path):
    """Through a model folder of ours, which is then opened as such."""
    loaded, _, _ = fixture
    source = loaded.description["source"]["path"]
    convert(loaded, str(tmp_path / "ours"))
    ours = load.open_checkpoint(str(tmp_path / "ours"))
    assert ours.task == loaded.task
    convert(ours, str(tmp_path / "back/model.ckpt"), "official_tf1")
    if hasattr(ours.task, "anchors"):
        anchors = dataclasses.replace(ours.task.anchors, aspect_ratios=(0.5, 1.0, 2.0))
        other = ours._replace(task=dataclasses.replace(ours.task, anchors=anchors))
        with pytest.raises(ValueError, match="Anchors.aspect_ratios=.* the official code's are"):
            convert(other, str(tmp_path / "other/model.ckpt"), "official_tf1")
    before, after = read_tf1(source), read_tf1(tmp_path / "back/model.ckpt")
    assert set(after) - {"global_step"} == set(before) - {"global_step"}
    for name in set(before) - {"global_step"}:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


# --- the released 49S's list of variables


@pytest.fixture(scope="module")
def released_49s(tmp_path_factory):
    """Random values under the names and shapes of the paper's own SpineNet-49S RetinaNet file."""
    listing = SHARED / "facts/tf1_spinenet49s_retinanet_variables.txt"
    if not listing.exists():
        pytest.skip("needs ../shared")
    rng, tensors = np.random.default_rng(0), {}
    for line in listing.read_text().splitlines()[1:]:  # the first is their number
        name, shape, dtype = re.fullmatch(r"(\S+) (\[.*\]) (\S+)", line).groups()
        value = rng.normal(0, 0.05, json.loads(shape)).astype(dtype)
        tensors[name] = np.int64(231500) if name == "global_step" else value
    path = tmp_path_factory.mktemp("released") / "spinenet-49S-best"
    path.mkdir()
    return tensors, write_tf1(path / "model.ckpt-231500", tensors)


def test_the_released_49s_is_recognised_whole(released_49s, tmp_path, capsys):
    tensors, path = released_49s
    loaded = load.open_checkpoint(path)
    assert loaded.step == 231500 and loaded.model.name == "retinanet_49s"
    assert loaded.model.get_layer("p3_conv").filters == 256  # the code says 128
    assert loaded.model.get_layer("class_0").filters == 128
    assert loaded.task.num_classes == 91 and loaded.task.image_size == 640
    assert loaded.description["bindings"]["Style"]["activation"] == "swish"  # '-best'
    said = capsys.readouterr().out
    assert "size 49S" in said and "the release spinenet-49S-best" in said
    assert len(loaded.velocities) == len(loaded.model.trainable_variables)
    convert(loaded, str(tmp_path / "model.ckpt"), "official_tf1", optimizer=True)
    back = read_tf1(tmp_path / "model.ckpt")
    assert back.keys() == tensors.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_momentum_is_kept_for_further_training(released_49s, tmp_path):
    from spinenet_tf.train.optimizer import Momentum

    loaded = load.open_checkpoint(released_49s[1])
    convert(loaded, str(tmp_path), optimizer=True)
    _, model = describe.build(folder.read_sidecar(str(tmp_path)))
    momentum, step = Momentum([v.value for v in model.trainable_variables], 0.9), tf.Variable(0)
    step = tf.Variable(0, dtype=tf.int64)
    folder.restore(folder.checkpoint(model, momentum, step), folder.latest(str(tmp_path)))
    assert int(step) == 231500
    for variable, velocity in zip(model.trainable_variables, momentum.velocities, strict=True):
        np.testing.assert_array_equal(velocity, loaded.velocities[variable.path])


# --- what is wrong with a file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small RetinaNet as a TF1 checkpoint, written by us: {name: array} and its path."""
    gin.clear_config()
    description = describe.of_foreign(
        "x", "official",
        {"network": "RetinaNet", "family": "SpineNet", "size": "49", "width": 0.125, "alpha": 0.5,
         "repeats": 1, "endpoints": 8, "filters": 8, "convs": 1, "num_classes": 3,
         "anchors_per_place": 9},
        {"activation": None, "epsilon": None, "image_size": 64, "anchor_size": None},
    )  # fmt: skip
    task, model = describe.build(description)
    parity.randomize(model)
    path = tmp_path_factory.mktemp("whole") / "model.ckpt-7"
    loaded = load.Loaded(model, task, description, {}, 7)
    convert(loaded, str(path), "official_tf1")
    return read_tf1(path), str(path)


def test_a_whole_file_loads(whole):
    tensors, path = whole
    loaded = load.open_checkpoint(path, image_size=64)
    assert loaded.step == 7 and loaded.model.input_shape == (None, 64, 64, 3)
    stem = parity.layer_of(loaded.model, "stem_conv").kernel
    np.testing.assert_array_equal(stem, tensors["spinenet/conv2d/kernel"])
    assert spinenet_tf.load_checkpoint(path).name == "retinanet_49"


def damaged(whole, tmp_path, change):
    tensors = dict(whole[0])
    change(tensors)
    return write_tf1(tmp_path / "model.ckpt", tensors)


CONV = "spinenet/sub_policy3/scale_permuted_block_5/conv2d_1/kernel"
DAMAGES = {
    "missing": (lambda t: t.pop(CONV), rf"the file lacks \(1\): {CONV}$"),
    "another shape": (
        lambda t: t.update({CONV: np.zeros([3, 3, 8, 8], "f4")}),
        rf"of another shape \(1\): {CONV} \(3, 3, 8, 8\), not \(3, 3, 32, 32\)$",
    ),
    "unused": (
        lambda t: t.update({"spinenet/extra/kernel": np.zeros(1, "f4")}),
        r"the model has no place for \(1\): spinenet/extra/kernel$",
    ),
    "a stem's convolution missing": (
        lambda t: t.pop("spinenet/conv2d_3/kernel"), r"lacks \(1\): spinenet/conv2d_3/kernel$",
    ),
    "an endpoint of another width": (
        lambda t: t.update({"spinenet/conv2d_9/kernel": np.zeros([1, 1, 128, 16], "f4")}),
        r"conv2d_9/kernel \(1, 1, 128, 16\), not \(1, 1, 128, 8\)",
    ),
    "predictor missing": (
        lambda t: t.pop("retinanet/class_net/class-predict/bias"), r"lacks \(1\): .*-predict/bias$",
    ),
    "another network": (
        lambda t: (t.clear(), t.update({"vgg/conv/kernel": np.zeros(1, "f4")})),
        r"no backbone that this package has; the file's scopes are \['vgg'\]",
    ),
    "another graph": (
        lambda t: [t.pop(n) for n in list(t) if "sub_policy14" in n],
        "14 scale-permuted blocks, the paper's graph has 15",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_every_tensor_is_accounted_for(whole, tmp_path, name):
    change, message = DAMAGES[name]
    with pytest.raises(ValueError, match=message):
        load.open_checkpoint(damaged(whole, tmp_path, change), image_size=64)


def test_a_cut_file_is_found_before_anything_is_built(whole, tmp_path, monkeypatch):
    path = Path(damaged(whole, tmp_path, lambda t: None))
    data = path.with_name("model.ckpt.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:-2000])
    monkeypatch.setattr(describe, "build", None)
    match = r"model.ckpt: \d+ of \d+ tensors cannot be read, the first is .*Was it copied whole"
    with pytest.raises(ValueError, match=match):
        load.open_checkpoint(str(path))
    index = path.with_name("model.ckpt.index")
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ValueError, match="model.ckpt.index cannot be read"):
        load.open_checkpoint(str(path))


def test_paths_that_are_no_checkpoint(whole, tmp_path):
    prefix = Path(whole[1])
    assert files.find(str(prefix.parent)) == files.find(f"{prefix}.index") == str(prefix)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for path, message in [
        (tmp_path / "a.tar.gz", "unpack it first"),
        (tmp_path / "nothing", "there is no .*nothing.index"),
        (tmp_path, r"give one checkpoint; \*.index files here: none"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            files.find(str(path))


# --- starting a recipe from a checkpoint


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny.make_records(tmp_path_factory.mktemp("checkpoints"))


RECIPE = ["SpineNet.blocks = None", "RetinaNet.endpoints = 8", "Detection.num_classes = 3"]


def fresh_model(records, *extra):
    gin.clear_config()
    tiny.bind(records, *RECIPE, *extra)
    from spinenet_tf import modes

    task = modes.make_task()
    return task.build(), task


def test_init_checkpoint_takes_the_whole_model_or_all_but_the_classes(whole, records, capsys):
    model, task = fresh_model(records)
    load.initialize(model, task, whole[1])
    assert "random" not in capsys.readouterr().out
    name = "retinanet/class_net/class-predict/bias"
    np.testing.assert_array_equal(model.get_layer("class_predict").bias, whole[0][name])
    model, task = fresh_model(records, "Detection.num_classes = 5")
    load.initialize(model, task, whole[1])
    assert "class_predict/kernel, class_predict/bias" in capsys.readouterr().out
    name = "retinanet/box_net/box-predict/kernel"
    np.testing.assert_array_equal(model.get_layer("box_predict").kernel, whole[0][name])


def test_init_checkpoint_takes_a_backbone_for_another_head(whole, records):
    model, task = fresh_model(records, "RetinaNet.filters = 16", "RetinaNet.convs = 2")
    with pytest.raises(ValueError, match="subnets are 8 wide, the recipe says 16"):
        load.initialize(model, task, whole[1])
    before = np.array(model.get_layer("class_0").kernel)
    load.initialize(model, task, whole[1], "backbone")
    kernel = model.get_layer("p7_conv").kernel
    np.testing.assert_array_equal(kernel, whole[0]["spinenet/conv2d_12/kernel"])
    np.testing.assert_array_equal(model.get_layer("class_0").kernel, before)


@pytest.mark.parametrize(
    "binding, message",
    [
        ("RetinaNet.endpoints = 16", "endpoints are 8 wide, the recipe says 16"),
        ("SpineNet.width = 0.25", "0.125 times as wide as SpineNet-49's, the recipe says 0.25"),
        ("Style.numerics = 'model_garden'", "needs Style.numerics = 'official'"),
        ("Anchors.aspect_ratios = (0.5, 1.0, 2.0)", "needs Anchors.aspect_ratios = .1.0, 2.0, 0.5"),
    ],
)
def test_init_checkpoint_says_how_models_differ(whole, records, binding, message):
    model, task = fresh_model(records, binding)
    with pytest.raises(ValueError, match=message):
        load.initialize(model, task, whole[1])


def test_init_checkpoint_knows_the_activation_of_a_release(whole, records, tmp_path):
    path = tmp_path / "spinenet-49-best"
    path.mkdir()
    write_tf1(path / "model.ckpt-1", whole[0])
    model, task = fresh_model(records)
    message = "needs Style.activation = 'swish' .the recipe has 'relu'"
    with pytest.raises(ValueError, match=message):
        load.initialize(model, task, str(path))
    with pytest.raises(ValueError, match=message):
        load.initialize(model, task, str(path), "backbone")
    load.initialize(*fresh_model(records, "Style.activation = 'swish'"), str(path))


def test_a_run_of_ours_is_opened_without_its_recipe(records, tmp_path, eagerly):
    from spinenet_tf import modes

    tiny.bind(records, "Training.steps = 2")
    modes.train(str(tmp_path))
    config = gin.config_str()
    gin.clear_config()
    loaded = load.open_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="activation cannot be set"):
        load.open_checkpoint(str(tmp_path), activation="swish")
    gin.parse_config(config)
    task = modes.make_task()
    model = folder.load_model(task, str(tmp_path))
    assert loaded.task == task and loaded.step == 2
    image = np.random.default_rng(1).normal(size=(1, 64, 64, 3)).astype("f4")
    for one, other in zip(
        tf.nest.flatten(loaded.model(image)), tf.nest.flatten(model(image)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


# --- the command line, and Keras' files


def test_a_foreign_file_is_evaluated_in_one_command_and_exported(
    whole, tmp_path, records, capfd, eagerly
):
    from spinenet_tf import main, modes

    flags = [f"--checkpoint={whole[1]}", f"--model_dir={tmp_path}", "--image_size=64"]
    flags.append(f"--gin_param=eval/Data.pattern='{records}/set-*'")
    flags.append("--gin_param=eval/Data.bad_records=99")  # the set has more classes than the file
    command = [sys.executable, "-m", "spinenet_tf.main", "--mode=eval", *flags]
    assert not tiny.run_here(command)
    said = capfd.readouterr().out
    assert "size 49" in said and "epsilon=0.001" in said and "evaluated step 7" in said
    saved = json.loads((tmp_path / "model.json").read_text())
    assert saved["preprocessing"]["channels"] == "RGB" and saved["source"]["kind"] == "official"
    gin.clear_config()
    main.parse_gin([], [], str(tmp_path))  # config.gin is a recipe for all else
    modes.export(str(tmp_path), str(tmp_path / "saved_model"))
    assert (tmp_path / "saved_model/saved_model.pb").exists()
    capfd.readouterr()
    modes.adopt(whole[1], str(tmp_path))
    assert "has the weights of" in capfd.readouterr().out
    assert "with epsilon=0.001: give another" in tiny.mistake([*command, "--epsilon=1e-4"], capfd)


MISTAKES = [
    (["--mode=convert", "--checkpoint=x"], "needs --checkpoint and --output"),
    (["--mode=train", "--checkpoint=x", "--model_dir=y"], "--checkpoint does not go with"),
    (["--mode=eval", "--init_checkpoint=x", "--model_dir=y"], "--init_checkpoint does not go"),
    (["--mode=profile", "--optimizer"], "--optimizer does not go with --mode=profile"),
    (["--mode=eval", "--model_dir=y", "--epsilon=1e-4"], "--epsilon: only with --checkpoint"),
    (["--mode=predict"], "--mode=predict needs --model_dir"),
    (["--mode=profile", "--tpu_type=v3"], "--tpu_type does not go with --mode=profile"),
    (["--mode=train", "--model_dir=y", "--output=x"], "--output does not go with --mode=train"),
    (["--mode=eval", "--model_dir=y", "--format=own"], "--format does not go with --mode=eval"),
    (
        ["--mode=convert", "--checkpoint=x", "--output=y", "--gin_param=Data.canvas=8"],
        "--gin_param does not go with --mode=convert",
    ),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_flags_that_would_do_nothing_are_mistakes(argv, message):
    from absl.testing import flagsaver

    from spinenet_tf import main

    with flagsaver.flagsaver():
        main.FLAGS(["main", *argv])
        with pytest.raises(ValueError, match=message):
            main._check(main.FLAGS)


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_keras_files_come_back_equal(whole, tmp_path, ending):
    loaded = load.open_checkpoint(whole[1], image_size=64)
    convert(loaded, str(tmp_path / f"model{ending}"))
    again = load.open_checkpoint(str(tmp_path / f"model{ending}"))
    image = np.random.default_rng(1).normal(size=(1, 64, 64, 3)).astype("f4")
    pairs = (tf.nest.flatten(m(image)) for m in (loaded.model, again.model))
    for one, other in zip(*pairs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.task == loaded.task


# --- recognition


def shapes_of(network, **kwargs):
    builder = describe.NETWORKS[network]
    if network != "Classifier":
        kwargs["input_shape"] = (128, 128, 3)
    return {v.path: tuple(v.shape) for v in builder(**kwargs).variables if v.dtype != "int64"}


MODELS = [
    ("RetinaNet", {"size": "49S"}), ("RetinaNet", {"size": "96"}),
    ("RetinaNet", {"size": "143", "num_classes": 21}), ("RetinaNet", {"size": "mobile-49XS"}),
    ("RetinaNet", {"size": "R101-FPN"}), ("RetinaNet", {"size": "R50-NAS-FPN"}),
    ("MaskRCNN", {"size": "49S"}), ("MaskRCNN", {"size": "49", "rpn_convs": 2}),
    ("Classifier", {"size": "R34"}), ("Classifier", {"size": "49", "num_classes": 5090}),
]  # fmt: skip


@pytest.mark.parametrize("network, kwargs", MODELS, ids=lambda x: str(x))
def test_models_are_recognised_by_their_shapes_and_have_official_names(network, kwargs):
    """Every variable of every released kind has one name in the official code, and none is left."""
    shapes = shapes_of(network, **kwargs)
    facts = recognize.recognize(shapes)
    assert facts["network"] == network
    assert facts.items() >= kwargs.items()
    if network in describe.HEADS:
        row = describe.HEADS[network][kwargs["size"]]
        assert facts["endpoints"] == row.endpoints and facts["filters"] == row.filters
    plan = order.plan_of({path.rpartition("/")[0] for path in shapes})
    names = official.layers(plan)
    assert len(set(names.values())) == len(names)
    ours = {path.rpartition("/")[0] for path in shapes}
    assert set(names.values()) == ours
    assert official.plan_of(set(names)) == plan._replace(
        project=plan.backbone.startswith("R") or plan.project
    )


def test_r34_of_the_official_code_projects_its_first_block():
    names = official.layers(order.Plan(backbone="R34", project=True, head="Classifier"))
    assert names["resnet34/conv2d_1"] == "l2_0_shortcut_conv"
    assert names["resnet34/batch_normalization_2"] == "l2_0_1_bn"
    plain = sum(np.prod(s) for s in shapes_of("Classifier", size="R34").values())
    from spinenet_tf import Classifier, ResNet

    model = Classifier("R34", backbone=ResNet("R34", project=True))
    assert sum(np.prod(v.shape) for v in model.variables) - plain == 4096 + 4 * 64


def test_releases_name_sizes_and_are_found_by_folder():
    tables = specs.SIZES | specs.MOBILE_SIZES | specs.PYRAMIDS | specs.RESNETS
    for release in released.RELEASES:
        assert release.size in tables and release.activation in ("relu", "swish")
        path = f"/data/{release.name}/model.ckpt-1"
        model = (release.kind, release.network, release.size)
        assert released.release_of(path, *model) == release
    for path, *model in (
        ("/data/x/model.ckpt", "official", "RetinaNet", "49"),
        ("/spinenet-49/model.ckpt", "official", "RetinaNet", "96"),
        ("/spinenet-49/ckpt-1", "model_garden", "RetinaNet", "49"),
    ):
        assert released.release_of(path, *model) is None
    guess = released.settings(released.likeliest("model_garden", "RetinaNet", "49S"))
    assert guess == {"activation": "swish", "epsilon": 1e-3, "image_size": 640, "anchor_size": 3.0}
    assert released.likeliest("official", "RetinaNet", "R152-FPN").anchor_size == 4.0
    assert len({(r.name, r.network) for r in released.RELEASES}) == len(released.RELEASES)


def test_detectors_with_91_classes_know_their_names(released_49s):
    truth = json.loads((SHARED / "data/coco_mini/annotations/instances_val2017.json").read_text())
    known = load.open_checkpoint(released_49s[1]).description["categories"]
    assert [(c["id"], c["name"]) for c in known] == [
        (c["id"], c["name"]) for c in truth["categories"]
    ]
    assert all(c["label"] == c["id"] for c in known)
    assert released.categories("RetinaNet", 7) == released.categories("Classifier", 91) == []


def test_the_readme_has_the_table_of_releases():
    assert released.table() in (tiny.ROOT / "README.md").read_text()


def test_a_checkpoint_of_an_earlier_version_has_places_for_keys(tmp_path):
    image, step = keras.Input((None, None, 3)), tf.Variable(7, dtype=tf.int64)
    x = keras.layers.Conv2D(4, 7, use_bias=False, name="stem_conv")(image)
    model = keras.Model(image, keras.layers.BatchNormalization(name="stem_bn")(x))
    path = tf.train.Checkpoint(model=model, step=step).save(str(tmp_path / "ckpt"))
    weights = files.read(path)
    assert (weights.kind, weights.step) == ("own", 7)
    values = {v.path: v.numpy() for v in model.variables if v.dtype != "int64"}
    assert weights.tensors.keys() == values.keys()
    assert all(np.array_equal(weights.tensors[name], values[name]) for name in values)
