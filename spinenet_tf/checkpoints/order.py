"""The layers of a network in the order in which the official code and Model Garden create them.

Both name layers by counting, so that order is what ties `conv2d_9` to one of our layers. Here are
our names; `official` and `garden` count.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from spinenet_tf import graphs, specs
from spinenet_tf.models.fpn import NAS_FPN, NAS_FPN_REPEATS

TOP = ("top",)  # the place of a stem's first convolution and of the endpoints


class Plan(NamedTuple):
    """How many layers of which kind a network has; their widths are not in it."""

    backbone: str = ""  # 'spinenet', 'mobile' or a row of `specs.RESNETS`; '' is none
    repeats: int = 1  # blocks in a row per node of a SpineNet
    project: bool = False  # the first block of a ResNet's L2 projects its shortcut
    decoder: str = ""  # '', 'fpn' or 'nas_fpn'
    head: str = ""  # 'RetinaNet', 'MaskRCNN', 'Classifier' or none
    convs: int = 0  # of RetinaNet's subnets, or of the mask subnet
    rpn_convs: int = 0
    box_convs: int = 0
    fcs: int = 0
    norm: bool = True  # batch norm in the subnets of Mask R-CNN


class Made(NamedTuple):
    """A layer, and what it was made for: TOP, ('edge', node, i) or ('block', node, repeat)."""

    place: tuple
    layer: str


def backbone(plan: Plan) -> Iterator[Made]:
    """The layers of a plan's backbone, without a decoder.

    Raises:
      KeyError: no such ResNet.
    """
    if plan.backbone == "spinenet":
        yield from _spinenet(plan.repeats)
    elif plan.backbone == "mobile":
        yield from _mobile()
    elif plan.backbone:
        yield from _resnet(specs.RESNETS[plan.backbone], plan.project)


def nas_fpn() -> Iterator[str]:
    """NAS-FPN's convolutions; each has a batch norm."""
    yield from (f"lateral{level}" for level in (3, 4, 5))
    for cell in range(NAS_FPN_REPEATS):
        yield from (f"cell{cell}_{i}" for i in range(len(NAS_FPN)))


def plan_of(layers: Iterable[str]) -> Plan:
    """The plan of a network with our `layers`; missing ones shall not matter if others tell."""
    layers = set(layers)
    repeats = number(layers, r"block\d+_(\d+)_\d_conv")
    decoder = "nas_fpn" if number(layers, r"cell(\d+)_") else "fpn"
    counted = {
        "backbone": "spinenet" if repeats else _mobile_or_resnet(layers),
        "repeats": repeats or 1,
        "project": "l2_0_shortcut_conv" in layers,
        "decoder": decoder if number(layers, r"lateral(\d)") else "",
    }
    if number(layers, r"rpn_(\d)$") or "rpn_score" in layers:
        counted |= {
            "head": "MaskRCNN",
            "convs": number(layers, r"mask_head_(\d+)$"),
            "rpn_convs": number(layers, r"rpn_(\d+)$"),
            "box_convs": number(layers, r"box_head_(\d+)$"),
            "fcs": max(number(layers, r"box_head_fc(\d+)$") - 1, int("box_head_fc" in layers)),
            "norm": any(re.match(r"(rpn|mask_head|box_head)_.*_bn$", name) for name in layers),
        }
    elif number(layers, r"class_(\d+)$") or "box_predict" in layers:
        convs = max(number(layers, r"class_(\d+)$"), number(layers, r"box_(\d+)$"))
        counted |= {"head": "RetinaNet", "convs": convs}
    elif "class_predict" in layers:
        counted |= {"head": "Classifier"}
    return Plan(**counted)


def number(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a name, or 0."""
    found = (re.match(pattern, name) for name in names)
    return max((int(m[1]) + 1 for m in found if m), default=0)


def _mobile_or_resnet(layers: set[str]) -> str:
    if number(layers, r"block(\d+)_expand_conv"):
        return "mobile"
    blocks = tuple(number(layers, rf"l{level}_(\d+)_\d_conv") for level in (2, 3, 4, 5))
    if not any(blocks):
        return ""
    kind = "bottleneck" if number(layers, r"l\d_\d+_(3)_conv") else "residual"
    return resnet_of(kind, blocks)


def resnet_of(kind: str, blocks: tuple[int, ...]) -> str:
    """The row of `specs.RESNETS` with these blocks.

    Raises:
      ValueError: there is none.
    """
    for name, row in specs.RESNETS.items():
        if (kind, blocks) == (row.kind, row.blocks):
            return name
    raise ValueError(f"no ResNet here has {blocks} {kind} blocks on levels 2 to 5")


def _conv_bn(place: tuple, name: str) -> Iterator[Made]:
    yield Made(place, f"{name}_conv")
    yield Made(place, f"{name}_bn")


def _spinenet(repeats: int) -> Iterator[Made]:
    yield from _conv_bn(TOP, "stem")
    nodes = graphs.wire(graphs.SPINENET_49)
    for node in nodes:
        for i, parent in enumerate(node.parents):
            name, place = f"block{node.index}_edge{i}", ("edge", node.index, i)
            down = ["down"] if nodes[parent].level < node.level else []
            for step in ("squeeze", *down, "expand"):
                yield from _conv_bn(place, f"{name}_{step}")
        for i in range(repeats):
            # Only the stem's first block changes the width.
            project = ["shortcut"] if (node.index, i) == (0, 0) else []
            yield from _block(
                ("block", node.index, i), f"block{node.index}_{i}", node.kind, project
            )
    for level in graphs.OUTPUT_LEVELS:
        yield from _conv_bn(TOP, f"p{level}")


def _block(place: tuple, name: str, kind: str, project: list[str]) -> Iterator[Made]:
    convs = range(1, 4 if kind == "bottleneck" else 3)
    for step in (*project, *convs):
        yield from _conv_bn(place, f"{name}_{step}")


def _mobile() -> Iterator[Made]:
    yield from _conv_bn(TOP, "stem")
    nodes = graphs.wire(graphs.SPINENET_MOBILE)
    for node in nodes:
        for i, parent in enumerate(node.parents):
            name, place = f"block{node.index}_edge{i}", ("edge", node.index, i)
            downs = [f"down{k}" for k in range(max(node.level - nodes[parent].level, 0))]
            for step in (*downs, "expand"):
                yield from _conv_bn(place, f"{name}_{step}")
        name, place = f"block{node.index}", ("block", node.index, 0)
        yield from _conv_bn(place, f"{name}_expand")
        yield from _conv_bn(place, f"{name}_depthwise")
        yield Made(place, f"{name}_se_squeeze")
        yield Made(place, f"{name}_se_gate")
        yield from _conv_bn(place, f"{name}_project")
    for level in graphs.OUTPUT_LEVELS:
        yield from _conv_bn(TOP, f"p{level}")


def _resnet(stages: specs.ResNetStages, project: bool) -> Iterator[Made]:
    yield from _conv_bn(TOP, "stem")
    for level, blocks in zip(specs.RESNET_WIDTHS, stages.blocks, strict=True):
        for i in range(blocks):
            wider = level > 2 or stages.kind == "bottleneck" or project
            shortcut = ["shortcut"] if i == 0 and wider else []
            yield from _block(("block", level, i), f"l{level}_{i}", stages.kind, shortcut)
