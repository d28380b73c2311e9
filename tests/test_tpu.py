"""The TPU compiler's estimates: what is summed, what is priced by bytes, what fits."""

import importlib.util
import json
import subprocess

import gin
import pytest
import tensorflow as tf
import tiny
from absl import flags
from absl.testing import flagsaver

from spinenet_tf import main, modes
from spinenet_tf.data.pipeline import Data, batch_spec, train_batches
from spinenet_tf.tasks.instances import InstanceSegmentation
from spinenet_tf.tpu import chips, compiler, cost, programs, report

V3 = chips.CHIPS["v3"]
needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="pip install 'spinenet_tf[tpu]'"
)

PROGRAM = """HloModule step, is_scheduled=true

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %twice = f32[8,128]{1,0:T(8,128)} add(%x, %x), backend_config={"estimated_cycles":"94000"}
  ROOT %next = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%i, %twice)
}

%condition (state: (s32[], f32[8,128], s32[])) -> pred[] {
  %state.1 = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n = s32[] get-tuple-element(%state.1), index=2
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

%unknown (state: (s32[], f32[8,128], s32[])) -> pred[] {
  %state.2 = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %flag = pred[] get-tuple-element(%state.2), index=0
  ROOT %not = pred[] not(%flag)
}

ENTRY %main (image: f32[8,128]) -> f32[8,128] {
  %image = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="XLA_Args"}
  %five = s32[] constant(5)
  %zero = s32[] constant(0)
  %conv = f32[8,128]{1,0:T(8,128)} fusion(%image), kind=kOutput, calls=%f, metadata={op_name="net/stem_conv_1/convolution"}, backend_config={"estimated_cycles":"940000"}
  %grad = f32[8,128]{1,0:T(8,128)} fusion(%conv), kind=kOutput, calls=%f, metadata={op_name="gradient_tape/net/stem_conv_1/convolution/Conv2DBackpropFilter"}, backend_config={"estimated_cycles":"470000"}
  %moved = f32[8,128]{0,1:T(8,128)} copy(%conv)
  %ahead = f32[8,128]{1,0:T(8,128)} copy-done(%conv)
  %start = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%zero, %conv, /*index=2*/%five)
  %loop = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) while(%start), condition=%condition, body=%body
  %search = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) while(%start), condition=%unknown, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_what_is_executed_is_summed_as_often_as_it_is():
    costs = cost.cost(cost.parse(PROGRAM), V3)
    # 940 MHz: 1 ms and 0.5 ms, five rounds of 0.1 ms, and one of the loop of unknown length.
    assert costs.estimated == pytest.approx(1 + 0.5 + 5 * 0.1 + 0.1)
    assert costs.unbounded == 1
    of_conditions = 5 * (4 + 4 + 1) + (1 + 1)  # compare, not: pred and scalars, by bytes
    read, written = 8 * 128 * 4, 128 * 128 * 4  # its 8 rows become lanes, of which there are 128
    assert costs.copied * 450e6 == pytest.approx(read + written + of_conditions)
    assert costs.hidden * 450e6 == pytest.approx(2 * 8 * 128 * 4)
    assert costs.by_layer["stem_conv"] == pytest.approx(1)
    assert costs.by_layer["stem_conv backward"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no ENTRY"):
        cost.parse("HloModule x")


def test_a_loop_until_something_is_found_is_bounded_by_its_counter():
    text = PROGRAM.replace(
        "  ROOT %less = pred[] compare(%i.1, %n), direction=LT\n",
        """  %hundred = s32[] constant(100)
  %found = s32[] reduce(%state.1), dimensions={0}, to_apply=%min
  %few = pred[] compare(%found, %hundred), direction=LT
  %more = pred[] compare(%i.1, %n), direction=LT
  ROOT %less = pred[] and(%few, %more)
""",
    )
    assert cost.cost(cost.parse(text), V3).estimated == pytest.approx(1 + 0.5 + 5 * 0.1 + 0.1)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("f32[]{:T(256)}", 4),
        ("bf16[8,80,80,256]{3,0,2,1:T(8,128)(2,1)}", 8 * 80 * 80 * 256 * 2),
        ("bf16[2,80,80,32]{3,0,2,1:T(4,128)(2,1)}", 4 * 80 * 80 * 128 * 2),  # 2 -> 4, 32 -> 128
        ("(f32[3,5]{1,0}, pred[7]{0:T(1024)})", 60 + 1024),
        ("f32[8,100,4]{1,0,2:T(8,128)}", 8 * 128 * 4 * 4),
    ],
)
def test_memory_of_a_shape_is_that_of_whole_tiles(shape, expected):
    assert cost.padded_bytes(shape) == expected


def test_operations_without_an_estimate_are_priced_by_what_they_move():
    text = """ENTRY %main (x: f32[8,1024]) -> f32[8,1024] {
  %x = f32[8,1024]{1,0:T(8,128)} parameter(0)
  %i = s32[] constant(0)
  %row = f32[8,128]{1,0:T(8,128)} constant(0)
  %put = f32[8,1024]{1,0:T(8,128)} dynamic-update-slice(%x, %row, %i, %i)
  %get = f32[8,128]{1,0:T(8,128)} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={8,128}
  ROOT %order = f32[8,1024]{1,0:T(8,128)} sort(%x), dimensions={1}, to_apply=%compare
}"""
    program = cost.parse(text)
    moved = {
        name: cost._moved(program.computations["main"][name], program.computations["main"])
        for name in ("put", "get", "order")
    }
    assert moved == {"put": 2 * 4096, "get": 2 * 4096, "order": 2 * 32768 * 55}  # 10 * 11 / 2


def test_slices_have_names():
    assert chips.find("v3") == ("v3", V3, 32)
    assert chips.find("v4-64")[2] == 32 and chips.find("v5litepod-16")[2] == 16
    for wrong, message in (
        ("v2", "none of"),
        ("v3-33", "have"),
        ("v4-4", "have"),
        ("v3-x", "none"),
    ):
        with pytest.raises(ValueError, match=message):
            chips.find(wrong)


@pytest.mark.parametrize("labels", ["boxes", "masks", "class"])
def test_the_spec_of_a_batch_is_that_of_the_input(labels, tmp_path):
    make = tiny.make_class_records if labels == "class" else tiny.make_records
    gin.parse_config(tiny.bindings(make(tmp_path)))
    data = modes.scoped_data("train")
    actual = train_batches(data, labels=labels).element_spec
    spec = batch_spec(data, data.batch_size, labels)
    assert actual.keys() == spec.keys()
    for name, part in spec.items():
        assert actual[name].is_compatible_with(part) and actual[name].dtype == part.dtype, name
        assert actual[name].shape == part.shape, name


@needs_compiler
def test_a_recipe_is_compiled_for_a_tpu(tmp_path, capsys):
    gin.parse_config([*tiny.BINDINGS, "Training.deterministic = False", "Data.batch_size = 64"])
    modes.tpu_compile(["v3-32"], str(tmp_path), as_json=True)
    train, predict = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    weights = modes.make_task().build().count_params() * 4
    for one in (train, predict):
        assert one["fits"] and one["batch"] == 2 and one["devices"] == 32
        assert one["estimated_ms"] > one["limit_ms"] > 0 and one["layers"]["stem"] > 0
        assert (tmp_path / f"{one['program']}_v3-32.txt").exists()
    canvases = 2 * 64 * 64 * 3
    assert train["memory"]["argument"] > 2 * weights * 0.95 + canvases  # with velocities
    assert train["memory"]["alias"] > 2 * weights * 0.95  # updated in place
    assert predict["memory"]["argument"] < train["memory"]["argument"] - 0.9 * weights
    assert predict["memory"]["alias"] == 0
    text = report.text(train)
    assert "train on v3, 2 images on each of 32 devices: fits" in text and "no run time" in text
    for one in (train, predict):
        _check_plan(one, tmp_path)


def _check_plan(one: dict, folder) -> None:
    """The memory is the compiled program's without its code but with constants; no time."""
    there = set(folder.iterdir())
    hlo = folder / f"{one['program']}_2.hlo"
    plan = report.compile_program(V3, hlo, folder / "plan", plan=True)
    code = one["memory"]["generated_code"] / 2**30
    assert plan["hbm_gib"] == pytest.approx(one["hbm_gib"] - code, abs=0.003)
    assert plan["fits"] and "estimated_ms" not in plan and "memory" not in plan
    text = report.text(_about(one) | plan)
    assert "fits\n" in text and "without machine code" in text
    assert set(folder.iterdir()) == there  # no dumps are left


def _about(one: dict) -> dict:
    return {name: one[name] for name in ("program", "tpu", "devices", "batch")}


def test_chips_with_as_many_images_a_device_share_a_program(monkeypatch, tmp_path):
    gin.parse_config([*tiny.BINDINGS, "Data.batch_size = 64"])
    lowered, compiled = [], []
    monkeypatch.setattr(report, "check_installed", lambda: None)

    def lower(function, task, trainer, data, schedule, batch, root):
        lowered.append(batch)
        return {"train": 3e9, "predict": 1e9}

    def compile_program(chip, hlo, output, plan):
        compiled.append((chip.topology, hlo.name, output.name, plan))
        return {"fits": True, "hbm_gib": 1.0, "seconds": 1.0}

    monkeypatch.setattr(report, "_in_a_process", lower)
    monkeypatch.setattr(report, "compile_program", compile_program)
    found = modes.tpu_compile(["v3-32", "v5e-64", "v4-64"], str(tmp_path), plan=True)
    assert lowered == [2, 1]
    assert compiled == [
        (topology, f"{program}_{batch}.hlo", f"{program}_{name}", True)
        for topology, batch, name in (
            ("v3:2x2", 2, "v3-32"), ("v5e:2x2", 1, "v5e-64"), ("v4:2x2x1", 2, "v4-64"),
        )
        for program in ("train", "predict")
    ]  # fmt: skip
    assert [one["tpu"] for one in found] == ["v3", "v3", "v5e", "v5e", "v4", "v4"]
    assert found[0]["limit_ms"] == pytest.approx(2 * 3e9 * 2 / 61.5e9)


@needs_compiler
def test_a_program_that_does_not_fit_says_so(tmp_path):
    hlo = programs.lower(
        lambda x: tf.sort(x) + tf.reverse(x, [0]), [tf.TensorSpec([8, 2**28], tf.float32)]
    )
    (tmp_path / "large.hlo").write_bytes(hlo)
    for plan in (True, False):
        figures = report.compile_program(V3, tmp_path / "large.hlo", tmp_path / "large", plan)
        assert not figures["fits"] and "hbm" in figures["error"].lower()
        about = {"program": "train", "tpu": "v3", "batch": 8, "devices": 32}
        assert "does not fit" in report.text(about | figures)


def test_a_plan_leaves_room_for_the_code(monkeypatch, tmp_path):
    line = json.dumps({"planned": 15.5 * 2**30, "seconds": 1.0})
    done = subprocess.CompletedProcess([], 0, stdout=line, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    for chip, fits in (("v3", False), ("v4", True)):
        path = tmp_path / "program"
        assert report.compile_program(chips.CHIPS[chip], path, path, plan=True)["fits"] == fits


def test_memory_is_read_from_the_compilers_report():
    text = """Memory Space: default (color=0)
Total bytes: 811226112 (773.65MiB)
  cumulative_size;       size
Memory Space: hbm (color=3)
Total bytes: 66991104 (63.89MiB)
"""
    assert compiler.planned_bytes(text) == 811226112
    with pytest.raises(ValueError, match="no report of memory usage: 'Memory"):
        compiler.planned_bytes(text.replace("default", "vmem"))


def test_a_killed_compiler_is_told_from_one_that_fails(monkeypatch, tmp_path):
    for status, message in ((-9, "killed by signal 9.*memory"), (1, "v3:2x2 failed: no such op")):
        done = subprocess.CompletedProcess([], status, stdout="", stderr="no such op")
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(RuntimeError, match=message):
            report.compile_program(V3, tmp_path / "program.hlo", tmp_path / "program")


@needs_compiler
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (tf.gather, [([2**18, 4], tf.float32), ([2**16], tf.int32)]),
        (
            tf.tensor_scatter_nd_add,
            [([2**18], tf.float32), ([2**16, 1], tf.int32), ([2**16], tf.float32)],
        ),
    ],
)
def test_programs_of_v6e_can_be_read(function, shapes, tmp_path):
    """Its SparseCore takes gathers and scatters over, by operations that jaxlib does not know."""
    specs = [tf.TensorSpec(*shape) for shape in shapes]
    hlo = programs.lower(lambda *tensors: function(*tensors), specs)
    (tmp_path / "program.hlo").write_bytes(hlo)
    path = tmp_path / "program"
    figures = report.compile_program(chips.CHIPS["v6e"], path.with_suffix(".hlo"), path)
    assert figures["fits"] and figures["estimated_ms"] > 0


def test_a_batch_must_divide_by_the_devices(monkeypatch):
    gin.parse_config([*tiny.BINDINGS, "Data.batch_size = 48"])
    monkeypatch.setattr(report, "check_installed", lambda: None)
    with pytest.raises(ValueError, match="batch_size=48 does not divide by the 32 devices"):
        modes.tpu_compile(["v3"])


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"spinenet_tf\[tpu\]"):
        report.check_installed()


def test_every_detection_recipe_names_a_batch_for_the_papers_hardware():
    """32 devices divide every global batch, so that --tpu_type=v3 needs no slice."""
    for path in sorted((tiny.ROOT / "gin_configs").glob("table*/*.gin")):
        gin.clear_config()
        main.parse_gin([str(path)], [], None)
        data = modes.scoped_data("train")
        assert data.batch_size % chips.DEFAULT == 0, path


@pytest.fixture(scope="module")
def tpu_report():
    path = tiny.ROOT / "scripts/tpu_report.py"
    spec = importlib.util.spec_from_file_location("tpu_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags.FLAGS.mark_as_parsed()
    yield module
    flags.FLAGS.unparse_flags()


def _rows(name: str, **figures) -> list[dict]:
    about = {"recipe": "r", "slice": name, "batch": 8, "date": "2026-11-27"}
    figures = {"fits": True, "hbm_gib": 2.5, "limit_ms": 3.0} | figures
    return [about | {"program": program} | figures for program in ("train", "predict")]


def _by_key(tpu_report, rows: list[dict]) -> dict:
    return {tpu_report.key(row): row for row in rows}


WHOLE = dict(memory={}, estimated_ms=1.0, copied_ms=0.5)


def test_the_report_goes_on_to_slices_that_fit(tpu_report, monkeypatch):
    sizes = {"v3": ["v3-32", "v3-64", "v3-128"], "v4": ["v4-64", "v4-128"]}
    monkeypatch.setattr(tpu_report, "slices", lambda recipe: sizes)
    asked = []

    def compiled(recipe, names):
        asked.append(names)
        no = {"fits": False, "error": "RESOURCE_EXHAUSTED"}
        return [row for name in names for row in _rows(name, **no if name == "v3-32" else {})]

    monkeypatch.setattr(tpu_report, "compiled", compiled)
    rows = _by_key(tpu_report, _rows("v4-64", **WHOLE))
    with flagsaver.flagsaver((tpu_report.PLANS, True)):
        list(tpu_report.add(rows, "r"))
    assert asked == [["v3-32"], ["v3-64"]]  # v4-64 is known and fits
    assert [row["slice"] for row in rows.values()] == [
        n for n in ("v4-64", "v3-32", "v3-64") for _ in "ab"
    ]
    whole, no, plan = list(rows.values())[::2]
    assert [tpu_report.is_plan(row) for row in (whole, no, plan)] == [False, False, True]
    assert tpu_report.row_of(whole).endswith("| yes | 2.50 | 1.5 | 3.0 | 2026-11-27 |")
    assert tpu_report.row_of(no).endswith("| no |  |  |  | 2026-11-27 |")
    assert tpu_report.row_of(plan).endswith("| yes | 2.50 |  | 3.0 | 2026-11-27 |")


def test_a_compiled_program_takes_the_place_of_its_plan_and_not_the_other_way(
    tpu_report, monkeypatch
):
    monkeypatch.setattr(tpu_report, "slices", lambda recipe: {"v3": ["v3-32"]})
    plans, whole = _rows("v3-32"), _rows("v3-32", **WHOLE)
    for there, plan, made, expected in (
        (plans, False, whole, whole),
        (plans, True, None, plans),  # nothing is made
        (whole[:1], True, plans, [whole[0], plans[1]]),
        ([whole[0], plans[1]], False, whole, whole),
    ):
        monkeypatch.setattr(tpu_report, "compiled", lambda recipe, names, made=made: iter(made))
        rows = _by_key(tpu_report, there)
        with flagsaver.flagsaver((tpu_report.PLANS, plan)):
            list(tpu_report.add(rows, "r"))
        assert list(rows.values()) == expected


def test_slices_of_a_recipe_hold_its_batch(tpu_report):
    found = tpu_report.slices("table2/49_640_c")
    assert found["v3"][:2] == ["v3-32", "v3-64"] and found["v4"][0] == "v4-64"
    assert tpu_report.slices("table6/49_imagenet")["v6e"][0] == "v6e-32"  # 16 times as many
    assert tpu_report.slices("table2/49_896_b")["v3"][0] == "v3-64"  # larger images, fewer of them
    assert tpu_report.slices("table5/96_1024_b")["v5e"][0] == "v5e-64"
    assert tpu_report.slices("table2/190_1280_c")["v4"][0] == "v4-256"
    assert tpu_report.slices("table5/190_1536_c")["v3"][0] == "v3-256"


def test_multiply_adds_of_a_mask_rcnn_are_those_of_the_regions_it_looks_at():
    def adds(*extra):
        gin.clear_config()
        gin.parse_config([*tiny.BINDINGS, *extra])
        return report.multiply_adds(InstanceSegmentation(), Data())

    plain = adds()
    for name in ("region_samples = 32", "mask_samples = 8"):
        more = adds(f"InstanceSegmentation.{name}")
        assert more["train"] > plain["train"] and more["predict"] == plain["predict"]
    for name in ("proposals_after = 40", "max_detections = 200"):
        more = adds(f"InstanceSegmentation.{name}")
        assert more["train"] == plain["train"] and more["predict"] > plain["predict"]
