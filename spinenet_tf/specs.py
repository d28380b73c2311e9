"""The tables of the SpineNet paper as data, and `wire()`, which turns block rows into a graph.

Pure Python: the topology never depends on a tensor shape, so all input sizes give one network.
Paper: arXiv 1912.05027. Figure and table numbers below are the paper's.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """One row of a scale-permuted network (Figure 4)."""

    level: int  # the feature map is 1 / 2**level of the input
    kind: str  # 'bottleneck' or 'residual'
    parents: tuple[int, int]  # node numbers; the stem's blocks are the first nodes
    is_output: bool = False


class Scaling(NamedTuple):
    """How a SpineNet size grows out of SpineNet-49 (section 3.4)."""

    width: float  # multiplies every 3x3 convolution width, truncated
    alpha: float  # width of a resampling edge, relative to the parent's 3x3 convolution
    repeats: int  # blocks in a row per node
    endpoints: int  # channels of P3..P7


class DenseHead(NamedTuple):
    """RetinaNet's class and box subnets (section 4.1) and the pyramid width they sit on."""

    convs: int  # 3x3 convolutions before the prediction
    filters: int
    endpoints: int  # channels of P3..P7


class Node(NamedTuple):
    """A block in place: `wire()`'s answer for one row."""

    index: int
    level: int
    kind: str
    parents: tuple[int, ...]  # resampled, then summed
    adopted: tuple[int, ...]  # summed as they are: blocks that would otherwise feed nothing
    is_output: bool


# 3x3 convolution width of a block by level, SpineNet-49 (section 3.3: L5, L6 and L7 have 256).
WIDTHS = {1: 32, 2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}
EXPANSION = {"bottleneck": 4, "residual": 1}  # block output channels / 3x3 convolution width
STEM_FILTERS = 64  # the first 7x7 convolution; not scaled in any released checkpoint
OUTPUT_LEVELS = (3, 4, 5, 6, 7)

# The scale-decreased part before the permuted one (Table 1: two L2 blocks). Nodes 0 and 1.
STEM_49 = ((2, "bottleneck"), (2, "bottleneck"))

# Figure 4(d). Nodes 2 to 16.
SPINENET_49 = (
    Block(2, "bottleneck", (0, 1)),
    Block(4, "residual", (0, 1)),
    Block(3, "bottleneck", (2, 3)),
    Block(4, "bottleneck", (2, 4)),
    Block(6, "residual", (3, 5)),
    Block(4, "bottleneck", (3, 5)),
    Block(5, "residual", (6, 7)),
    Block(7, "residual", (6, 8)),
    Block(5, "bottleneck", (8, 9)),
    Block(5, "bottleneck", (8, 10)),
    Block(4, "bottleneck", (5, 10), True),
    Block(3, "bottleneck", (4, 10), True),
    Block(5, "bottleneck", (7, 12), True),
    Block(7, "bottleneck", (5, 14), True),
    Block(6, "bottleneck", (12, 14), True),
)

# Section 3.4. For 49S the paper's counts need 256 endpoints in RetinaNet (Table 2; see below) and
# 128 in Mask R-CNN (Table 5).
SIZES = {
    "49S": Scaling(width=0.65, alpha=0.5, repeats=1, endpoints=128),
    "49": Scaling(width=1.0, alpha=0.5, repeats=1, endpoints=256),
    "96": Scaling(width=1.0, alpha=0.5, repeats=2, endpoints=256),
    "143": Scaling(width=1.0, alpha=1.0, repeats=3, endpoints=256),
    "190": Scaling(width=1.3, alpha=1.0, repeats=4, endpoints=512),
}

# Section 4.1, RetinaNet subnets by size.
RETINANET_HEADS = {
    "49S": DenseHead(convs=4, filters=128, endpoints=256),
    "49": DenseHead(convs=4, filters=256, endpoints=256),
    "96": DenseHead(convs=4, filters=256, endpoints=256),
    "143": DenseHead(convs=4, filters=256, endpoints=256),
    "190": DenseHead(convs=7, filters=512, endpoints=512),
}


def filters(level: int, width: float) -> int:
    """3x3 convolution width of a block at `level`, scaled and truncated as in the paper's code."""
    return int(WIDTHS[level] * width)


def wire(blocks: Sequence[Block], stem: Sequence[tuple[int, str]] = STEM_49) -> tuple[Node, ...]:
    """Resolves block rows into nodes, stem first.

    An output block adopts every earlier block that feeds nothing and has its level and channels
    (section 3.3: such blocks connect "to the output block at the corresponding level").

    Raises:
      ValueError: a row names an unknown level or kind, a parent that is not an earlier node, or an
        output level twice; or a block reaches no output.
    """
    nodes = [Node(i, level, kind, (), (), False) for i, (level, kind) in enumerate(stem)]
    used = set(range(len(stem) - 1))  # the stem is a chain: all but its last block feed the next
    for row in map(_checked, blocks):
        index = len(nodes)
        _check_row(row, index, nodes)
        used.update(row.parents)
        adopted = tuple(n.index for n in nodes if row.is_output and _fits(n, row, used))
        used.update(adopted)
        nodes.append(Node(index, row.level, row.kind, tuple(row.parents), adopted, row.is_output))
    _check_reached(nodes, used)
    return tuple(nodes)


def _checked(row: Sequence) -> Block:
    try:
        return row if isinstance(row, Block) else Block(*row)
    except TypeError as error:
        raise ValueError(
            f"block row {row!r} is not (level, kind, (parent, parent), is_output)"
        ) from error


def _fits(node: Node, row: Block, used: set[int]) -> bool:
    same_width = (
        WIDTHS[node.level] * EXPANSION[node.kind] == WIDTHS[row.level] * EXPANSION[row.kind]
    )
    return node.index not in used and node.level == row.level and same_width


def _check_row(row: Block, index: int, nodes: Sequence[Node]) -> None:
    where = f"block {index} {tuple(row)}"
    if row.level not in WIDTHS:
        raise ValueError(f"{where}: level {row.level!r} is not one of {sorted(WIDTHS)}")
    if row.kind not in EXPANSION:
        raise ValueError(f"{where}: kind {row.kind!r} is not one of {sorted(EXPANSION)}")
    if not row.parents or any(not 0 <= p < index for p in row.parents):
        raise ValueError(f"{where}: parents {row.parents!r} must be nodes 0 to {index - 1}")
    if row.is_output and any(n.is_output and n.level == row.level for n in nodes):
        raise ValueError(f"{where}: there already is an output block at level {row.level}")


def _check_reached(nodes: Sequence[Node], used: set[int]) -> None:
    dead = [n.index for n in nodes if n.index not in used and not n.is_output]
    if dead:
        raise ValueError(
            f"blocks {dead} feed no later block, and no output block has their level and channels"
        )
    if not any(n.is_output for n in nodes):
        raise ValueError("no block is an output")
