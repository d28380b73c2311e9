"""Graph damage (Table 8), search-space rules, and the graphs whose connections are ours."""

import collections

import pytest

from spinenet_tf import RetinaNet, SpineNet, ablations, graphs, our_graphs
from spinenet_tf.graphs import Block, Graph
from spinenet_tf.models.count import count

PAPERS = ("SPINENET_49", "SPINENET_MOBILE", "R0_SP53", "R23_SP30")
OURS = ("R35_SP18", "R14_SP39", "HOURGLASS", "FISH")
ALL = {name: getattr(graphs, name) for name in PAPERS} | {
    name: getattr(our_graphs, name) for name in OURS
}
B = "bottleneck"

# Table 1: blocks per level, L2 to L5 of the stem and L2 to L7 after it.
TABLE_1 = [
    ("R35_SP18", (2, 3, 5, 1), (1, 1, 1, 1, 1, 1)),
    ("R23_SP30", (2, 2, 2, 1), (1, 2, 4, 1, 1, 1)),
    ("R14_SP39", (1, 1, 1, 1), (2, 3, 5, 1, 1, 1)),
    ("R0_SP53", (2, 0, 0, 0), (1, 4, 6, 2, 1, 1)),
    ("HOURGLASS", (2, 0, 0, 0), (1, 4, 6, 2, 1, 1)),
    ("FISH", (2, 0, 0, 0), (1, 4, 6, 2, 1, 1)),
    ("SPINENET_49", (2, 0, 0, 0), (1, 2, 4, 4, 2, 2)),
]


@pytest.mark.parametrize(("name", "stem", "permuted"), TABLE_1)
def test_block_allocation_of_table_1(name, stem, permuted):
    in_stem = collections.Counter(level for level, _ in ALL[name].stem)
    after = collections.Counter(row.level for row in ALL[name].blocks)
    assert tuple(in_stem[level] for level in range(2, 6)) == stem
    assert tuple(after[level] for level in range(2, 8)) == permuted
    assert sum(in_stem.values()) + sum(after.values()) == 17


# Table 7, written out.
TABLE_7 = {
    "HOURGLASS": [2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 7, 6, 5, 4, 3],
    "FISH": [2, 2, 3, 3, 4, 4, 4, 5, 4, 4, 3, 2, 3, 4, 5, 6, 7],
}


@pytest.mark.parametrize("name", TABLE_7)
def test_order_of_table_7(name):
    nodes = graphs.wire(ALL[name])
    assert [n.level for n in nodes] == TABLE_7[name]
    assert {n.kind for n in nodes} == {B}
    assert [n.index for n in nodes if n.is_output] == [12, 13, 14, 15, 16]


def test_connections_of_ours_by_hand():
    """The block before, and the latest of the nearest level: in the last 5, or for outputs any."""
    fish = [row.parents for row in our_graphs.FISH.blocks]
    assert fish == [
        (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (6, 8), (8, 9), (9, 10),
        (10, 11), (9, 12), (7, 13), (7, 14), (14, 15),
    ]  # fmt: skip
    # Node 11 (L2) sees nodes 6 to 9 (L4) besides 10, not the L2 blocks of the stem.
    assert our_graphs.R35_SP18.blocks[0] == Block(2, B, (9, 10))
    assert our_graphs.R35_SP18.blocks[1] == Block(3, B, (4, 11), True)


@pytest.mark.parametrize("name", OURS)
def test_no_block_of_ours_needs_adoption(name):
    assert not any(n.adopted for n in graphs.wire(ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_all_graphs_obey_the_search_space(name):
    ablations.check_search_space(ALL[name])


def replaced(at, **fields):
    rows = list(graphs.R0_SP53.blocks)
    rows[at - 2] = rows[at - 2]._replace(**fields)
    return Graph(graphs.R0_SP53.stem, tuple(rows))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (replaced(9, parents=(8,)), r"block 9 .*two different"),
        (replaced(9, parents=(8, 8)), r"block 9 .*two different"),
        (replaced(9, parents=(8, 9)), r"block 9 .*nodes 0 to 8"),
        (replaced(9, parents=(3, 8)), r"block 9 .*last 5"),
        (replaced(12, is_output=False, parents=(9, 10)), r"levels \[4, 5, 6, 7\]"),
        (replaced(13, is_output=False), r"block 13 .*after an output"),
        (replaced(12, level=2), r"block 12 .*level must be"),
        (replaced(12, level=4), r"levels \[4, 4, 5, 6, 7\]"),
    ],
)
def test_a_broken_rule_names_the_row(graph, message):
    with pytest.raises(ValueError, match=message):
        ablations.check_search_space(graph)


def test_the_window_reaches_five_nodes_back_and_not_for_outputs():
    ablations.check_search_space(replaced(9, parents=(4, 8)))
    ablations.check_search_space(replaced(9, parents=(3, 8)), window=6)
    ablations.check_search_space(replaced(15, parents=(0, 1)))
    with pytest.raises(ValueError, match="block 2 .*last 1 nodes"):
        ablations.check_search_space(replaced(2, parents=(0, 1)), window=1)


def parents(graph):
    return {n.index: (n.level, *n.parents) for n in graphs.wire(graph) if n.parents}


def test_removing_short_connections_of_r0_sp53():
    """Nothing uses stem block 1 then, so that 2 is 1, 3 is 2, ...; L4 blocks feed only P4's."""
    damaged = ablations.damage(graphs.R0_SP53, "short")
    assert damaged.stem == ((2, B),)
    assert parents(damaged) == {
        1: (2, 0), 2: (3, 0), 3: (3, 1), 4: (4, 1), 5: (4, 2), 6: (3, 4), 7: (5, 3), 8: (4, 3),
        9: (4, 7), 10: (4, 7), 11: (3, 3), 12: (4, 5), 13: (5, 7), 14: (7, 5), 15: (6, 6),
    }  # fmt: skip
    assert graphs.wire(damaged)[12].adopted == (8, 9, 10)


def test_removing_long_connections_of_r0_sp53():
    """Only block 2 (L2) reaches no output: 3 is 2, 4 is 3, ..."""
    damaged = ablations.damage(graphs.R0_SP53, "long")
    assert damaged.stem == graphs.R0_SP53.stem
    assert parents(damaged) == {
        2: (3, 1), 3: (3, 2), 4: (4, 3), 5: (4, 4), 6: (3, 5), 7: (5, 6), 8: (4, 7), 9: (4, 8),
        10: (4, 9), 11: (3, 9), 12: (4, 6), 13: (5, 12), 14: (7, 8), 15: (6, 8),
    }  # fmt: skip
    assert graphs.wire(damaged)[12].adopted == (10,)


@pytest.mark.parametrize("name", ALL)
def test_removing_both_gives_a_chain_of_all_blocks(name):
    damaged, graph = ablations.damage(ALL[name], "both"), ALL[name]
    assert damaged.stem == graph.stem
    assert [r._replace(parents=()) for r in damaged.blocks] == [
        r._replace(parents=()) for r in graph.blocks
    ]
    nodes = graphs.wire(damaged)
    assert all(n.parents == (n.index - 1,) for n in nodes[len(graph.stem) :])
    assert not any(n.adopted for n in nodes)


@pytest.mark.parametrize("remove", ablations.DAMAGES)
@pytest.mark.parametrize("name", ALL)
def test_any_graph_survives_any_damage(name, remove):
    nodes = graphs.wire(ablations.damage(ALL[name], remove))  # raises where a block is dead
    assert sorted(n.level for n in nodes if n.is_output) == [3, 4, 5, 6, 7]
    assert all(len(n.parents) <= 1 for n in nodes)


def test_pruning_repeats_and_keeps_what_an_output_adopts():
    stem = ((2, B), (2, B), (2, B))
    rows = (
        Block(2, B, (2, 2)),  # 3: feeds only 4, so it goes in the second round, 2 and 1 after it
        Block(2, B, (3, 0)),  # 4: feeds nothing, no L2 output: dead
        Block(3, B, (0, 0)),  # 5: feeds nothing, P3's adopts it
        Block(3, B, (0, 0), True),  # 6
        Block(4, B, (6, 0)),  # 7: feeds nothing, P4's adopts it
        Block(4, B, (6, 0), True),  # 8
        Block(4, B, (8, 6)),  # 9: P4's comes before it: dead
    )
    pruned = ablations.prune(Graph(stem, rows))
    assert pruned.stem == ((2, B),)
    assert parents(pruned) == {1: (3, 0, 0), 2: (3, 0, 0), 3: (4, 2, 0), 4: (4, 2, 0)}
    assert [n.adopted for n in graphs.wire(pruned)] == [(), (), (1,), (), (3,)]
    assert ablations.prune(pruned) == pruned


def test_pruning_minds_the_width_and_takes_plain_tuples():
    rows = ((3, "residual", (1, 1)), (3, B, (0, 1), True))  # 256 channels go not into 512
    damaged = ablations.damage(Graph(((2, B), (2, B)), rows), "long")
    assert damaged.blocks == (Block(3, B, (1,), True),)


def test_an_unknown_damage_is_refused():
    with pytest.raises(ValueError, match="remove='all'"):
        ablations.damage(graphs.R0_SP53, "all")


def assert_builds(model):
    shapes = {name: tuple(x.shape[1:]) for name, x in model.output.items()}
    assert shapes == {f"P{n}": (-(-128 // 2**n),) * 2 + (8,) for n in range(3, 8)}


TINY = dict(width=0.125, endpoints=8, input_shape=(128, 128, 3))


@pytest.mark.parametrize("name", OURS)
def test_graphs_of_ours_build(name):
    assert_builds(SpineNet("49", stem=ALL[name].stem, blocks=ALL[name].blocks, **TINY))


# Billions at 640 px in RetinaNet; published for learned connections (Table 3): 91.7 and 99.7.
@pytest.mark.parametrize(("name", "multiply_adds"), [("R35_SP18", 91.28), ("R14_SP39", 97.04)])
def test_multiply_adds_of_ours(name, multiply_adds):
    graph = ALL[name]
    backbone = SpineNet("49", stem=graph.stem, blocks=graph.blocks, input_shape=(640, 640, 3))
    counts = count(RetinaNet("49", backbone=backbone))
    assert counts.multiply_adds / 1e9 == pytest.approx(multiply_adds, rel=1e-4)


@pytest.mark.parametrize("remove", ablations.DAMAGES)
def test_damaged_networks_build(remove):
    damaged = ablations.damage(graphs.R0_SP53, remove)
    model = SpineNet("R0-SP53", stem=damaged.stem, blocks=damaged.blocks, **TINY)
    assert_builds(model)
    edges = [layer for layer in model._flatten_layers() if layer.name.endswith("_expand_conv")]
    assert len(edges) == {"short": 15, "long": 14, "both": 15}[remove]  # one a permuted block
