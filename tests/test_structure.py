"""Rules of the code base: imports go one way, functions stay small, every recipe is complete."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import gin
import pytest
import tiny

from spinenet_tf import main

PACKAGE = tiny.ROOT / "spinenet_tf"
RECIPES = sorted((tiny.ROOT / "gin_configs").glob("table*/*.gin"))

# A module may import from its own and from earlier groups.
ORDER = [
    {"graphs", "specs", "ops", "draw"},
    {"models", "data"},
    {"tasks"},
    {"train"},
    {"export"},
    {"modes", "main"},
]
FORBIDDEN = {("models", "data"), ("data", "models"), ("specs", "ops"), ("ops", "specs")}


def group(module: str) -> int:
    return next(i for i, names in enumerate(ORDER) if module in names)


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("spinenet_tf") for alias in node.names), path
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spinenet_tf"):
            parts = node.module.split(".")
            yield from [parts[1]] if parts[1:] else [alias.name for alias in node.names]


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        source = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if source == "__init__":
            continue
        for target in imports(path):
            assert group(target) <= group(source), f"{path} imports {target}"
            assert (source, target) not in FORBIDDEN, f"{path} imports {target}"


def test_models_and_specs_do_not_import_tensorflow():
    code = "import sys, os; os.environ['KERAS_BACKEND']='jax'; import spinenet_tf.models.retinanet;"
    code += "assert 'tensorflow' not in sys.modules"
    pytest.importorskip("jax")
    subprocess.run([sys.executable, "-c", code], check=True)


def functions():
    for path in [*PACKAGE.rglob("*.py"), *(tiny.ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False)
                yield (
                    path,
                    node,
                    node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) if doc else 0),
                )


def test_functions_and_files_stay_small():
    sizes = sorted(size for _, _, size in functions())
    assert sizes[len(sizes) // 2] <= 10
    assert sizes[int(len(sizes) * 0.9)] <= 30
    assert sizes[-1] <= 60
    files = {p: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert max(files.values()) <= 350, files


def undocumented(path, body):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
            if not ast.get_docstring(node) and node.name not in KERAS_METHODS:
                yield f"{path}: {node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(path, node.body)


# Their meaning is Keras' own.
KERAS_METHODS = {"call", "compute_output_shape", "get_config"}


def test_public_names_are_documented():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        assert not list(undocumented(path, tree.body))


def test_table_2_and_3_recipes_are_all_there():
    rows = {p.stem for p in RECIPES if p.parent.name == "table2"}
    b = {"49S_640_b", "49_640_b", "49_896_b", "96_1024_b", "143_1280_b"}
    c = {"49S_640_c", "49_640_c", "49_896_c", "96_1024_c", "143_1280_c", "190_1280_c"}
    assert rows == b | c
    assert {p.stem for p in RECIPES if p.parent.name == "table3"} == {"49_640_a"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_what_its_header_and_name_say(path):
    from spinenet_tf import modes, specs
    from spinenet_tf.train.trainer import Training

    main.parse_gin([str(path)], [], None)
    size, pixels, protocol = path.stem.split("_")
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert re.search(rf"SpineNet-{size}\b.* {pixels} px, protocol {protocol.upper()}", header)
    assert "AP " in header and str(path.relative_to(tiny.ROOT)) in header
    task, schedule, trainer = modes.make_task(), modes.Schedule(), Training()
    assert task.image_size == int(pixels) and task.num_classes == 91
    assert gin.query_parameter("RetinaNet.size") == size and size in specs.SIZES
    assert task.anchors.size == (4 if size in ("143", "190") else 3)
    assert schedule.epochs == {"a": 250, "b": 350, "c": 500}[protocol]
    assert (schedule.learning_rate, schedule.drops, schedule.warmup_epochs) == (0.28, (30, 10), 5)
    assert trainer.momentum == 0.9 and trainer.precision == "mixed_bfloat16" and trainer.clip == 0
    assert gin.query_parameter("Style.activation") == ("swish" if protocol == "c" else "relu")
    assert gin.query_parameter("Style.stochastic_depth") == (0.2 if protocol == "c" else 0.0)
    widest = protocol == "c" and size in ("143", "190")
    assert task.scale == ((0.8, 1.2) if protocol == "a" else (0.1, 2.0) if widest else (0.5, 2.0))
    data = modes.scoped_data("train")
    assert (data.batch_size, data.canvas) == (256, 640)
