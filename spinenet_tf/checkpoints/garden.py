"""Names of Model Garden's TF2 checkpoints (tf-models-official, official/vision).

Variables are found by the path of their objects: `head/_cls_convs/0/kernel`. The layers of a
backbone are only counted there, in the order of its graph, but the file also has the name that
Keras gave a variable, and Keras counts in the order of creation: `bottleneck_block_3/...`.
"""

import re
from collections.abc import Iterator

from spinenet_tf import graphs, specs
from spinenet_tf.checkpoints import order
from spinenet_tf.checkpoints.order import Plan, number

BACKBONE = r"backbone/layer_with_weights-\d+"
BLOCKS = ("bottleneck_block", "residual_block", "inverted_bottleneck_block")
# Our names within a block -> its attributes.
BOTTLENECK = {
    "shortcut_conv": "_shortcut",
    "shortcut_bn": "_norm0",
    **{f"{i}_conv": f"_conv{i}" for i in (1, 2, 3)},
    **{f"{i}_bn": f"_norm{i}" for i in (1, 2, 3)},
}
MBCONV = {
    "expand_conv": "_conv0",
    "expand_bn": "_norm0",
    "depthwise_conv": "_conv1",
    "depthwise_bn": "_norm1",
    "se_squeeze": "_squeeze_excitation/_se_reduce",
    "se_gate": "_squeeze_excitation/_se_expand",
    "project_conv": "_conv2",
    "project_bn": "_norm2",
}


def layers(names: dict[str, str]) -> dict[str, str]:
    """{Model Garden's layer: our layer} of a whole network.

    Args:
      names: {path of a variable: the name that Keras gave it}.

    Raises:
      ValueError: no backbone or decoder that we know.
    """
    tops, blocks = _backbone_layers(names)
    plan = _plan(names, tops, blocks)
    pairs = dict(_backbone_pairs(plan, tops, blocks))
    if plan.decoder:
        pairs |= dict(_decoder_pairs(names))
    if plan.head == "RetinaNet":
        pairs |= dict(_retinanet(plan))
    if plan.head == "MaskRCNN":
        pairs |= dict(_mask_rcnn(plan, names))
    return pairs


def _backbone_layers(names: dict[str, str]) -> tuple[dict, dict]:
    """The paths of a backbone's layers by kind, each in order of creation; and of its blocks."""
    tops, blocks = {}, {}
    for path, name in names.items():
        layer = re.match(BACKBONE, path)
        if not layer:
            continue
        kind, count = _counted(name.split("/")[0])
        if kind in BLOCKS:
            blocks.setdefault(kind, {})[count] = layer[0]
        else:
            variable = path.split("/")[-1]
            kind = {"kernel": "conv2d", "depthwise_kernel": "depthwise_conv2d"}.get(variable)
            tops.setdefault(kind or "batch_normalization", {})[count] = layer[0]
    return _sorted(tops), _sorted(blocks)


def _counted(name: str) -> tuple[str, int]:
    """'conv2d_12' -> ('conv2d', 12); 'conv2d' -> ('conv2d', 0)."""
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", name)
    return match[1], int(match[2] or 0)


def _sorted(counted: dict[str, dict[int, str]]) -> dict[str, list[str]]:
    return {kind: [paths[n] for n in sorted(paths)] for kind, paths in counted.items()}


def _plan(names: dict[str, str], tops: dict, blocks: dict) -> Plan:
    counted = _head(set(names))
    size = {kind: len(paths) for kind, paths in blocks.items()}
    if "inverted_bottleneck_block" in size:
        counted["backbone"] = "mobile"
    elif len(tops.get("conv2d", ())) > 1:  # a ResNet has no convolution outside its blocks
        kinds = [node.kind for node in graphs.wire(graphs.SPINENET_49)]
        repeats = size.get("bottleneck_block", 0) // kinds.count("bottleneck")
        counted |= {"backbone": "spinenet", "repeats": max(repeats, 1)}
    elif size:
        counted |= {"backbone": _resnet(size), "project": True}
    else:
        raise ValueError("no backbone that this package has")
    if any(path.startswith("decoder/") for path in names):
        counted["decoder"] = "fpn"
    return Plan(**counted)


def _resnet(size: dict[str, int]) -> str:
    for name, row in specs.RESNETS.items():
        if size == {f"{row.kind}_block": sum(row.blocks)}:
            return name
    raise ValueError(f"no ResNet here has blocks as many as {size}")


def _head(paths: set[str]) -> dict:
    if any(path.startswith("rpn_head/") for path in paths):
        detection = r"detection_head/(?:0/)?"
        return {
            "head": "MaskRCNN",
            "convs": number(paths, r"mask_head/_convs/(\d+)/"),
            "rpn_convs": number(paths, r"rpn_head/_convs/(\d+)/"),
            "box_convs": number(paths, rf"{detection}_convs/(\d+)/"),
            "fcs": number(paths, rf"{detection}_fcs/(\d+)/"),
        }
    if any(path.startswith("head/") for path in paths):
        return {"head": "RetinaNet", "convs": number(paths, r"head/_(?:cls|box)_convs/(\d+)/")}
    return {}


def _backbone_pairs(plan: Plan, tops: dict, blocks: dict) -> Iterator[tuple[str, str]]:
    """A kind's layers are taken in order; where the file has too few, a name that it has not."""
    tops, blocks = ({k: iter(v) for k, v in group.items()} for group in (tops, blocks))
    attributes = MBCONV if plan.backbone == "mobile" else BOTTLENECK
    block_of = {}
    for place, layer in order.backbone(plan):
        if place[0] != "block":
            kind = _kind(layer)
            yield next(tops.get(kind, iter(())), f"(no {kind} for {layer})"), layer
            continue
        if place not in block_of:
            kind = _block_kind(plan, place)
            block_of[place] = next(blocks.get(kind, iter(())), f"(no {kind} for {layer})")
        step = layer.split("_", 1 if plan.backbone == "mobile" else 2)[-1]
        yield f"{block_of[place]}/{attributes[step]}", layer


def _kind(layer: str) -> str:
    if layer.endswith("_bn"):
        return "batch_normalization"
    return "depthwise_conv2d" if re.search(r"_down\d_conv$", layer) else "conv2d"


def _block_kind(plan: Plan, place: tuple) -> str:
    if plan.backbone == "mobile":
        return "inverted_bottleneck_block"
    if plan.backbone == "spinenet":
        return f"{graphs.wire(graphs.SPINENET_49)[place[1]].kind}_block"
    return f"{specs.RESNETS[plan.backbone].kind}_block"


def _decoder_pairs(names: dict[str, str]) -> Iterator[tuple[str, str]]:
    for path, name in names.items():
        match = re.fullmatch(r"(lateral|post_hoc|coarser|norm)_(\d)", name.split("/")[0])
        if path.startswith("decoder/") and match:
            ours = f"p{match[2]}_bn" if match[1] == "norm" else f"{match[1]}{match[2]}_conv"
            yield path.rsplit("/", 1)[0], ours


def _retinanet(plan: Plan) -> Iterator[tuple[str, str]]:
    for theirs, ours, predictor in (
        ("cls", "class", "_classifier"), ("box", "box", "_box_regressor"),
    ):  # fmt: skip
        yield f"head/{predictor}", f"{ours}_predict"
        for i in range(plan.convs):
            yield f"head/_{theirs}_convs/{i}", f"{ours}_{i}"
            for k, level in enumerate(graphs.OUTPUT_LEVELS):
                yield f"head/_{theirs}_norms/{k}/{i}", f"{ours}_{i}_p{level}_bn"


def _mask_rcnn(plan: Plan, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    for i in range(plan.rpn_convs):
        yield f"rpn_head/_convs/{i}", f"rpn_{i}"
        for k, level in enumerate(graphs.OUTPUT_LEVELS):
            yield f"rpn_head/_norms/{k}/{i}", f"rpn_{i}_p{level}_bn"
    yield "rpn_head/_classifier", "rpn_score"
    yield "rpn_head/_box_regressor", "rpn_box"
    # A list of heads in releases that can cascade them.
    listed = any(path.startswith("detection_head/0/") for path in names)
    box = "detection_head/0" if listed else "detection_head"
    yield from _tower(box, "box_head", plan.box_convs)
    for i in range(plan.fcs):
        ours = "box_head_fc" + (str(i + 1) if i else "")
        yield f"{box}/_fcs/{i}", ours
        yield f"{box}/_fc_norms/{i}", f"{ours}_bn"
    yield f"{box}/_classifier", "box_head_class"
    yield f"{box}/_box_regressor", "box_head_box"
    yield from _tower("mask_head", "mask_head", plan.convs)
    yield "mask_head/_deconv", "mask_head_up"
    yield "mask_head/_deconv_bn", "mask_head_up_bn"
    yield "mask_head/_mask_regressor", "mask_head_predict"


def _tower(theirs: str, ours: str, convs: int) -> Iterator[tuple[str, str]]:
    for i in range(convs):
        yield f"{theirs}/_convs/{i}", f"{ours}_{i}"
        yield f"{theirs}/_conv_norms/{i}", f"{ours}_{i}_bn"
