"""SpineNet: one loop over the block table of `specs`."""

from collections.abc import Sequence

import gin
import keras

from spinenet_tf import specs
from spinenet_tf.models import layers
from spinenet_tf.models.layers import Style


@gin.configurable
def SpineNet(  # noqa: N802 - a network's name, as in keras.applications
    size: str = "49",
    *,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    blocks: Sequence[specs.Block] = specs.SPINENET_49,
    endpoints: int | None = None,
    width: float | None = None,
    alpha: float | None = None,
    repeats: int | None = None,
    stochastic_depth: float = 0.0,
    **style,
) -> keras.Model:
    """Builds a SpineNet backbone (section 3).

    Args:
      size: a row of `specs.SIZES`: '49S', '49', '96', '143' or '190'.
      input_shape: (height, width, 3); None where the size is only known at run time.
      blocks: rows `(level, kind, parents, is_output)`; nodes 0 and 1 are the stem.
      endpoints, width, alpha, repeats: override the size's scaling (see `specs.Scaling`).
      stochastic_depth: drop rate of the last block; block i of n has rate * (i + 1) / n.
      **style: fields of `Style`: activation, momentum, epsilon, synchronized, weight_decay,
        numerics.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> {'P3': ..., 'P7': ...}, where
      P_l is [b, ceil(h / 2**l), ceil(w / 2**l), endpoints].

    Raises:
      ValueError: unknown size, a bad block row (see `specs.wire`), or a rate outside [0, 1).
    """
    scaling = _scaling(size, endpoints=endpoints, width=width, alpha=alpha, repeats=repeats)
    if not 0 <= stochastic_depth < 1:
        raise ValueError(f"stochastic_depth={stochastic_depth} is not in [0, 1)")
    style, image = Style(**style), keras.Input(input_shape, name="image")
    nodes = specs.wire(blocks)
    features = _stem(image, scaling, style)
    for node in nodes[len(features) :]:
        rate = stochastic_depth * (node.index - len(specs.STEM_49) + 1) / len(blocks)
        features.append(_permuted_block(node, nodes, features, image, scaling, rate, style))
    outputs = {
        f"P{n.level}": style.conv_bn(features[n.index], scaling.endpoints, name=f"p{n.level}")
        for n in sorted(nodes, key=lambda n: n.level)
        if n.is_output
    }
    return keras.Model(image, outputs, name=f"spinenet_{size.lower()}")


def _scaling(size: str, **overrides) -> specs.Scaling:
    if size not in specs.SIZES:
        raise ValueError(f"size={size!r} is not one of {sorted(specs.SIZES)}")
    return specs.SIZES[size]._replace(**{k: v for k, v in overrides.items() if v is not None})


def _stem(image, scaling: specs.Scaling, style: Style) -> list:
    """The scale-decreased start: 7x7 convolution, max-pool, two L2 bottleneck groups."""
    x = style.conv_bn(image, specs.STEM_FILTERS, 7, 2, name="stem")
    x = layers.max_pool(x, 3, 2, "stem_pool")
    features = []
    for i, (level, kind) in enumerate(specs.STEM_49):
        x = _group(x, level, kind, scaling, 0.0, style, f"block{i}")
        features.append(x)
    return features


def _permuted_block(node, nodes, features, image, scaling, rate, style):
    """Resamples and sums the parents of a node, adds what it adopts, and applies its blocks."""
    filters = specs.filters(node.level, scaling.width) * specs.EXPANSION[node.kind]
    edges = []
    for i, parent in enumerate(nodes[p] for p in node.parents):
        squeeze = int(specs.filters(parent.level, scaling.width) * scaling.alpha)
        edges.append(
            layers.resample(
                features[parent.index],
                image,
                (parent.level, node.level),
                squeeze,
                filters,
                style=style,
                name=f"block{node.index}_edge{i}",
            )  # fmt: skip
        )
    edges += [features[i] for i in node.adopted]
    x = keras.layers.Add(name=f"block{node.index}_fuse")(edges) if len(edges) > 1 else edges[0]
    x = style.act(x, f"block{node.index}_in")
    return _group(x, node.level, node.kind, scaling, rate, style, f"block{node.index}")


def _group(x, level, kind, scaling, rate, style, name):
    """A node's blocks in a row (Figure 6)."""
    for i in range(scaling.repeats):
        x = layers.block(
            x, kind, specs.filters(level, scaling.width),
            style=style, drop_path=rate, name=f"{name}_{i}",
        )  # fmt: skip
    return x
