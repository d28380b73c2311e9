"""SpineNet: one loop over the rows of its graph."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import gin
import keras

from spinenet_tf import graphs, specs
from spinenet_tf.models import layers
from spinenet_tf.models.layers import Style
from spinenet_tf.models.layout import PLAIN, Layout, layouts, relay


@gin.configurable
def SpineNet(  # noqa: N802 - a network's name, as in keras.applications
    size: str = "49",
    *,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    blocks: Sequence[graphs.Block] | None = None,
    stem: Sequence[tuple[int, str]] | None = None,
    endpoints: int | None = None,
    width: float | None = None,
    alpha: float | None = None,
    repeats: int | None = None,
    **style,
) -> keras.Model:
    """Builds a SpineNet backbone (section 3).

    Args:
      size: a row of `specs.SIZES`: '49S', '49', '96', '143', '190', 'R0-SP53', ...
      input_shape: (height, width, 3); None where the size is only known at run time.
      blocks: instead of the size's rows, `(level, kind, parents, is_output)`; the first nodes are
        the stem's blocks.
      stem: instead of the size's scale-decreased stem, `(level, kind)` of a chain of blocks.
      endpoints, width, alpha, repeats: override the size's scaling (see `specs.Scaling`).
      **style: fields of `Style`: activation, momentum, epsilon, synchronized, weight_decay,
        numerics, stochastic_depth, dropblock_keep, dropblock_size, recompute.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> {'P3': ..., 'P7': ...}, where
      P_l is [b, ceil(h / 2**l), ceil(w / 2**l), endpoints].

    Raises:
      ValueError: unknown size, a bad block row (see `graphs.wire`), or style.
    """
    scaling = specs.row(
        specs.SIZES, size, endpoints=endpoints, width=width, alpha=alpha, repeats=repeats
    )
    graph = graphs.override(scaling.graph, stem, blocks)
    style, image = Style(**style), keras.Input(input_shape, name="image")
    lie = layouts(image.shape, plain=style.dropblock_keep < 1)

    def stem_block(x, node, level):
        without = dataclasses.replace(style, dropblock_keep=1.0)
        return _group(x, node, scaling, 0.0, without, level, lie)

    squeezed = {}  # {(child, i): features of its connection from its parent i}

    def permuted_block(node, nodes, features, rate):
        for i, parent in enumerate(node.parents):
            if (node.index, i) not in squeezed:
                x = features[parent]
                squeezed.update(_squeeze(nodes[parent], nodes, x, scaling, style, lie))
        x = _fuse(node, nodes, features, squeezed, image, scaling, style, lie)
        return _group(x, node, scaling, rate, style, node.level, lie)

    x = style.pooled_stem(image, specs.STEM_FILTERS, lie[2])
    features, nodes = build_nodes(x, 2, graph, style, stem_block, permuted_block)
    outputs = pyramid(features, nodes, scaling.endpoints, style, lie)
    return keras.Model(image, outputs, name=f"spinenet_{size.lower()}")


def build_nodes(
    x, level: int, graph: graphs.Graph, style: Style, stem_block: Callable, block: Callable
) -> tuple[list, tuple[graphs.Node, ...]]:
    """The features of every node of a graph.

    Args:
      x: what the stem's first block sees, at `level`.
      stem_block: (x, node, level of x) -> features.
      block: (node, all nodes, features so far, its stochastic depth rate) -> features.

    Raises:
      ValueError: a bad row, or a stem that begins below `level`.
    """
    nodes, features = graphs.wire(graph), []
    if graph.stem and graph.stem[0][0] < level:
        raise ValueError(f"stem block 0 {graph.stem[0]}: its input is at level {level} already")
    for node in nodes[: len(graph.stem)]:
        x, level = stem_block(x, node, level), node.level
        features.append(x)
    for i, node in enumerate(nodes[len(graph.stem) :]):
        rate = style.depth_rate(i, len(graph.blocks))
        features.append(block(node, nodes, features, rate))
    return features, nodes


def pyramid(
    features: list, nodes: Sequence[graphs.Node], endpoints: int, style: Style,
    lie: Mapping[int, Layout],
) -> dict:  # fmt: skip
    """{'P3': [b, h, w, endpoints], ...}: a 1x1 convolution on every output block (section 3).

    Args:
      lie: how the features of each level lie; what is returned is plain.
    """
    outputs = {}
    for node in sorted((n for n in nodes if n.is_output), key=lambda n: n.level):
        level, layout = f"P{node.level}", lie[node.level]
        x = style.conv_bn(features[node.index], endpoints, name=level.lower(), layout=layout)
        outputs[level] = relay(x, layout, PLAIN)
    return outputs


def _squeeze(parent, nodes, x, scaling, style, lie) -> dict:
    """{(child, i): squeezed features} of all connections from a node (section 3.2, Figure 5)."""
    children = [
        (node.index, i) for node in nodes for i, p in enumerate(node.parents) if p == parent.index
    ]
    names = [f"block{child}_edge{i}_squeeze" for child, i in children]
    filters = int(specs.filters(parent.level, scaling.width) * scaling.alpha)
    name, columns = f"block{parent.index}_squeeze", lie[parent.level].columns
    parts = style.pointwise_split(x, filters, names, name, columns)
    return dict(zip(children, parts, strict=True))


def _fuse(node, nodes, features, squeezed, image, scaling, style, lie):
    """Resamples the parents of a node to it, and sums them and what it adopts."""
    filters = specs.filters(node.level, scaling.width) * graphs.EXPANSION[node.kind]
    name, edges = f"block{node.index}", []
    for i, parent in enumerate(node.parents):
        levels = (nodes[parent].level, node.level)
        x, here = squeezed[node.index, i], tuple(lie[n] for n in levels)
        edges.append(layers.resize(x, image, levels, here, style=style, name=f"{name}_edge{i}"))
    names, columns = [f"{name}_edge{i}_expand" for i in range(len(edges))], lie[node.level].columns
    x = style.pointwise_sum(edges, filters, names, f"{name}_expand", columns)
    return layers.fuse([x, *(features[i] for i in node.adopted)], style, name)


def _group(x, node, scaling, rate, style, level, lie):
    """A node's blocks in a row (Figure 6); the first halves x if that is of a lower `level`."""
    layout = lie[level]
    for i in range(scaling.repeats):
        strides = 2 ** (node.level - level)
        if strides > 1:  # plain blocks halve
            x, layout = relay(x, layout, PLAIN), PLAIN
        x = layers.block(
            x, node.kind, specs.filters(node.level, scaling.width), style=style, drop_path=rate,
            strides=strides, name=f"block{node.index}_{i}", layout=layout,
        )  # fmt: skip
        x, layout, level = relay(x, layout, lie[node.level]), lie[node.level], node.level
    return x
