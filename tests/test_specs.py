"""The block table and its wiring, without TensorFlow."""

import collections
import subprocess
import sys

import pytest

from spinenet_tf import graphs, specs
from spinenet_tf.graphs import SPINENET_49, Block


def wire(rows, stem=SPINENET_49.stem):
    return graphs.wire(graphs.Graph(stem, tuple(rows)))


def test_spinenet_49_has_the_block_allocation_of_table_1():
    levels = collections.Counter(row.level for row in SPINENET_49.blocks)
    assert levels == {2: 1, 3: 2, 4: 4, 5: 4, 6: 2, 7: 2}
    assert [level for level, _ in SPINENET_49.stem] == [2, 2]


def test_wiring_of_spinenet_49():
    nodes = graphs.wire(SPINENET_49)
    assert [n.index for n in nodes] == list(range(17))
    # Block 11 feeds nothing: output block 14 (P5) takes it in, as Figure 4(d) draws it.
    assert {n.index: n.adopted for n in nodes if n.adopted} == {14: (11,)}
    assert {n.level: n.index for n in nodes if n.is_output} == {3: 13, 4: 12, 5: 14, 6: 16, 7: 15}
    assert all(p < n.index for n in nodes for p in n.parents)


def test_an_adopted_block_needs_the_same_channels():
    rows = list(SPINENET_49.blocks)
    rows[9] = rows[9]._replace(kind="residual")  # block 11: 256 channels, P5's block has 1024
    with pytest.raises(ValueError, match=r"blocks \[11\] feed no later block"):
        wire(rows)


def test_the_second_stem_block_may_go_unused_but_is_then_adopted_or_refused():
    rows = [Block(3, "bottleneck", (0, 0), True)]
    with pytest.raises(ValueError, match=r"blocks \[1\]"):
        wire(rows)
    rows = [Block(2, "bottleneck", (0, 0), True)]
    assert wire(rows)[2].adopted == (1,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((9, "bottleneck", (0, 1), True), "level 9"),
        ((3, "mystery", (0, 1), True), "kind 'mystery'"),
        ((3, "bottleneck", (0, 2), True), "parents"),
        ((3, "bottleneck", (-1, 1), True), "parents"),
        ((3, "bottleneck", (), True), "parents"),
        ((3, "bottleneck", (0, 1), False), "feed no later block"),
        ((3, "bottleneck"), "block row"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        wire([row])


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        ([(9, "bottleneck"), (9, "bottleneck")], r"stem block 0 .*level 9"),
        ([(2, "bottlneck"), (2, "bottleneck")], r"stem block 0 .*kind 'bottlneck'"),
        ([(3, "bottleneck"), (2, "bottleneck")], r"stem block 1 .*at the higher level 3"),
    ],
)
def test_bad_stems_are_named(stem, message):
    with pytest.raises(ValueError, match=message):
        wire([Block(3, "bottleneck", (0, 1), True)], tuple(stem))


def test_two_outputs_of_one_level_are_refused():
    row = (3, "bottleneck", (0, 1), True)
    with pytest.raises(ValueError, match="already is an output block at level 3"):
        wire([row, row])


def test_widths_are_truncated_as_in_the_released_checkpoints():
    assert [specs.filters(level, 0.65) for level in (2, 3, 4, 7)] == [41, 83, 166, 166]
    assert [specs.filters(level, 1.3) for level in (2, 3, 4, 7)] == [83, 166, 332, 332]


def test_specs_imports_no_tensorflow():
    code = (
        "import sys; sys.modules['spinenet_tf'] = type(sys)('spinenet_tf');"
        f"sys.modules['spinenet_tf'].__path__ = {list(__import__('spinenet_tf').__path__)!r};"
        "import spinenet_tf.specs; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
