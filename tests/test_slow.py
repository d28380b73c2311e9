"""The two training runs whose figures README gives. 25 minutes on 2 cores: pytest -m slow."""

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
    assert figures("overfit_coco.sh", shared / "data/coco_mini", tmp_path)["AP"] >= 0.50
