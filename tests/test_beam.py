"""Conversion by Beam's direct runner against that of this process, and after a SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tensorflow as tf
import tiny

from spinenet_tf.data import beam, classes, coco, shards, synthetic, synthetic_classes
from spinenet_tf.data.records import parse_example

pytest.importorskip("apache_beam")
OPTIONS = ["--runner=DirectRunner"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    path = synthetic.write_coco(folder, num_images=24, image_size=96, split="val")
    return str(folder / "val"), str(path)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".tfrecord"}


def in_beam(pending):
    return beam.in_beam(pending, OPTIONS)


def test_beam_writes_the_same_bytes(source, tmp_path):
    for name, run in (("here", shards.in_processes), ("beam", in_beam)):
        (tmp_path / name).mkdir()
        coco.convert(*source, str(tmp_path / name / "set"), num_shards=3, run=run)
    assert files(tmp_path / "here") == files(tmp_path / "beam")
    summaries = [json.loads((tmp_path / n / "set.json").read_text()) for n in ("here", "beam")]
    assert summaries[0] == summaries[1]
    left = {p.name for p in (tmp_path / "beam").iterdir()}
    assert left == {*files(tmp_path / "beam"), "set.json", "set.state.json"}


def test_classes_by_beam(tmp_path):
    path = synthetic_classes.write_classes(tmp_path / "in", num_images=20, image_size=32)
    for name, run in (("here", shards.in_processes), ("beam", in_beam)):
        (tmp_path / name).mkdir()
        prefix = str(tmp_path / name / "set")
        classes.convert(str(tmp_path / "in"), prefix, annotations=str(path), num_shards=2, run=run)
    assert files(tmp_path / "here") == files(tmp_path / "beam")


def test_a_stopped_pipelines_finished_shards_are_kept(source, tmp_path):
    first = []

    def stopped(pending):
        for shard in pending[:2]:  # two were finished when the launching process died
            with tf.io.gfile.GFile(shard.path + beam.JOBS, "wb") as file:
                file.write(beam.pickle.dumps(shard))
            first.append(beam.convert_shard(shard.path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coco.convert(*source, str(tmp_path / "set"), num_shards=3, run=stopped)
    before = {path: os.stat(path).st_mtime_ns for path in first}
    summary = coco.convert(*source, str(tmp_path / "set"), num_shards=3, run=in_beam)
    assert summary.num_examples == 24
    assert before == {path: os.stat(path).st_mtime_ns for path in first}


def test_sigkill_loses_and_doubles_no_record(tmp_path):
    """Two processes are killed in the middle, twice; a last run ends it."""
    path = synthetic.write_coco(tmp_path / "in", num_images=160, image_size=192, split="val")
    prefix = tmp_path / "out/set"
    command = [
        sys.executable, str(tiny.ROOT / "scripts/make_coco_records.py"), f"--annotations={path}",
        f"--images={tmp_path}/in/val", f"--output={prefix}", "--num_shards=10", "--workers=2",
    ]  # fmt: skip
    killed = 0
    for _ in range(2):
        run = subprocess.Popen(command, env=tiny.environment(), stderr=subprocess.DEVNULL)
        finished = len(list(prefix.parent.glob("set-*.tfrecord"))) if prefix.parent.exists() else 0
        while run.poll() is None:
            now = len(list(prefix.parent.glob("set-*.tfrecord"))) if prefix.parent.exists() else 0
            if now > finished:
                run.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.005)
        run.wait()
    assert killed
    subprocess.run(command, env=tiny.environment(), check=True, capture_output=True)
    names = sorted(str(p) for p in prefix.parent.glob("set-*.tfrecord"))
    ids = sorted(int(parse_example(r)["id"]) for r in tf.data.TFRecordDataset(names))
    assert len(names) == 10 and ids == list(range(1, 161))
    assert not list(prefix.parent.glob("*partial"))
