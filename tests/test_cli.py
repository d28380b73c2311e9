"""The command line from end to end on a tiny recipe, and its errors."""

import json

import gin
import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image

from spinenet_tf import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model folder, its records and what train_and_eval printed."""
    folder = tmp_path_factory.mktemp("cli")
    records = tiny.make_records(folder)
    argv = tiny.command(
        "train_and_eval", folder / "model", records, "Training.eval_every = 8",
        "Detection.score_threshold = 0.0",
    )  # fmt: skip
    done = tiny.run(argv)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, records, done.stdout


def later(trained, mode, *flags):
    """argv of a mode with the recipe that training left in the model folder."""
    argv = tiny.command(mode, trained[0] / "model", trained[1], flags=flags)
    return [a for a in argv if not a.startswith("--gin_file")]


def test_train_and_eval_prints_and_saves_the_twelve_figures(trained):
    folder, _, out = trained
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"):
        assert f"\n{name:6} " in out
    assert "evaluated step 8" in out and "evaluated step 12" in out
    metrics = json.loads((folder / "model/metrics-12.json").read_text())
    assert metrics["step"] == 12 and len(metrics) == 13
    results = json.loads((folder / "model/results.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    events = list((folder / "model/eval").glob("events*"))
    tags = {
        v.tag for e in tf.compat.v1.train.summary_iterator(str(events[-1])) for v in e.summary.value
    }
    assert {"AP", "AR100", "detections/0"} <= tags


def test_another_evaluation_leaves_the_figures_alone(trained, tmp_path, capsys):
    """Such as of half of a set: `--output` takes its files, TensorBoard nothing."""
    folder, records, _ = trained
    before = {p.name: p.read_bytes() for p in (folder / "model").glob("*.json")}
    events = len(list((folder / "model/eval").iterdir()))
    annotations = folder / "images/annotations/instances_train.json"
    flags = [
        f"--output={tmp_path}/half", f"--gin_param=eval/Data.annotations='{annotations}'",
        f"--gin_param=eval/Data.pattern='{records}/set-00000*'",
    ]  # fmt: skip
    gin.clear_config()
    assert not tiny.run_here(later(trained, "eval", *flags))
    assert "6 of the 12 images of" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "half").iterdir()} == {"metrics-12.json", "results.json"}
    assert before == {p.name: p.read_bytes() for p in (folder / "model").glob("*.json")}
    assert events == len(list((folder / "model/eval").iterdir()))


def test_eval_repeats_the_figures_of_training(trained):
    before = json.loads((trained[0] / "model/metrics-12.json").read_text())
    done = tiny.run(later(trained, "eval"))
    assert done.returncode == 0, done.stderr[-3000:]
    after = json.loads((trained[0] / "model/metrics-12.json").read_text())
    assert after == pytest.approx(before, abs=1e-6)


def test_predict_and_all_export_signatures_agree(trained):
    folder = trained[0]
    images = sorted((folder / "images/train").glob("*.jpg"))[:3]
    pictures, saved = folder / "pictures", folder / "saved_model"
    chosen = f"--images={folder}/images/train/*0[123].jpg"
    assert not tiny.run_here(later(trained, "predict", chosen, f"--output={pictures}"))
    for path in images:
        drawn = Image.open(pictures / f"{path.stem}.png")
        assert drawn.size == Image.open(path).size
    gin.clear_config()
    assert not tiny.run_here(later(trained, "export", f"--output={saved}"))
    categories = json.loads((saved / "assets.extra/labels.json").read_text())
    assert [c["label"] for c in categories] == list(range(1, len(categories) + 1))
    results = json.loads((pictures / "results.json").read_text())
    signatures = tf.saved_model.load(str(saved)).signatures
    assert set(signatures) == {"serving_default", "image_bytes", "image_tensor", "tf_example"}
    check = tiny.run(
        [
            tiny.sys.executable, str(tiny.ROOT / "scripts/check_saved_model.py"),
            f"--saved_model={saved}", chosen, f"--results={pictures}/results.json",
        ]
    )  # fmt: skip
    assert check.returncode == 0, check.stdout + check.stderr[-2000:]
    assert check.stdout.count("agrees with predict on 3 images") == 3
    outputs = signatures["serving_default"](tf.constant([path.read_bytes() for path in images]))
    mine = [r for r in results if r["image_id"] == int(images[0].stem)]
    assert int(outputs["num_detections"][0]) == len(mine) > 0
    y0, x0, y1, x1 = outputs["detection_boxes"][0, 0].numpy()
    np.testing.assert_allclose([x0, y0, x1 - x0, y1 - y0], mine[0]["bbox"], atol=0.01)


def test_pictures_and_ids_of_files_with_equal_names_differ():
    from spinenet_tf.export.predict import _identify

    assert _identify(["a/0017.jpg", "a/9.png"]) == [(17, "0017"), (9, "9")]
    assert _identify(["a/1.jpg", "b/1.jpg", "c.jpg"]) == [(0, "1-0"), (1, "1-1"), (2, "c")]
    assert _identify(["1.jpg", "01.jpg"]) == [(0, "1"), (1, "01")]


def test_profile_in_words_and_as_json(capsys):
    recipe = tiny.ROOT / "gin_configs/table2/49S_640_b.gin"
    argv = [tiny.sys.executable, "-m", "spinenet_tf.main", "--mode=profile", f"--gin_file={recipe}"]
    words = tiny.run(argv).stdout
    assert "11.945 M trainable" in words and "33.83 B an image" in words
    assert not tiny.run_here([*argv, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == 11_944_598


ERRORS = {
    "unknown configurable": (["--gin_param=Detecton.flip=True"], "did you mean 'Detection'"),
    "unknown parameter": (["--gin_param=Detection.flipp=True"], "did you mean 'flip'"),
    "missing recipe": (["--gin_file=/no/such.gin"], "--gin_file=/no/such.gin: no such file"),
    "unknown flag": (["--modeldir=x"], "Unknown command line flag 'modeldir'"),
    "unknown mode": (["--mode=fly"], "should be one of"),
    "stray argument": (["demo.gin"], "demo.gin"),
    "no quotes": (["--gin_param=Data.pattern=records/set-*"], "strings need quotes of their own"),
    "unknown style": (["--gin_param=RetinaNet.filterz=3"], "unexpected keyword argument 'filterz'"),
    "no data": (
        ["--gin_param=Data.pattern='/no/such*'"],
        "Data.pattern='/no/such*' matches no file",
    ),
    "another task": (
        ["--gin_param=InstanceSegmentation.image_size=128"],
        "nothing reads it, as the recipe's task is Detection",
    ),
    "another network": (["--gin_param=Classifier.size='96'"], "and its network RetinaNet"),
    "unknown scope": (["--gin_param=val/Data.batch_size=4"], "val/Data: nothing reads it"),
    "scope of another thing": (
        ["--gin_param=eval/Detection.flip=False"],
        "eval/Detection: nothing reads it",
    ),
    "too few classes": (["--gin_param=Detection.num_classes=3"], "Detection.num_classes=7"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_get_one_clear_line(name, trained, tmp_path, capfd):
    flags, message = ERRORS[name]
    said = tiny.mistake(tiny.command("train", tmp_path / "m", trained[1], flags=flags), capfd)
    assert message in said and "Traceback" not in said


def test_a_recipe_of_ones_own_includes_ours(tmp_path):
    recipe = tmp_path / "mine.gin"
    recipe.write_text("include 'models/49S.gin'\nDetection.num_classes = 4\n")
    main.parse_gin([str(recipe)], [], None)
    assert gin.query_parameter("RetinaNet.size") == "49S"


def test_a_mistake_ends_the_process(trained, tmp_path):
    done = tiny.run(tiny.command("eval", tmp_path / "none", trained[1]))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "holds no checkpoint: train first" in done.stderr


def test_a_checkpoint_of_another_model_is_one_line(trained):
    done = tiny.run(later(trained, "eval", "--gin_param=SpineNet.width=0.25"))
    assert done.returncode == 1 and "is not of the model that the recipe builds" in done.stderr
    assert "WARNING" not in done.stderr, done.stderr


def test_mistakes_with_a_checkpoint(trained, tmp_path, capfd):
    folder, records, _ = trained
    model, text = folder / "model", tmp_path / "text.jpg"
    text.write_text("not an image")
    cases = [
        ("eval", ["--gin_param=Detection.num_classes=9"],
         "was trained with Detection.num_classes=7, the recipe says 9"),
        ("predict", ["--images=/no/such.jpg"], "--images=/no/such.jpg: no such file"),
        ("predict", [f"--images={text}", f"--output={tmp_path}/out"],
         f"{text} is not a JPEG, PNG, GIF or BMP"),
    ]  # fmt: skip
    for mode, flags, message in cases:
        gin.clear_config()
        assert message in tiny.mistake(tiny.command(mode, model, records, flags=flags), capfd)
