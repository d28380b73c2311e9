"""Names of the official code's TF1 checkpoints (tensorflow/tpu, models/official/detection).

A variable is `scope/layer/variable`; layers without a name of their own are counted by kind in
their scope: conv2d, conv2d_1, ... Names of decoders and of Mask R-CNN's batch norms are from
reading the code, the others also from files that it wrote.
"""

import re
from collections.abc import Iterable, Iterator

from spinenet_tf import graphs
from spinenet_tf.checkpoints import order
from spinenet_tf.checkpoints.order import Plan, number

SLOTS = ("/Momentum", "/ExponentialMovingAverage")
SCOPES = {"spinenet": "spinenet", "spinenet_mbconv": "mobile"}
RESAMPLE = {"spinenet": "resample_with_alpha", "mobile": "resample_with_sepconv"}
STEM = 2  # nodes of a SpineNet that are not scale-permuted


def plan_of(layers: set[str]) -> Plan:
    """The plan of a checkpoint with these layers (names of variables without their last part).

    Raises:
      ValueError: no backbone that we know, or one of another graph than SpineNet-49's.
    """
    backbone = _backbone(layers)
    counted = {"backbone": backbone, "repeats": 1}
    if backbone in RESAMPLE:
        _check_graph(layers, backbone)
    if backbone == "spinenet":
        counted["repeats"] = max(_repeats(layers), 1)
    elif backbone != "mobile":
        counted["project"] = True
        nas = any(name.startswith("fpn_cells/") for name in layers)
        fpn = any(name.startswith("fpn/") for name in layers)
        counted["decoder"] = "nas_fpn" if nas else "fpn" if fpn else ""
    return Plan(**counted, **_head(layers))


def layers(plan: Plan) -> dict[str, str]:
    """{official layer: our layer} of a whole network."""
    pairs = dict(_backbone_pairs(plan))
    pairs |= {"": {}, "fpn": _FPN, "nas_fpn": dict(_nas_fpn_pairs())}[plan.decoder]
    make = {"RetinaNet": _retinanet, "MaskRCNN": _mask_rcnn, "Classifier": _classifier}
    return pairs | dict(make[plan.head](plan)) if plan.head else pairs


def variable_name(layer: str, variable: str) -> str:
    """What TF1 calls one of our variables: Keras 3 calls a depthwise kernel a kernel."""
    return "depthwise_kernel" if variable == "kernel" and _kind(layer)[0] == "d" else variable


def _backbone(layers: set[str]) -> str:
    for scope, backbone in SCOPES.items():
        if any(name.startswith(f"{scope}/") for name in layers):
            return backbone
    depths = {m[1] for m in (re.match(r"resnet(\d+)/", name) for name in layers) if m}
    if len(depths) != 1:
        scopes = sorted({name.split("/")[0] for name in layers})
        raise ValueError(f"no backbone that this package has; the file's scopes are {scopes}")
    return f"R{depths.pop()}"


def _check_graph(layers: set[str], backbone: str) -> None:
    graph = {"spinenet": graphs.SPINENET_49, "mobile": graphs.SPINENET_MOBILE}[backbone]
    here, ours = number(layers, r"\w+/sub_policy(\d+)/"), len(graph.blocks)
    if here != ours:
        raise ValueError(f"{here} scale-permuted blocks, the paper's graph has {ours}")


def _repeats(layers: set[str]) -> int:
    """Of bottlenecks, the largest number of convolutions a block: 3 each, but for gaps."""
    nodes = graphs.wire(graphs.SPINENET_49)
    scope = r"spinenet/sub_policy\d+/scale_permuted_block_{}/conv2d_(\d+)$"
    found = [
        -(-number(layers, scope.format(node.index)) // (3 if node.kind == "bottleneck" else 2))
        for node in nodes[STEM:]
    ]
    return max(found)


def _head(layers: set[str]) -> dict:
    if any(name.startswith("retinanet/") for name in layers):
        convs = number(layers, r"retinanet/(?:class|box)_net/(?:class|box)-(\d+)$")
        return {"head": "RetinaNet", "convs": convs}
    if any(name.startswith("rpn_head/") for name in layers):
        return {
            "head": "MaskRCNN",
            "convs": number(layers, r"mask_head/mask-conv-l(\d+)$"),
            "rpn_convs": number(layers, r"rpn_head/rpn-(\d+)$") or 1,
            "box_convs": number(layers, r"fast_rcnn_head/conv_(\d+)$"),
            "fcs": max(number(layers, r"fast_rcnn_head/fc(\d+)$") - 6, 1),
            "norm": any(re.match(r"(rpn|fast_rcnn|mask)_head/.*(bn|norm)", n) for n in layers),
        }
    if any(name.startswith("classification_head/") for name in layers):
        return {"head": "Classifier"}
    return {}


def _kind(layer: str) -> str:
    if layer.endswith("_bn"):
        return "batch_normalization"
    if re.search(r"_(depthwise|down\d)_conv$", layer):
        return "depthwise_conv2d"
    return "conv2d"


def _count(places: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(scope, our layer) in order of creation -> (official layer, our layer)."""
    counts = {}
    for scope, layer in places:
        name = f"{scope}/{_kind(layer)}"
        i = counts[name] = counts.get(name, -1) + 1
        yield (f"{name}_{i}" if i else name), layer


def _backbone_pairs(plan: Plan) -> Iterator[tuple[str, str]]:
    of_ours = {backbone: scope for scope, backbone in SCOPES.items()}
    top = of_ours.get(plan.backbone) or f"resnet{plan.backbone[1:]}"

    def scope(place):
        if plan.backbone not in RESAMPLE or place == order.TOP or place[1] < STEM:
            return top
        kind, node, i = place
        policy = node - STEM
        block = f"{RESAMPLE[plan.backbone]}_resample_{policy}_{i}"
        block = block if kind == "edge" else f"scale_permuted_block_{node}"
        return f"{top}/sub_policy{policy}/{block}"

    return _count((scope(made.place), made.layer) for made in order.backbone(plan))


_FPN = (
    {f"fpn/l{n}": f"lateral{n}_conv" for n in (3, 4, 5)}
    | {f"fpn/post_hoc_d{n}": f"post_hoc{n}_conv" for n in (3, 4, 5)}
    | {f"fpn/p{n}": f"coarser{n}_conv" for n in (6, 7)}
    | {f"fpn/p{n}-bn": f"p{n}_bn" for n in graphs.OUTPUT_LEVELS}
)


def _nas_fpn_pairs() -> Iterator[tuple[str, str]]:
    for name in order.nas_fpn():
        if name.startswith("lateral"):
            scope, conv = f"resample_l{name[-1]}", "conv2d"
        else:
            cell, i = map(int, name.removeprefix("cell").split("_"))
            inputs = len(graphs.OUTPUT_LEVELS)
            scope = f"fpn_cells/cell_{cell}/sub_policy{i}/op_after_combine{inputs + i}"
            conv = "conv"
        yield f"{scope}/{conv}", f"{name}_conv"
        yield f"{scope}/bn", f"{name}_bn"


def _retinanet(plan: Plan) -> Iterator[tuple[str, str]]:
    for net in ("class", "box"):
        scope = f"retinanet/{net}_net/{net}"
        for i in range(plan.convs):
            yield f"{scope}-{i}", f"{net}_{i}"
            for level in graphs.OUTPUT_LEVELS:
                yield f"{scope}-{i}-{level}", f"{net}_{i}_p{level}_bn"
        yield f"{scope}-predict", f"{net}_predict"


def _mask_rcnn(plan: Plan) -> Iterator[tuple[str, str]]:
    for i in range(plan.rpn_convs):
        later = f"-{i}" if i else ""
        yield f"rpn_head/rpn{later}", f"rpn_{i}"
        for level in graphs.OUTPUT_LEVELS if plan.norm else ():
            yield f"rpn_head/rpn-l{level}-bn{later}", f"rpn_{i}_p{level}_bn"
    yield "rpn_head/rpn-class", "rpn_score"
    yield "rpn_head/rpn-box", "rpn_box"
    convs = [(f"conv_{i}", f"box_head_{i}") for i in range(plan.box_convs)]
    fcs = [(f"fc{6 + i}", "box_head_fc" + (str(i + 1) if i else "")) for i in range(plan.fcs)]
    yield from _hidden("fast_rcnn_head", [*convs, *fcs], plan.norm)
    yield "fast_rcnn_head/class-predict", "box_head_class"
    yield "fast_rcnn_head/box-predict", "box_head_box"
    convs = [(f"mask-conv-l{i}", f"mask_head_{i}") for i in range(plan.convs)]
    yield from _hidden("mask_head", [*convs, ("conv5-mask", "mask_head_up")], plan.norm)
    yield "mask_head/mask_fcn_logits", "mask_head_predict"


def _hidden(scope: str, pairs: list[tuple[str, str]], norm: bool) -> Iterator[tuple[str, str]]:
    """Named layers, each with a counted batch norm."""
    yield from ((f"{scope}/{theirs}", ours) for theirs, ours in pairs)
    if norm:
        yield from _count((scope, f"{ours}_bn") for _, ours in pairs)


def _classifier(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "classification_head/dense", "class_predict"
