"""Ablations on graphs: the damages of Table 8 and the rules of the paper's search space.

Pure Python. Section and table numbers are those of arXiv 1912.05027.
"""

from spinenet_tf.graphs import EXPANSION, OUTPUT_LEVELS, Block, Graph

DAMAGES = ("short", "long", "both")


def damage(graph: Graph, remove: str) -> Graph:
    """Takes connections away so that every permuted block has one parent (section 5.5, Table 8).

    The paper does not say what becomes of blocks that nothing uses any more. Here the rule all
    graphs are built by still holds: such a block goes to the output block of its level
    (`graphs.wire`), so "one block only connects to one other" is true of parents only; and where
    there is none, the block is pruned.

    Args:
      remove: 'short': the parent latest in the order goes; 'long': the earliest goes; 'both': all
        go, and the block just before (of the first one: the last stem block) takes their place.

    Returns:
      A graph that may have fewer blocks and a shorter stem (see `prune`): its rows count from its
      own stem and are wrong on another.

    Raises:
      ValueError: another `remove`.
    """
    if remove not in DAMAGES:
        raise ValueError(f"remove={remove!r} is not one of {DAMAGES}")
    keep = {"short": min, "long": max}
    rows = []
    for index, row in enumerate((Block(*row) for row in graph.blocks), len(graph.stem)):
        parent = index - 1 if remove == "both" else keep[remove](row.parents)
        rows.append(row._replace(parents=(parent,)))
    return prune(Graph(graph.stem, tuple(rows)))


def prune(graph: Graph) -> Graph:
    """The graph without the blocks that reach no output; the others are numbered anew.

    This holds for the end of the stem too: R0-SP53 without short-range connections never uses the
    second stem block. A block that only pruned ones used is adopted, where an output block of its
    level comes later, or is pruned in turn.
    """
    while dead := _dead(graph):
        graph = _without(graph, dead)
    return graph


def _dead(graph: Graph) -> set[int]:
    """Nodes without a child that no later output block would adopt either (`graphs.wire`)."""
    nodes = [Block(level, kind, ()) for level, kind in graph.stem] + list(graph.blocks)
    used = set(range(len(graph.stem) - 1)).union(*(row.parents for row in graph.blocks))
    return {
        i
        for i, node in enumerate(nodes)
        if i not in used and not node.is_output and not any(_fits(node, n) for n in nodes[i + 1 :])
    }


def _fits(node: Block, output: Block) -> bool:
    same_width = EXPANSION[node.kind] == EXPANSION[output.kind]
    return output.is_output and node.level == output.level and same_width


def _without(graph: Graph, dead: set[int]) -> Graph:
    first = len(graph.stem)
    kept = [i for i in range(first + len(graph.blocks)) if i not in dead]
    number = {old: new for new, old in enumerate(kept)}
    rows = (graph.blocks[i - first] for i in kept if i >= first)
    return Graph(
        tuple(graph.stem[i] for i in kept if i < first),
        tuple(row._replace(parents=tuple(number[p] for p in row.parents)) for row in rows),
    )


def check_search_space(graph: Graph, window: int = 5) -> None:
    """Checks a graph against the rules the paper's graphs were searched under.

    Section 3.1: two parents each, different and earlier; five output blocks, one of each of L3 to
    L7, after all intermediate blocks. Section 5.1: the parents of an intermediate block are among
    the last `window` nodes built (stem blocks are nodes); those of an output block are anywhere.
    Levels and kinds are free (block adjustments).

    Raises:
      ValueError: names the first row that breaks a rule, and the rule.
    """
    outputs = 0
    for index, row in enumerate((Block(*row) for row in graph.blocks), len(graph.stem)):
        problem = _problem(row, index, outputs, window)
        if problem:
            raise ValueError(f"block {index} {tuple(row)}: {problem}")
        outputs += row.is_output
    levels = sorted(Block(*row).level for row in graph.blocks if Block(*row).is_output)
    if levels != list(OUTPUT_LEVELS):
        raise ValueError(f"the output blocks have levels {levels}, not {list(OUTPUT_LEVELS)}")


def _problem(row: Block, index: int, outputs: int, window: int) -> str | None:
    if len(row.parents) != 2 or row.parents[0] == row.parents[1]:
        return f"parents {row.parents} are not two different nodes"
    if not all(0 <= parent < index for parent in row.parents):
        return f"parents {row.parents} must be nodes 0 to {index - 1}"
    if outputs and not row.is_output:
        return "an intermediate block after an output block"
    if not row.is_output and min(row.parents) < index - window:
        return f"parents {row.parents} are not among the last {window} nodes built"
    if row.is_output and row.level not in OUTPUT_LEVELS:
        return f"an output block's level must be one of {OUTPUT_LEVELS}"
    return None
