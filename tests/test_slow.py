"""The training runs whose figures README gives. 2 hours on 2 cores: pytest -m slow -n 0."""

import json
import subprocess

import pytest
import tiny


def figures(script, *arguments):
    subprocess.run(["bash", str(tiny.ROOT / "scripts" / script), *map(str, arguments)], check=True)
    metrics = sorted(
        (arguments[-1] / "model").glob("metrics-*.json"), key=lambda p: p.stat().st_mtime
    )
    return json.loads(metrics[-1].read_text())


@pytest.mark.slow
def test_demo_learns(tmp_path):
    found = figures("demo.sh", tmp_path)
    assert found["AP"] >= 0.35 and found["AP50"] >= 0.60
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 9


@pytest.mark.slow
def test_sixteen_coco_images_are_learned_by_heart(tmp_path, shared):
    assert figures("overfit_coco.sh", "boxes", shared / "data/coco_mini", tmp_path)["AP"] >= 0.50


@pytest.mark.slow
def test_sixteen_coco_images_masks_are_learned_by_heart(tmp_path, shared):
    found = figures("overfit_coco.sh", "masks", shared / "data/coco_mini", tmp_path)
    assert found["mask_AP"] >= 0.35


@pytest.mark.slow
def test_mask_rcnn_learns(tmp_path):
    found = figures("smoke.sh", "masks", tmp_path)
    assert found["AP"] >= 0.30 and found["mask_AP"] >= 0.25


@pytest.mark.slow
def test_a_classifier_learns_small_differences(tmp_path):
    assert figures("smoke.sh", "classes", tmp_path)["top1"] >= 0.90
