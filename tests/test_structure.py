"""Rules of the code base: imports go one way, functions stay small, every recipe is complete."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import gin
import pytest
import tiny

from spinenet_tf import main, published

PACKAGE = tiny.ROOT / "spinenet_tf"
CONFIGS = tiny.ROOT / "gin_configs"
RECIPES = sorted([*CONFIGS.glob("table*/*.gin"), *CONFIGS.glob("section*/*.gin")])

# A module may import from its own and from earlier groups.
ORDER = [
    {"graphs", "our_graphs", "ablations", "specs", "published", "ops", "draw", "draw_graph"},
    {"models", "data"},
    {"tasks"},
    {"checkpoints"},
    {"train"},
    {"export", "tpu"},
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
KERAS_METHODS = {"build", "call", "compute_output_shape", "from_config", "get_config"}


def test_public_names_are_documented():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        assert not list(undocumented(path, tree.body))


def test_every_row_has_a_recipe_and_every_recipe_a_row():
    names = [row.recipe for row in published.ROWS if row.recipe]
    assert len(set(names)) == len(names)
    assert {str(p.relative_to(CONFIGS).with_suffix("")) for p in RECIPES} == set(names)


@pytest.mark.parametrize("row", [r for r in published.ROWS if r.recipe], ids=lambda r: r.recipe)
def test_a_recipes_header_states_its_row(row):
    text = (CONFIGS / f"{row.recipe}.gin").read_text()
    header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    header = " ".join(header.replace("#", " ").split())
    place = "Section 5.6" if row.table == "5.6" else f"Table {row.table},"
    assert place in header and f"gin_configs/{row.recipe}.gin" in header
    for figure in re.findall(r"\d+\.\d+", row.result):
        assert figure in header
    if row.parameters is not None:
        assert f"{row.parameters:g}" in header
    if row.multiply_adds is not None:
        assert f"{row.multiply_adds:g}" in header
    assert ("dagger" in header) == ("*" in row.model)
    assert "Not run here" in header


PROTOCOL_RECIPES = [p for p in RECIPES if re.search(r"_[abc]$", p.stem)]


@pytest.mark.parametrize("path", PROTOCOL_RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_detection_recipe_says_what_its_name_says(path):
    from spinenet_tf import modes
    from spinenet_tf.models.layers import Style
    from spinenet_tf.train.trainer import Training

    main.parse_gin([str(path)], [], None)
    size, pixels, protocol = path.stem.rsplit("_", 2)
    task, schedule, trainer, style = modes.make_task(), modes.Schedule(), Training(), Style()
    masks = path.parent.name == "table5"
    assert type(task).__name__ == ("InstanceSegmentation" if masks else "Detection")
    bound = gin.get_bindings(task.network)["size"]
    assert bound == (size.replace("damage_", "R0-SP53-"))
    assert task.image_size == int(pixels) and task.num_classes == 91
    large = size in ("143", "190", "R152-FPN")
    expected = (5 if size == "190" else 3) if masks else (4 if large else 3)
    assert task.anchors.size == expected and task.anchors.scales == (1 if masks else 3)
    assert schedule.epochs == {"a": 250, "b": 350, "c": 500}[protocol]
    assert (schedule.learning_rate, schedule.drops, schedule.warmup_epochs) == (0.28, (30, 10), 5)
    assert trainer.momentum == 0.9 and trainer.precision == "mixed_bfloat16" and trainer.clip == 0
    assert (style.momentum, style.synchronized, style.weight_decay) == (0.99, True, 4e-5)
    assert style.activation == ("swish" if protocol == "c" else "relu")
    assert style.stochastic_depth == (0.2 if protocol == "c" else 0.0)
    assert (style.dropblock_keep < 1) == (protocol == "a")
    widest = protocol == "c" and size in ("143", "190")
    assert task.scale == ((0.8, 1.2) if protocol == "a" else (0.1, 2.0) if widest else (0.5, 2.0))
    data = modes.scoped_data("train")
    assert (data.batch_size, data.canvas) == (256, 640)


@pytest.mark.parametrize(
    "path",
    [p for p in RECIPES if re.search("imagenet|inat", p.stem)],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_a_classification_recipe_says_what_its_name_says(path):
    from spinenet_tf import modes
    from spinenet_tf.models.layers import Style

    main.parse_gin([str(path)], [], None)
    size, data_set = path.stem.split("_", 1)
    task, schedule, style = modes.make_task(), modes.Schedule(), Style()
    assert gin.get_bindings("Classifier")["size"] == size
    assert task.num_classes == (1001 if data_set == "imagenet" else 5090)
    assert (task.image_size, schedule.epochs, schedule.kind) == (224, 200, "cosine")
    assert modes.scoped_data("train").batch_size == schedule.batch_size == 4096
    improved = path.parent.name == "table10"
    assert task.label_smoothing == (0.1 if improved else 0.0)
    assert style.activation == ("swish" if improved else "relu")
    assert (style.stochastic_depth > 0) == improved
