"""Graphs of our own, where the paper publishes which blocks there are but not their connections.

Table 1 gives R35-SP18 and R14-SP39 blocks per level; Table 7 gives Hourglass and Fish an order. The
paper's connections (and the order of the first two) were learned and are not published: those
here follow one plain rule, `connected()`, so expect other AP than the paper's. Multiply-adds in
RetinaNet at 640 px: R35-SP18 91.28B (Table 3: 91.7B), R14-SP39 97.04B (99.7B), Hourglass 94.11B and
Fish 95.14B (not printed). Pure Python.
"""

from collections.abc import Iterable, Sequence

from spinenet_tf.graphs import OUTPUT_LEVELS, Block, Graph

WINDOW = 5  # an intermediate block's parents are among so many last nodes (section 5.1)


def connected(stem: Sequence[int], blocks: Sequence[int]) -> Graph:
    """A graph of bottleneck blocks in a given order; the last five blocks are the outputs.

    The rule, ours: a block's parents are the block just before it and, of the others it may see,
    the latest one of its own level, or else of the level nearest to its own. An intermediate block
    sees the last `WINDOW` nodes, an output block sees all (section 5.1). As every block feeds the
    next, none is dead.

    Args:
      stem: level of each stem block, two at least. blocks: level of each block after it.
    """
    levels, rows = [*stem, *blocks], []
    first_output = len(levels) - len(OUTPUT_LEVELS)
    for index in range(len(stem), len(levels)):
        is_output = index >= first_output
        seen = range(0 if is_output else max(0, index - WINDOW), index - 1)
        far = min(seen, key=lambda i: (abs(levels[i] - levels[index]), -i))
        rows.append(Block(levels[index], "bottleneck", (far, index - 1), is_output))
    return Graph(tuple((level, "bottleneck") for level in stem), tuple(rows))


def _ordered(runs: Iterable[tuple[int, int]]) -> Graph:
    """The graph of an order in Table 7's notation; the first two blocks are the stem."""
    levels = [level for count, level in runs for _ in range(count)]
    return connected(levels[:2], levels[2:])


# Table 1: stem {2, 3, 5, 1} of {L2, L3, L4, L5}; one block of each of L2 to L7, our order.
R35_SP18 = connected((2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5), (2, *OUTPUT_LEVELS))

# Table 1: stem {1, 1, 1, 1}; {2, 3, 5, 1, 1, 1} of L2 to L7. Our order: up and down in scale (as
# section 5.2 finds learned ones to be) while there are blocks for it, then the L4 blocks left.
R14_SP39 = connected((2, 3, 4, 5), (4, 3, 2, 4, 3, 2, 4, 4, *OUTPUT_LEVELS))

# Table 7's orders, (count, level); both hold the 17 blocks of R0-SP53, so 2 L2 are the stem.
HOURGLASS_ORDER = ((3, 2), (3, 3), (5, 4), (1, 5), (1, 7), (1, 6), (1, 5), (1, 4), (1, 3))
FISH_ORDER = (
    (2, 2), (2, 3), (3, 4), (1, 5), (2, 4), (1, 3), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7),
)  # fmt: skip
HOURGLASS = _ordered(HOURGLASS_ORDER)
FISH = _ordered(FISH_ORDER)
