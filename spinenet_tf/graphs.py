"""Scale-permuted graphs: the paper's, as rows of blocks, and `wire()`, which resolves them.

Pure Python: the topology never depends on a tensor shape, so all input sizes give one network.
Paper: arXiv 1912.05027. Figure and table numbers below are the paper's.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """One row of a scale-permuted network (Figure 4)."""

    level: int  # the feature map is 1 / 2**level of the input
    kind: str  # 'bottleneck', 'residual' or 'mbconv'
    parents: tuple[int, ...]  # node numbers; the stem's blocks are the first nodes
    is_output: bool = False


class Graph(NamedTuple):
    """A scale-decreased stem and the scale-permuted blocks after it (section 3)."""

    stem: tuple[tuple[int, str], ...]  # (level, kind) of each block, a chain; nodes 0, 1, ...
    blocks: tuple[Block, ...]


class Node(NamedTuple):
    """A block in place: `wire()`'s answer for one row."""

    index: int
    level: int
    kind: str
    parents: tuple[int, ...]  # resampled, then summed
    adopted: tuple[int, ...]  # summed as they are: blocks that would otherwise feed nothing
    is_output: bool


LEVELS = (1, 2, 3, 4, 5, 6, 7)
OUTPUT_LEVELS = (3, 4, 5, 6, 7)
EXPANSION = {"bottleneck": 4, "residual": 1, "mbconv": 1}  # block output channels / its width

B, R, M = "bottleneck", "residual", "mbconv"

# Figure 4(d). Stem: nodes 0 and 1 (Table 1: two L2 blocks); rows: nodes 2 to 16.
SPINENET_49 = Graph(
    ((2, B), (2, B)),
    (
        Block(2, B, (0, 1)),
        Block(4, R, (0, 1)),
        Block(3, B, (2, 3)),
        Block(4, B, (2, 4)),
        Block(6, R, (3, 5)),
        Block(4, B, (3, 5)),
        Block(5, R, (6, 7)),
        Block(7, R, (6, 8)),
        Block(5, B, (8, 9)),
        Block(5, B, (8, 10)),
        Block(4, B, (5, 10), True),
        Block(3, B, (4, 10), True),
        Block(5, B, (7, 12), True),
        Block(7, B, (5, 14), True),
        Block(6, B, (12, 14), True),
    ),
)

# Appendix A says only that an L1 block replaces the max-pool and that the first L2 block gets
# stride 2; these are the official code's rows: SpineNet-49 with its second L2 block permuted too.
SPINENET_MOBILE = Graph(
    ((1, M), (2, M)),
    (
        Block(2, M, (0, 1)),
        Block(2, M, (1, 2)),
        Block(4, M, (1, 2)),
        Block(3, M, (3, 4)),
        Block(4, M, (3, 5)),
        Block(6, M, (4, 6)),
        Block(4, M, (4, 6)),
        Block(5, M, (7, 8)),
        Block(7, M, (7, 9)),
        Block(5, M, (9, 10)),
        Block(5, M, (9, 11)),
        Block(4, M, (6, 11), True),
        Block(3, M, (5, 11), True),
        Block(5, M, (8, 13), True),
        Block(7, M, (6, 15), True),
        Block(6, M, (13, 15), True),
    ),
)

# Figure 4(c), read off the drawing; a second reading of others agrees.
R0_SP53 = Graph(
    ((2, B), (2, B)),
    (
        Block(2, B, (0, 1)),
        Block(3, B, (0, 1)),
        Block(3, B, (2, 3)),
        Block(4, B, (2, 4)),
        Block(4, B, (3, 5)),
        Block(3, B, (5, 6)),
        Block(5, B, (4, 7)),
        Block(4, B, (4, 8)),
        Block(4, B, (8, 9)),
        Block(4, B, (8, 10)),
        Block(3, B, (4, 10), True),
        Block(4, B, (6, 7), True),
        Block(5, B, (8, 13), True),
        Block(7, B, (6, 9), True),
        Block(6, B, (7, 9), True),
    ),
)

# Figure 4(b), read off the drawing: no second source. Stem of Table 1: L2 2, L3 2, L4 2, L5 1.
R23_SP30 = Graph(
    ((2, B), (2, B), (3, B), (3, B), (4, B), (4, B), (5, B)),
    (
        Block(4, B, (5, 6)),
        Block(4, B, (5, 6)),
        Block(4, B, (7, 8)),
        Block(3, B, (8, 9)),
        Block(2, B, (9, 10)),
        Block(4, B, (5, 9), True),
        Block(3, B, (9, 10), True),
        Block(5, B, (9, 10), True),
        Block(7, B, (11, 13), True),
        Block(6, B, (9, 14), True),
    ),
)


def override(graph: Graph, stem: Sequence | None, blocks: Sequence | None) -> Graph:
    """The graph with another stem or other rows where they are not None."""
    return Graph(
        tuple(map(tuple, graph.stem if stem is None else stem)),
        tuple(graph.blocks if blocks is None else blocks),
    )


def wire(graph: Graph) -> tuple[Node, ...]:
    """Resolves a graph into nodes, stem first.

    An output block adopts every earlier block that feeds nothing and has its level and channels
    (section 3.3: such blocks connect "to the output block at the corresponding level").

    Raises:
      ValueError: a row or the stem names an unknown level or kind; a row a parent that is not an
        earlier node, or an output level twice; the stem goes back to a lower level; or a block
        reaches no output.
    """
    _check_stem(graph.stem)
    nodes = [Node(i, level, kind, (), (), False) for i, (level, kind) in enumerate(graph.stem)]
    used = set(range(len(nodes) - 1))  # the stem is a chain: all but its last feed the next
    for row in map(_checked, graph.blocks):
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
    same_width = EXPANSION[node.kind] == EXPANSION[row.kind]  # at one level
    return node.index not in used and node.level == row.level and same_width


def _check_stem(stem: Sequence[tuple[int, str]]) -> None:
    for i, (level, kind) in enumerate(stem):
        where = f"stem block {i} {(level, kind)}"
        _check_block(where, level, kind)
        if i and level < stem[i - 1][0]:
            raise ValueError(f"{where}: the block before is at the higher level {stem[i - 1][0]}")


def _check_block(where: str, level: int, kind: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"{where}: level {level!r} is not one of {LEVELS}")
    if kind not in EXPANSION:
        raise ValueError(f"{where}: kind {kind!r} is not one of {sorted(EXPANSION)}")


def _check_row(row: Block, index: int, nodes: Sequence[Node]) -> None:
    where = f"block {index} {tuple(row)}"
    _check_block(where, row.level, row.kind)
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
