"""Pictures of scale-permuted networks, as the paper's Figures 3 and 4."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spinenet_tf.graphs import Graph, Node, wire

SUFFIXES = (".png", ".svg")
WIDTH, HEIGHT = 0.60, 0.50  # of a block; blocks are 1 apart in the order
ROW = 1.15  # between levels
INCH = 0.72  # of one unit on paper
MARGIN = 0.09  # arrows stay so far off blocks they do not join, where they can
LABEL = 0.30  # height of an output's name above its block
CELL = 0.05  # side of a square of the plan
BOWS = np.arange(-2.4, 2.41, 0.4)  # how far up a curve may be pulled at its two ends
PULLS = np.array([0.05, 0.3, 0.5, 0.8, 1.1])  # how far inwards, as a share of its width
FILLS = ("#ccebc5", "#a8ddb5", "#fed9a6", "#fdcdac", "#decbe4", "#b3cde3", "#8fb8de")  # by level
LINES = ("#2b8a3e", "#1b7837", "#b8860b", "#d2601a", "#8e44ad", "#2c7fb8", "#08519c")
STEM, RED, GREY = "#d0d0d0", "#d7191c", "#555555"


class Edge(NamedTuple):
    """A connection to draw: from node `parent` to place `port` of `ports` on node `child`."""

    parent: Node
    child: Node
    port: int
    ports: int
    adopted: bool


def draw_graph(graph: Graph, path: str | Path, *, title: str = "", repeats: int = 1) -> None:
    """Draws a scale-permuted network to a file.

    Order runs to the right, level upwards. A connection has the colour of its parent's level.

    Args:
      path: of a .png or .svg file; overwritten.
      repeats: blocks in a row per node (section 3.4); written on every block if above 1.

    Raises:
      ValueError: another suffix, repeats below 1, or a bad graph (see `graphs.wire`).
    """
    from matplotlib import rc_context  # only who draws graphs waits for it
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path={str(path)!r}: suffix {path.suffix!r} is not one of {SUFFIXES}")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is below 1")
    nodes = wire(graph)
    # Text stays text in SVG, and the same graph gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spinenet"}):
        figure = Figure(layout="constrained")
        axes = _axes(figure, nodes, title)
        _draw_edges(axes, nodes, len(graph.stem))
        for node in nodes:
            _draw_node(axes, node, node.index < len(graph.stem), repeats)
        _legend(figure, nodes, repeats)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)


def _centre(node: Node) -> np.ndarray:
    return np.array([node.index, node.level * ROW])


def _frame(nodes: Sequence[Node]) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of the picture."""
    levels = [n.level for n in nodes]
    low = np.array([-0.8, (min(levels) - 0.6) * ROW])
    return low, np.array([len(nodes) - 0.2, (max(levels) + 0.75) * ROW])


def _axes(figure, nodes: Sequence[Node], title: str):
    """Axes with a line per level, one unit as long across as up."""
    levels = range(min(n.level for n in nodes), max(n.level for n in nodes) + 1)
    (left, bottom), (right, top) = _frame(nodes)
    figure.set_size_inches((right - left) * INCH + 1, (top - bottom) * INCH + 1)
    axes = figure.add_subplot(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.set_title(title)
    axes.hlines([n * ROW for n in levels], left, right, colors="#eeeeee", zorder=0)
    labels = [f"L{n}  1/{2**n}" for n in levels]
    axes.set_yticks([n * ROW for n in levels], labels, fontsize=11)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes


def _edges(nodes: Sequence[Node], stem: int) -> list[Edge]:
    """All connections, the shortest first; those into a block are in the order of the
    direction they come from, from below to from above."""
    edges = [Edge(nodes[i], nodes[i + 1], 0, 1, False) for i in range(stem - 1)]
    for child in nodes[stem:]:
        into = [(nodes[p], False) for p in child.parents] + [
            (nodes[p], True) for p in child.adopted
        ]
        into.sort(key=lambda item: _direction(item[0], child))
        edges += [Edge(p, child, i, len(into), adopted) for i, (p, adopted) in enumerate(into)]
    return sorted(edges, key=lambda e: e.child.index - e.parent.index)


def _direction(parent: Node, child: Node) -> tuple[float, int, int]:
    """Sorts arrows into a block from below to from above; of those along its level, far ones go
    over near ones."""
    distance = child.index - parent.index
    return (parent.level - child.level) / distance, parent.level, distance


def _draw_edges(axes, nodes: Sequence[Node], stem: int) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    plan = Plan(*_frame(nodes))
    for edge in _edges(nodes, stem):
        corners = _route(edge, nodes, plan)
        curve = Curve(corners, [Curve.MOVETO] + [Curve.CURVE4] * 3)
        arrow = FancyArrowPatch(
            path=curve, arrowstyle="-|>", mutation_scale=9, linewidth=1.3, zorder=1,
            color=LINES[edge.parent.level - 1], linestyle=(0, (4, 3)) if edge.adopted else "-",
            shrinkA=0, shrinkB=0,
        )  # fmt: skip
        axes.add_patch(arrow)


class Plan:
    """The picture in small squares, for arrows to find where they are in the way of nothing."""

    def __init__(self, low: np.ndarray, high: np.ndarray):
        """low, high: [2] corners of the picture."""
        self.low, self.size = low, np.ceil((high - low) / CELL).astype(int)
        self.arrows = np.zeros(self.size)

    def cells(self, points: np.ndarray) -> tuple[np.ndarray, ...]:
        """Where [..., 2] points are; those outside are on the border."""
        places = ((points - self.low) / CELL).astype(int).clip(0, self.size - 1)
        return places[..., 0], places[..., 1]

    def cost(self, nodes: Sequence[Node]) -> np.ndarray:
        """What a point of an arrow costs: 10 on border, blocks and labels, 0.1 on other arrows."""
        cost = self.arrows.copy()
        cost[[0, -1]] = cost[:, [0, -1]] = 10
        for node in nodes:
            half = np.array([WIDTH / 2, HEIGHT / 2]) + MARGIN
            low, high = _centre(node) - half, _centre(node) + half + [0, LABEL * node.is_output]
            (x0, x1), (y0, y1) = self.cells(np.stack([low, high]))
            cost[x0 : x1 + 1, y0 : y1 + 1] = 10
        return cost


def _route(edge: Edge, nodes: Sequence[Node], plan: Plan) -> np.ndarray:
    """[4, 2] corners of the Bezier curve that meets fewest blocks, then fewest arrows, then bends
    least; it is then on the plan."""
    start, end = _centre(edge.parent) + [WIDTH / 2, 0], _port(edge)
    bows, pulls = np.meshgrid(BOWS, BOWS), np.meshgrid(PULLS, PULLS)
    bows, pulls = np.stack(bows, -1).reshape(-1, 1, 2), np.stack(pulls, -1).reshape(1, -1, 2)
    bows, pulls = (a.reshape(-1, 2) for a in np.broadcast_arrays(bows, pulls))  # [curves, 2]
    corners = np.tile(np.stack([start, start, end, end]), (len(bows), 1, 1))
    corners[:, 1:3, 0] += np.maximum((end - start)[0] * pulls, 0.25) * [1, -1]
    corners[:, 1:3, 1] += bows
    points = _bezier(corners)
    others = [n for n in nodes if n not in (edge.parent, edge.child)]
    costs = plan.cost(others)[plan.cells(points)].sum(1)
    costs += np.linalg.norm(np.diff(points, axis=1), axis=2).sum(1)  # length
    costs += abs(bows) @ [0.1, 0.3] + 0.15 * abs(bows[:, 0] - bows[:, 1])
    costs += 0.4 * abs(pulls - 0.5).sum(1)
    best = costs.argmin()
    plan.arrows[plan.cells(points[best, 6:-6])] = 0.1
    return corners[best]


def _port(edge: Edge) -> np.ndarray:
    """Where an arrow meets the left side of its block."""
    spread = HEIGHT * 0.62 * ((edge.port + 0.5) / edge.ports - 0.5)
    narrow = abs(spread) / (HEIGHT / 2) if edge.child.kind == "residual" else 0  # a diamond
    return _centre(edge.child) + [-WIDTH / 2 * (1 - narrow), spread]


def _bezier(corners: np.ndarray) -> np.ndarray:
    """[curves, 60, 2] points of cubic Bezier curves of [curves, 4, 2] corners."""
    t = np.linspace(0, 1, 60)[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    return weights @ corners


def _draw_node(axes, node: Node, in_stem: bool, repeats: int) -> None:
    x, y = _centre(node)
    fill = STEM if in_stem else FILLS[node.level - 1]
    line = dict(edgecolor=RED, linewidth=2.2) if node.is_output else dict(edgecolor=GREY)
    axes.add_patch(_shape(node.kind, x, y, facecolor=fill, zorder=3, **line))
    text = dict(ha="center", va="center", zorder=4)
    axes.text(x, y + (0.07 if repeats > 1 else 0), str(node.index), fontsize=11, **text)
    if repeats > 1:
        axes.text(x, y - 0.13, f"×{repeats}", fontsize=7, **text)
    if node.is_output:
        label = dict(color=RED, fontsize=11, fontweight="bold")
        axes.text(x, y + HEIGHT / 2 + LABEL / 2, f"P{node.level}", **label, **text)


def _shape(kind: str, x: float, y: float, **style):
    """The outline of a block: a rectangle, a diamond or a rounded box."""
    from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

    left, bottom = x - WIDTH / 2, y - HEIGHT / 2
    if kind == "residual":
        corners = [(left, y), (x, bottom), (x + WIDTH / 2, y), (x, y + HEIGHT / 2)]
        return Polygon(corners, closed=True, **style)
    if kind == "mbconv":
        rounded = "round,pad=0,rounding_size=0.22"
        return FancyBboxPatch((left, bottom), WIDTH, HEIGHT, boxstyle=rounded, **style)
    return Rectangle((left, bottom), WIDTH, HEIGHT, **style)


def _legend(figure, nodes: Sequence[Node], repeats: int) -> None:
    """Below the picture: what is in it."""
    from matplotlib.lines import Line2D

    markers = {"bottleneck": "s", "residual": "D", "mbconv": "o"}
    mark = dict(linestyle="none", markersize=10, markeredgecolor=GREY)
    entries = [
        Line2D([], [], marker=markers[kind], markerfacecolor="white", label=kind, **mark)
        for kind in sorted({n.kind for n in nodes})
    ]
    entries.append(Line2D([], [], marker="s", markerfacecolor=STEM, label="stem", **mark))
    mark |= dict(markeredgecolor=RED, markeredgewidth=2)
    entries.append(Line2D([], [], marker="s", markerfacecolor="white", label="output", **mark))
    entries.append(Line2D([], [], color=GREY, label="parent"))
    if any(n.adopted for n in nodes):
        entries.append(Line2D([], [], color=GREY, linestyle=(0, (4, 3)), label="merged"))
    if repeats > 1:
        repeated = f"×{repeats}: {repeats} blocks in a row"
        entries.append(Line2D([], [], linestyle="none", label=repeated))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
