"""Pictures of graphs: both file types, and that nothing hides a block."""

import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from spinenet_tf import draw_graph as drawing
from spinenet_tf import graphs, our_graphs
from spinenet_tf.draw_graph import draw_graph
from spinenet_tf.graphs import Block, Graph

GRAPHS = [
    graphs.SPINENET_49,
    graphs.SPINENET_MOBILE,
    graphs.R0_SP53,
    graphs.R23_SP30,
    our_graphs.R35_SP18,
    our_graphs.FISH,
]


def texts(path):
    root = ElementTree.parse(path).getroot()
    return Counter("".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text"))


def test_png_is_a_picture_wider_than_high(tmp_path):
    draw_graph(graphs.SPINENET_49, tmp_path / "49.png")
    pixels = np.asarray(Image.open(tmp_path / "49.png").convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert 500 < height < width < 2500
    red = np.abs(pixels - [0xD7, 0x19, 0x1C]).sum(-1) < 30
    assert red.sum() > 1000 and red[: height // 2].any()
    assert 0.01 < (pixels.sum(-1) < 600).mean() < 0.3


@pytest.mark.parametrize("graph", GRAPHS)
def test_svg_names_every_node_and_output_once(graph, tmp_path):
    path = str(tmp_path / "graph.svg")
    draw_graph(graph, path, title="A <title> & more")
    found = texts(path)
    count = len(graph.stem) + len(graph.blocks)
    names = [str(i) for i in range(count)] + [f"P{n}" for n in range(3, 8)]
    assert [found[name] for name in names] == [1] * len(names)
    assert found[str(count)] == 0 and found["A <title> & more"] == 1
    assert {"L3  1/8", "L7  1/128"} <= set(found)
    assert ("L1  1/2" in found) == (graph is graphs.SPINENET_MOBILE)


def test_legend_holds_what_the_picture_does(tmp_path):
    draw_graph(graphs.SPINENET_49, tmp_path / "a.svg")
    draw_graph(graphs.R23_SP30, tmp_path / "b.svg")
    words = {"bottleneck", "residual", "mbconv", "stem", "output", "parent", "merged"}
    assert words & set(texts(tmp_path / "a.svg")) == words - {"mbconv"}
    assert words & set(texts(tmp_path / "b.svg")) == words - {"mbconv", "residual", "merged"}


def test_repeats_are_written_on_every_block(tmp_path):
    draw_graph(graphs.SPINENET_49, tmp_path / "190.svg", repeats=4)
    found = texts(tmp_path / "190.svg")
    assert found["×4"] == 17 and found["16"] == 1 and found["×4: 4 blocks in a row"] == 1


def test_the_same_graph_gives_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw_graph(graphs.R0_SP53, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_small_and_odd_graphs(tmp_path):
    """One block, one level, one parent twice; an upper-case suffix."""
    b = "bottleneck"
    draw_graph(Graph(((3, b),), (Block(3, b, (0,), True),)), tmp_path / "one.PNG")
    draw_graph(Graph(((2, b),), (Block(3, b, (0, 0), True),)), tmp_path / "twice.svg")
    assert texts(tmp_path / "twice.svg")["P3"] == 1
    assert Image.open(tmp_path / "one.PNG").size[0] > 100


def test_bad_arguments_are_named(tmp_path):
    for name, suffix in (("graph.pdf", ".pdf"), ("graph", "")):
        with pytest.raises(ValueError, match=f"suffix '{suffix}'"):
            draw_graph(graphs.SPINENET_49, tmp_path / name)
    with pytest.raises(ValueError, match="repeats=0"):
        draw_graph(graphs.SPINENET_49, tmp_path / "a.png", repeats=0)
    with pytest.raises(ValueError, match="parents"):
        draw_graph(Graph((), (Block(3, "bottleneck", (5, 6), True),)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("graph", [*GRAPHS, our_graphs.R14_SP39, our_graphs.HOURGLASS])
def test_no_arrow_passes_a_block_it_does_not_join(graph):
    nodes = graphs.wire(graph)
    plan = drawing.Plan(*drawing._frame(nodes))
    edges = drawing._edges(nodes, len(graph.stem))
    rows = graph.blocks
    adopted = sum(len(n.adopted) for n in nodes)
    assert len(edges) == len(graph.stem) - 1 + sum(len(r.parents) for r in rows) + adopted
    for edge in edges:
        curve = drawing._bezier(drawing._route(edge, nodes, plan)[None])[0]
        for node in nodes:
            if node.index not in (edge.parent.index, edge.child.index):
                apart = np.abs(curve - [node.index, node.level * drawing.ROW])
                hit = (apart < [drawing.WIDTH / 2, drawing.HEIGHT / 2]).all(-1)
                assert not hit.any(), (edge.parent.index, edge.child.index, node.index)
