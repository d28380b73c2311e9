"""What model a set of weights is of, from the shapes alone.

Every fact is put to the vote of all tensors that know it, so that a file with one wrong or missing
tensor is still recognised, and what is wrong can be said.
"""

import collections
import math
import re
from collections.abc import Iterable
from typing import Any

from spinenet_tf import graphs, specs
from spinenet_tf.checkpoints import order

# How a difference is put in words.
WORDS = {
    "network": "it is a {}",
    "family": "its backbone is a {}",
    "size": "its size is {}",
    "width": "its blocks are {} times as wide as SpineNet-49's",
    "alpha": "its resampling factor alpha is {}",
    "repeats": "its blocks are repeated {} times",
    "endpoints": "endpoints are {} wide",
    "filters": "its subnets are {} wide",
    "convs": "its subnets have {} convolutions",
    "rpn_convs": "its region proposal network has {} convolutions",
    "box_convs": "its box subnet has {} convolutions",
    "fcs": "its box subnet has {} fully connected layers",
    "fc": "its fully connected layer has {} units",
    "norm": "batch norm in its subnets is {}",
    "num_classes": "it has {} classes",
    "anchors_per_place": "it has {} anchors a place",
    "project": "ResNet.project is {}",
}
FAMILIES = {"spinenet": "SpineNet", "mobile": "SpineNetMobile", "": ""}


def recognize(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The facts (keys of `WORDS`) of a model whose variables, by our names, have these shapes.

    Raises:
      ValueError: no network of this package.
    """
    plan = order.plan_of({path.rsplit("/", 1)[0] for path in shapes})
    if not plan.backbone:
        raise ValueError("there is no backbone of this package among the weights")
    facts = {"network": plan.head, "family": FAMILIES.get(plan.backbone, "ResNet")}
    scale = {"spinenet": _spinenet, "mobile": _mobile}.get(plan.backbone, _resnet)
    facts |= scale(shapes, plan)
    head = {"RetinaNet": _retinanet, "MaskRCNN": _mask_rcnn, "Classifier": _classifier}
    return facts | (head[plan.head](shapes, plan) if plan.head else {})


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Sentences on facts that two models do not share: of the file, and of the recipe."""
    said = []
    for name, words in WORDS.items():
        if there.get(name) != here.get(name):
            said.append(f"{words.format(there.get(name))}, the recipe says {here.get(name)}")
    return said


def _widths(shapes: dict, pattern: str, axis: int = -1) -> list[tuple[re.Match, int]]:
    """Sizes along an axis of the variables that a pattern names."""
    found = ((re.fullmatch(pattern, path), shape) for path, shape in shapes.items())
    return [(match, shape[axis]) for match, shape in found if match and shape]


def _vote(values: Iterable[Any], default: Any = None) -> Any:
    most = collections.Counter(values).most_common(1)
    return most[0][0] if most else default


def _scale(pairs: list[tuple[int, int]], known: Iterable[float]) -> float:
    """The s with which most pairs (base, width) have width = int(base * s).

    Of equals a known one wins, then the one with the fewest decimals.
    """
    rounded = (
        math.ceil(width / base * 10**digits - 1e-9) / 10**digits
        for digits in range(1, 5)
        for base, width in sorted(set(pairs))
    )
    tries = [*known, *rounded]
    return max(tries, key=lambda s: sum(int(base * s) == width for base, width in pairs))


def _spinenet(shapes: dict, plan: order.Plan) -> dict[str, Any]:
    nodes = graphs.wire(graphs.SPINENET_49)
    inner = {"bottleneck": 2, "residual": 1}  # a 3x3 convolution of the block
    base = {node.index: specs.WIDTHS[node.level] for node in nodes}
    found = _widths(shapes, r"block(\d+)_0_(\d)_conv/kernel")
    pairs = [
        (base[int(m[1])], n) for m, n in found if int(m[2]) == inner[nodes[int(m[1])].kind]
    ]  # fmt: skip
    rows = specs.SIZES.values()
    width = _scale(pairs, sorted({row.width for row in rows}))
    edges = _widths(shapes, r"block(\d+)_edge(\d)_squeeze_conv/kernel")
    parents = [(nodes[nodes[int(m[1])].parents[int(m[2])]], n) for m, n in edges]
    squeezed = [(specs.filters(parent.level, width), n) for parent, n in parents]
    alpha = _scale(squeezed, sorted({row.alpha for row in rows}))
    return _named(specs.SIZES, "49", width=width, alpha=alpha, repeats=plan.repeats) | {
        "endpoints": _vote(n for _, n in _widths(shapes, r"p\d_conv/kernel"))
    }


def _mobile(shapes: dict, plan: order.Plan) -> dict[str, Any]:
    nodes = graphs.wire(graphs.SPINENET_MOBILE)
    found = _widths(shapes, r"block(\d+)_project_conv/kernel")
    pairs = [(specs.MOBILE_WIDTHS[nodes[int(m[1])].level], n) for m, n in found]
    width = _scale(pairs, sorted({row.width for row in specs.MOBILE_SIZES.values()}))
    return _named(specs.MOBILE_SIZES, "mobile-49", width=width) | {
        "endpoints": _vote(n for _, n in _widths(shapes, r"p\d_conv/kernel"))
    }


def _named(table: dict, default: str, **scaling) -> dict[str, Any]:
    """The size with this scaling, or the default one with the scaling that makes it."""
    for size, row in table.items():
        if all(getattr(row, field) == value for field, value in scaling.items()):
            return {"size": size, **scaling}
    return {"size": default, **scaling}


def _resnet(shapes: dict, plan: order.Plan) -> dict[str, Any]:
    if not plan.decoder:
        return {"size": plan.backbone, "project": plan.project and plan.backbone == "R34"}
    decoder = {"fpn": "FPN", "nas_fpn": "NAS-FPN"}[plan.decoder]
    endpoints = _vote(n for _, n in _widths(shapes, r"lateral\d_conv/kernel"))
    return {"family": "ResNetFPN", "size": f"{plan.backbone}-{decoder}", "endpoints": endpoints}


def _retinanet(shapes: dict, plan: order.Plan) -> dict[str, Any]:
    kernel = r"(?:kernel|pointwise_kernel|bias)"
    boxes = _vote(n for _, n in _widths(shapes, rf"box_predict/{kernel}"))
    anchors = (boxes or 36) // 4
    classes = _vote(n for _, n in _widths(shapes, rf"class_predict/{kernel}"))
    inner = _widths(shapes, rf"(?:class|box)_\d+/{kernel}")
    return {
        "convs": plan.convs,
        "filters": _vote(n for _, n in inner),
        "num_classes": (classes or 0) // anchors,
        "anchors_per_place": anchors,
    }


def _mask_rcnn(shapes: dict, plan: order.Plan) -> dict[str, Any]:
    classes = _widths(shapes, r"(?:box_head_class|mask_head_predict)/(?:kernel|bias)")
    return {
        "convs": plan.convs,
        "rpn_convs": plan.rpn_convs,
        "box_convs": plan.box_convs,
        "fcs": plan.fcs,
        "norm": plan.norm,
        "filters": _vote(n for _, n in _widths(shapes, r"(?:rpn|mask_head)_\d+/kernel")),
        "fc": _vote(n for _, n in _widths(shapes, r"box_head_fc\d?/kernel")),
        "num_classes": _vote(n for _, n in classes),
        "anchors_per_place": _vote(n for _, n in _widths(shapes, r"rpn_score/(?:kernel|bias)")),
    }


def _classifier(shapes: dict, plan: order.Plan) -> dict[str, Any]:
    return {"num_classes": _vote(n for _, n in _widths(shapes, r"class_predict/(?:kernel|bias)"))}
