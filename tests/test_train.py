"""The trainer: exact resume, replicas, workers, signals, schedules."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import gin
import numpy as np
import pytest
import tensorflow as tf
import tiny

from spinenet_tf.train import strategy as strategies
from spinenet_tf.train import trainer
from spinenet_tf.train.optimizer import Momentum, Schedule
from spinenet_tf.train.trainer import Training


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny.make_records(tmp_path_factory.mktemp("train"))


def weights(model_dir):
    path = tf.train.latest_checkpoint(str(model_dir))
    reader = tf.train.load_checkpoint(path)
    return {
        k: reader.get_tensor(k)
        for k in reader.get_variable_to_shape_map()
        if "save_counter" not in k and not k.startswith("_CHECKPOINTABLE")
    }


# --- schedules


def rates(schedule, steps, batch_size=256, steps_per_epoch=10):
    kwargs = dict(batch_size=batch_size, steps_per_epoch=steps_per_epoch)
    return [float(schedule.rate(tf.constant(s), **kwargs)) for s in steps]


def test_step_schedule_of_protocol_b():
    schedule = Schedule()  # 350 epochs of 10 steps: drops at 3200 and 3400
    actual = rates(schedule, [0, 25, 50, 3199, 3200, 3399, 3400, 3499])
    expected = [0.0067, (0.0067 + 0.28) / 2, 0.28, 0.28, 0.028, 0.028, 0.0028, 0.0028]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_cosine_schedule_and_linear_scaling_with_the_batch():
    schedule = Schedule(kind="cosine", epochs=25, warmup_epochs=5, warmup_start=0.0)
    actual = rates(schedule, [0, 25, 50, 150, 250], batch_size=128)
    np.testing.assert_allclose(actual, [0, 0.07, 0.14, 0.07, 0], atol=1e-6)
    with pytest.raises(ValueError, match="Schedule.kind='linear'"):
        Schedule(kind="linear")


def test_momentum_keeps_the_rate_outside_the_velocity():
    variable = tf.Variable([1.0])
    optimizer = Momentum([variable], 0.9)
    optimizer.apply([tf.constant([1.0])], tf.constant(0.1))  # velocity 1, 1 - 0.1 = 0.9
    optimizer.apply([tf.constant([1.0])], tf.constant(0.01))  # velocity 1.9, 0.9 - 0.019
    np.testing.assert_allclose(variable, [0.881], rtol=1e-6)


# --- exact resume


@pytest.mark.slow
def test_killed_anywhere_and_restarted_ends_as_if_it_had_not_been(records, tmp_path):
    straight = tiny.run(tiny.command("train", tmp_path / "straight", records))
    assert straight.returncode == 0, straight.stderr[-2000:]
    argv = tiny.command("train", tmp_path / "killed", records)
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=tiny.environment()
    )
    at = random.choice([2, 4, 6, 8])
    for line in process.stdout:
        if line.startswith(f"step {at}/"):
            time.sleep(random.random() / 10)
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    again = tiny.run(argv)
    assert again.returncode == 0, again.stderr[-2000:]
    expected, actual = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert set(expected) == set(actual)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=f"{name}, killed at step {at}")
    assert any(name.startswith("seeds/") for name in expected)  # stochastic depth resumes as well


def test_sigterm_saves_and_exits(records, tmp_path):
    argv = tiny.command("train", tmp_path / "run", records, "Training.steps = 100000")
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=tiny.environment()
    )
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143
    saved = int(rest.split("SIGTERM: saved step ")[1].split()[0])
    assert tf.train.latest_checkpoint(str(tmp_path / "run")).endswith(f"-{saved}")


# --- loops, failures and what is left behind


def test_the_loop_stops_at_every_boundary_and_writes_what_it_should(records, tmp_path, capsys):
    from spinenet_tf import modes

    tiny.bind(records, "Training.steps_per_loop = 3")
    modes.train(str(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    # Loops of 3, cut at the checkpoints at 4, 8 and 12.
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [3, 4, 6, 8, 9, 12]
    assert {"loss", "lr", "images/s", "left"} <= set(" ".join(lines).split())
    assert (tmp_path / "config.gin").exists() and (tmp_path / "operative_config.gin").exists()
    sidecar = json.loads((tmp_path / "model.json").read_text())
    assert sidecar["task"]["num_classes"] == 7 and len(sidecar["categories"]) == 6
    assert _scalars(tmp_path / "train") == {
        "class", "box", "l2", "total", "gradient_norm", "learning_rate",
        "steps_per_second", "images_per_second",
    }  # fmt: skip


def _scalars(folder: Path) -> set[str]:
    events = [
        f for path in folder.iterdir() for f in tf.compat.v1.train.summary_iterator(str(path))
    ]
    return {value.tag for event in events for value in event.summary.value}


def test_evaluation_on_the_way_changes_nothing(records, tmp_path, capsys):
    """Evaluations between checkpoints: the run goes on as if they had not been."""
    from spinenet_tf import modes

    def final_weights(folder, mode, *bindings):
        tiny.bind(records, "Training.steps = 8", *bindings)
        mode(str(folder))
        gin.clear_config()
        return weights(folder)

    straight = final_weights(tmp_path / "a", modes.train)
    watched = final_weights(tmp_path / "b", modes.train_and_eval, "Training.eval_every = 3")
    assert capsys.readouterr().out.count("evaluated step") == 3  # at 3, 6 and 8
    assert (tmp_path / "b/metrics-3.json").exists()
    for name, value in straight.items():
        np.testing.assert_array_equal(watched[name], value, err_msg=name)


def test_a_wrong_recipe_leaves_the_folder_as_it_was(records, tmp_path, eagerly):
    from spinenet_tf import modes

    tiny.bind(records, "Training.steps = 2")
    modes.train(str(tmp_path))
    before = (tmp_path / "config.gin").read_text()
    gin.clear_config()
    tiny.bind(records, "SpineNet.width = 0.25")
    with pytest.raises(ValueError, match="is not of the model that the recipe builds"):
        modes.train(str(tmp_path))
    assert (tmp_path / "config.gin").read_text() == before


def test_another_start_than_the_runs_is_refused(tmp_path):
    from spinenet_tf.checkpoints import folder

    where = str(tmp_path)
    assert folder.check_start(where, "spinenet-49") == "spinenet-49"  # not begun
    tf.train.CheckpointManager(tf.train.Checkpoint(v=tf.Variable(0)), where, 1).save()
    folder.write_sidecar(where, {"init_from": "spinenet-49"})
    assert folder.check_start(where, "spinenet-49") == "spinenet-49"  # preempted
    assert folder.check_start(where, "") == "spinenet-49"
    with pytest.raises(ValueError, match="started from spinenet-49, not from --init_checkpoint=x"):
        folder.check_start(where, "x")
    assert folder.check_start(where, "spinenet-49/") == "spinenet-49"
    folder.write_sidecar(where, {"init_from": ""})
    with pytest.raises(ValueError, match="started from random weights, not from"):
        folder.check_start(where, "x")


@pytest.mark.parametrize(
    ("binding", "field"),
    [
        ("Style.activation = 'swish'", "Style.activation='relu'"),
        ("Style.epsilon = 0.01", "Style.epsilon=0.001"),
        ("Detection.inclusive_boxes = True", "Detection.inclusive_boxes=False"),
        ("Anchors.aspect_ratios = (0.5, 1.0, 2.0)", "Anchors.aspect_ratios="),
    ],
)
def test_weights_that_fit_but_would_mean_something_else(tmp_path, binding, field):
    from spinenet_tf import modes
    from spinenet_tf.checkpoints import describe, folder

    gin.parse_config(tiny.BINDINGS)
    task = modes.make_task()
    folder.write_sidecar(str(tmp_path), describe.of_run(task, []))
    folder.check_fits(str(tmp_path), task)
    gin.parse_config(binding)
    with pytest.raises(ValueError, match=f'--gin_param="{field}'):
        folder.check_fits(str(tmp_path), modes.make_task())


MISTAKEN = [
    ("eval/Data.pattern = '/no/such*'", "'/no/such.' matches no file"),
    ("eval/Data.annotations = '/no.json'", "Data.annotations='/no.json': no such file"),
    ("Training.examples = 118287", "Training.examples=118287, but .* has 12 images"),
    ("RetinaNet.num_classes = 4", "RetinaNet.num_classes follows from Detection's num_classes"),
]


@pytest.mark.parametrize(("binding", "message"), MISTAKEN)
def test_what_would_stop_an_evaluation_is_found_before_the_training(
    records, tmp_path, binding, message
):
    from spinenet_tf import modes

    tiny.bind(records, binding)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        modes.train_and_eval(str(tmp_path))
    assert not tf.train.latest_checkpoint(str(tmp_path))


def test_classes_of_another_task_are_refused():
    from spinenet_tf import modes

    gin.parse_config("make_task.task = @InstanceSegmentation\nDetection.num_classes = 4")
    with pytest.raises(ValueError, match="Detection.num_classes is bound, but the recipe's task"):
        modes.make_task()


def test_mask_anchors_may_have_scales():
    from spinenet_tf.tasks.instances import InstanceSegmentation

    assert InstanceSegmentation().anchors.scales == 1
    gin.parse_config("Anchors.scales = 3")
    assert InstanceSegmentation().anchors.scales == 3


def test_records_without_png_masks_need_the_json(tmp_path):
    from spinenet_tf.data import coco, synthetic
    from spinenet_tf.data.pipeline import Data
    from spinenet_tf.tasks.instances import InstanceSegmentation

    path = synthetic.write_coco(tmp_path / "in", num_images=2, image_size=64, split="val")
    coco.convert(
        str(tmp_path / "in/val"), str(path), str(tmp_path / "set"), num_shards=1, png_masks=False
    )
    with pytest.raises(ValueError, match="set.json: these records have no masks of whole images"):
        InstanceSegmentation().metric(Data(pattern=f"{tmp_path}/set-*"))
    InstanceSegmentation().metric(Data(pattern=f"{tmp_path}/set-*", annotations=str(path)))


@pytest.mark.parametrize(
    ("segmentation", "boxes", "message"),
    [
        (None, [[1, 1, 9, 9]], "these records have no masks"),
        ([], [], "these records have no objects to learn"),
    ],
)
def test_records_that_nothing_can_be_learned_from(tmp_path, segmentation, boxes, message):
    from PIL import Image

    from spinenet_tf import modes
    from spinenet_tf.data import coco

    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg")
    entry = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": segmentation}
    path = tmp_path / "in.json"
    path.write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg", "height": 16, "width": 16}],
        "annotations": [entry | {"bbox": box} for box in boxes],
        "categories": [{"id": 1, "name": "a"}],
    }))  # fmt: skip
    coco.convert(str(tmp_path), str(path), str(tmp_path / "set"), num_shards=1)
    gin.parse_config([*tiny.BINDINGS, "make_task.task = @InstanceSegmentation"])
    gin.parse_config(f"Data.pattern = '{tmp_path}/set-*'")
    run = types.SimpleNamespace(task=modes.make_task(), trainer=Training(examples=1))
    with pytest.raises(ValueError, match=f"set.*: {message}"):
        modes._check_records(run, modes.scoped_data("train"))


@pytest.mark.parametrize(
    ("canvas", "size", "said"), [(32, 64, True), (32, 32, False), (64, 96, False)]
)
def test_images_that_are_reduced_and_enlarged_are_told_of(records, canvas, size, said, capsys):
    from spinenet_tf import modes

    tiny.bind(records, f"Data.canvas = {canvas}", f"Detection.image_size = {size}")
    run = types.SimpleNamespace(task=modes.make_task(), trainer=Training())
    modes._check_records(run, modes.scoped_data("train"))
    assert ("a canvas of 64 would keep" in capsys.readouterr().out) == said


def test_evaluation_records_must_mean_the_same_classes(tmp_path):
    from spinenet_tf.checkpoints import folder

    learned = [{"id": 18, "name": "dog", "label": 1}, {"id": 44, "name": "bottle", "label": 2}]
    folder.write_sidecar(str(tmp_path), {"task": {}, "categories": learned})
    folder.check_categories(str(tmp_path), learned[:1])
    shifted = [{"id": 44, "name": "bottle", "label": 1}]
    with pytest.raises(ValueError, match="label 1 is 'dog' .* and 'bottle' in the evaluation"):
        folder.check_categories(str(tmp_path), shifted)


def test_a_loss_that_is_not_finite_stops_with_the_steps_named(records, tmp_path, eagerly):
    from spinenet_tf import modes

    tiny.bind(records, "Schedule.learning_rate = 1e30", "Schedule.warmup_epochs = 0")
    with pytest.raises(FloatingPointError, match=r"not finite in steps \d+ to \d+"):
        modes.train(str(tmp_path))


def test_gradient_clipping_bounds_the_update(records, tmp_path, eagerly):
    """With a rate of 1, no momentum and no weight decay, the first step moves by the clip norm."""
    from spinenet_tf import modes
    from spinenet_tf.train.trainer import Run, Training

    tiny.bind(
        records, "Training.clip = 0.01", "Training.steps = 1", "Schedule.learning_rate = 1.0",
        "Schedule.warmup_epochs = 0", "Style.weight_decay = 0.0",
    )  # fmt: skip
    run = Run(modes.make_task(), Training(), str(tmp_path))
    before = [v.numpy() for v in run.model.trainable_variables]
    run.train(modes.scoped_data("train"), Schedule())
    moved = [v.numpy() - b for v, b in zip(run.model.trainable_variables, before, strict=True)]
    assert np.sqrt(sum((m**2).sum() for m in moved)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
def test_the_step_compiles_with_xla(records, tmp_path, capsys):
    from spinenet_tf import modes

    tiny.bind(
        records, "Training.xla = True", "Training.steps = 2", "Training.deterministic = False"
    )
    modes.train(str(tmp_path))
    assert "step 2/2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="xla and Training.deterministic exclude each other"):
        Training(xla=True, deterministic=True)
    with pytest.raises(ValueError, match="Training.checkpoint_every=0 is less than 1"):
        Training(checkpoint_every=0)


def test_fine_tuning_takes_all_weights_but_the_class_predictor(records, tmp_path, capsys, eagerly):
    from spinenet_tf import modes
    from spinenet_tf.checkpoints import describe, folder
    from spinenet_tf.train.trainer import Run, Training

    tiny.bind(records, "Training.steps = 2", f"Training.init_from = '{tmp_path}/first'")
    task = modes.make_task()
    first = Run(task, Training(init_from=""), f"{tmp_path}/first")
    folder.write_sidecar(f"{tmp_path}/first", describe.of_run(task, []))
    first.train(modes.scoped_data("train"), Schedule())
    second = Run(dataclasses.replace(task, num_classes=9), Training(), f"{tmp_path}/second")
    assert second.resume() == 0
    assert "random, for other classes: class_predict/kernel" in capsys.readouterr().out
    for old, new in zip(first.model.variables, second.model.variables, strict=True):
        if not old.path.startswith("class_predict") and old.dtype == "float32":
            np.testing.assert_array_equal(new, old, err_msg=old.path)


# --- replicas

MIRRORED_SCRIPT = """
import sys
import gin, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from spinenet_tf import modes
gin.parse_config_file(sys.argv[1])
run = modes._make_run(sys.argv[2], modes.scoped_data("train"))
assert run.strategy.num_replicas_in_sync == int(sys.argv[3]), run.strategy
run.train(modes.scoped_data("train"), modes.Schedule())
np.savez(sys.argv[4], *[v.numpy() for v in run.model.variables if v.dtype == "float32"])
if run.strategy.num_replicas_in_sync == 2:
    assert len(run.evaluate(modes.scoped_data("eval"))._images) == 12
"""


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_mirrored_replicas_equal_one_device(records, tmp_path, recompute):
    """Sync batch norm, global normalisation and clipping: same global batch, same weights.

    Also when the replicas compute blocks anew in the backward pass.
    """
    found = []
    for replicas, kind in ((1, "one_device"), (2, "mirrored")):
        recipe, out = tmp_path / f"{kind}.gin", tmp_path / f"{kind}.npz"
        lines = tiny.bindings(
            records, f"make_strategy.kind = '{kind}'", "Style.synchronized = True",
            "Style.stochastic_depth = 0.0", "Training.steps = 3", "Training.clip = 1.0",
            f"Style.recompute = {recompute and kind == 'mirrored'}",
        )  # fmt: skip
        recipe.write_text("\n".join(lines))
        argv = [sys.executable, "-c", MIRRORED_SCRIPT, recipe, tmp_path / kind, str(replicas), out]
        done = tiny.run(list(map(str, argv)))
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(list(np.load(out).values()))
    one, two = (np.concatenate([v.ravel() for v in variables]) for variables in found)
    assert np.linalg.norm(two - one) <= 1e-5 * np.linalg.norm(one)
    # Betas are all gradient, whose rounding three steps of batch norm have amplified.
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * np.abs(a).max() + 1e-9)


AVERAGES_SCRIPT = """
import sys
import keras, numpy as np, tensorflow as tf
if sys.argv[1] == "workers":
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
from spinenet_tf.train.averages import merger
with strategy.scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(momentum=0.5)])
@tf.function
def step():
    def one():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        model(tf.cast(replica, tf.float32) * 4 + tf.zeros([3, 2]), training=True)
    strategy.run(one)
step()
mean = model.layers[-1].moving_mean.value
local = lambda: [v.numpy().tolist() for v in strategy.experimental_local_results(mean)]
one = strategy.cluster_resolver.task_id if sys.argv[1] == "workers" else slice(2)
assert local() == np.atleast_2d(np.array([[0, 0], [2, 2]])[one]).tolist(), local()
merger(strategy, model)()
assert local() == [[1, 1]] * len(local()), local()
"""


def test_replicas_of_plain_batch_norm_evaluate_and_save_one_average():
    done = tiny.run([sys.executable, "-c", AVERAGES_SCRIPT, "mirrored"])
    assert done.returncode == 0, done.stderr[-2000:]


def test_workers_of_plain_batch_norm_evaluate_and_save_one_average(tmp_path):
    start_workers([sys.executable, "-c", AVERAGES_SCRIPT, "workers"], tmp_path)


SEEDS_SCRIPT = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from spinenet_tf.models.keras_layers import StochasticDepth
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    layer = StochasticDepth(0.5)
drop = tf.function(lambda: strategy.run(lambda: layer(tf.ones([64, 1, 1, 1]), training=True)))
rows = [r.numpy().ravel() for _ in range(2) for r in strategy.experimental_local_results(drop())]
same = [(a == b).mean() for i, a in enumerate(rows) for b in rows[:i]]
assert max(same) < 0.75, same  # 0.5 for independent draws
"""


def test_stochastic_depth_draws_differ_between_replicas_and_steps():
    done = tiny.run([sys.executable, "-c", SEEDS_SCRIPT])
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_where_the_input_runs_here_it_may_call_python(monkeypatch):
    class Slice(tf.distribute.TPUStrategy):
        def __init__(self, jobs):
            spec = tf.train.ClusterSpec(jobs)
            self.__dict__["resolver"] = types.SimpleNamespace(cluster_spec=lambda: spec)

        cluster_resolver = property(lambda self: self.resolver)

    assert strategies.input_is_here(Slice({}))
    assert not strategies.input_is_here(Slice({"worker": ["10.0.0.2:8470", "10.0.0.3:8470"]}))
    assert strategies.input_is_here(tf.distribute.get_strategy())
    for here in (True, False):
        monkeypatch.setattr(trainer, "input_is_here", lambda _, here=here: here)
        asked = []
        run = types.SimpleNamespace(strategy=tf.distribute.get_strategy())
        trainer.Run._distribute(
            run, lambda asked=asked, **about: asked.append(about) or tf.data.Dataset.range(1)
        )
        assert [about["python"] for about in asked] == [here]


def _free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start_workers(argv, folder):
    """Runs a command as two workers of one cluster; returns what each printed."""
    workers = [f"127.0.0.1:{port}" for port in _free_ports(2)]
    processes, logs = [], [folder / f"worker{i}.log" for i in range(2)]
    for i, log in enumerate(logs):
        config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}
        env = tiny.environment(TF_CONFIG=json.dumps(config))
        with log.open("w") as file:  # not a pipe: nobody empties the second while the first runs
            processes.append(subprocess.Popen(argv, stdout=file, stderr=file, env=env))
    codes = [process.wait(timeout=300) for process in processes]
    outputs = [log.read_text() for log in logs]
    assert codes == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    return outputs


@pytest.mark.slow
def test_two_workers_on_loopback_train_and_checkpoint(records, tmp_path):
    argv = tiny.command(
        "train_and_eval", tmp_path / "run", records, "make_strategy.kind = 'multi_worker'",
        "Style.synchronized = True", "Training.steps = 4",
    )  # fmt: skip
    outputs = start_workers(argv, tmp_path)
    assert tf.train.latest_checkpoint(str(tmp_path / "run")).endswith("ckpt-4")
    assert "\nAP " in outputs[0] and "\nAP " not in outputs[1]
    assert json.loads((tmp_path / "run/metrics-4.json").read_text())["step"] == 4
    assert os.path.exists(tmp_path / "run/model.json")
