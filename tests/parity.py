"""Copies weights between our models, Model Garden's and the official TF1 checkpoints."""

import re

import numpy as np

from spinenet_tf import graphs

BN = ("gamma", "beta", "moving_mean", "moving_variance")


def layer_of(model, name):
    """A layer by its name, also one that another holds."""
    return next(layer for layer in model._flatten_layers() if layer.name == name)


def randomize(model, seed=0):
    """Random weights with lively batch norms, so that every path matters."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "moving_variance" in variable.path or variable.path.endswith("gamma"):
            variable.assign(rng.uniform(0.6, 1.4, variable.shape))
        elif len(variable.shape) == 1:
            variable.assign(rng.normal(0, 0.1, variable.shape))
        elif "predict" in variable.path:
            variable.assign(rng.normal(0, 0.05, variable.shape))


def check_any_size(build, shapes, rng, close, prepare=randomize):
    """P_l is ceil(size / 2**l), and declaring the size changes neither weights nor outputs."""
    dynamic = build((None, None, 3))
    prepare(dynamic)
    for shape in shapes:
        static = build((*shape, 3))
        static.set_weights(dynamic.get_weights())
        image = rng.normal(size=(2, *shape, 3)).astype("f4")
        actual, expected = dynamic(image), static(image)
        for level in graphs.OUTPUT_LEVELS:
            sides = tuple(-(-side // 2**level) for side in shape)
            assert static.output[f"P{level}"].shape == (None, *sides, 8)
            assert actual[f"P{level}"].shape == (2, *sides, 8)
            close(actual[f"P{level}"], expected[f"P{level}"])


def layer_order(nodes, repeats):
    """Our (conv, bn) layer names of a SpineNet, stem to endpoints, as all codes create them."""
    yield "stem"
    for node in nodes:
        if node.parents:
            levels = [nodes[p].level for p in node.parents]
            for i, level in enumerate(levels):
                edge = f"block{node.index}_edge{i}"
                yield f"{edge}_squeeze"
                if level < node.level:
                    yield f"{edge}_down"
                yield f"{edge}_expand"
        for i in range(repeats):
            if node.index == 0 and i == 0:
                yield "block0_0_shortcut"
            for conv in range(3 if node.kind == "bottleneck" else 2):
                yield f"block{node.index}_{i}_{conv + 1}"
    for level in range(3, 8):
        yield f"p{level}"


def copy_to_model_garden(ours, theirs, head, nodes, repeats):
    """Sets Model Garden's backbone (and head) to the weights of our RetinaNet or SpineNet."""
    pairs = iter(_garden_convs(theirs, nodes, repeats))
    for name in layer_order(nodes, repeats):
        conv, norm = next(pairs)
        conv.kernel.assign(layer_of(ours, f"{name}_conv").kernel.numpy())
        _copy_norm(layer_of(ours, f"{name}_bn"), norm)
    assert next(pairs, None) is None
    for ours_name, prefix in (("class", "cls"), ("box", "box")) if head else ():
        convs, norms = getattr(head, f"_{prefix}_convs"), getattr(head, f"_{prefix}_norms")
        predictor = head._classifier if prefix == "cls" else head._box_regressor
        for i, conv in enumerate(convs):
            _copy_conv(ours.get_layer(f"{ours_name}_{i}"), conv)
            for k, level in enumerate(range(3, 8)):
                _copy_norm(ours.get_layer(f"{ours_name}_{i}_p{level}_bn"), norms[k][i])
        _copy_conv(ours.get_layer(f"{ours_name}_predict"), predictor)


def _garden_convs(model, nodes, repeats):
    def numbered(kind):
        def number(layer):
            return int(re.search(r"_(\d+)$", layer.name)[1]) if layer.name[-1].isdigit() else 0

        of_kind = [layer for layer in model.layers if type(layer).__name__ == kind]
        return iter(sorted(of_kind, key=lambda layer: number(layer) if "_" in layer.name else 0))

    convs, norms = numbered("Conv2D"), numbered("BatchNormalization")
    blocks = {"bottleneck": numbered("BottleneckBlock"), "residual": numbered("ResidualBlock")}
    yield next(convs), next(norms)
    for node in nodes:
        for parent in node.parents:
            for _ in range(3 if nodes[parent].level < node.level else 2):
                yield next(convs), next(norms)
        for _ in range(repeats):
            block = next(blocks[node.kind])
            if node.index == 0 and block._use_projection:
                yield block._shortcut, block._norm0
            for i in range(1, 4 if node.kind == "bottleneck" else 3):
                yield getattr(block, f"_conv{i}"), getattr(block, f"_norm{i}")
    for _ in range(5):
        yield next(convs), next(norms)


def _copy_conv(ours, theirs):
    theirs.kernel.assign(ours.kernel.numpy())
    theirs.bias.assign(ours.bias.numpy())


def _copy_norm(ours, theirs):
    for name in BN:
        getattr(theirs, name).assign(getattr(ours, name).numpy())


def official_names(nodes):
    """{our layer name: TF1 name} of a SpineNet without repeats, and of its RetinaNet heads."""

    def numbered(scope, layer, i):
        return f"{scope}/{layer}" + (f"_{i}" if i else "")

    counters, names = {}, {}
    for name in layer_order(nodes, 1):
        node, edge = re.match(r"block(\d+)", name), re.search(r"_edge(\d)_", name)
        scope = "spinenet"
        if node and int(node[1]) > 1:
            policy = int(node[1]) - 2
            scope += f"/sub_policy{policy}/"
            scope += (
                f"resample_with_alpha_resample_{policy}_{edge[1]}"
                if edge
                else f"scale_permuted_block_{policy + 2}"
            )
        i = counters[scope] = counters.get(scope, -1) + 1
        names[f"{name}_conv"] = numbered(scope, "conv2d", i)
        names[f"{name}_bn"] = numbered(scope, "batch_normalization", i)
    for head in ("class", "box"):
        names[f"{head}_predict"] = f"retinanet/{head}_net/{head}-predict"
        for i in range(4):
            names[f"{head}_{i}"] = f"retinanet/{head}_net/{head}-{i}"
            for level in range(3, 8):
                names[f"{head}_{i}_p{level}_bn"] = f"retinanet/{head}_net/{head}-{i}-{level}"
    return names


def load_official(model, reader, nodes):
    """Sets our RetinaNet to a TF1 checkpoint; every variable of both must be used."""
    left = set(reader.get_variable_to_shape_map()) - {"global_step"}
    for ours, theirs in official_names(nodes).items():
        for variable in layer_of(model, ours).variables:
            key = f"{theirs}/{variable.name}"
            variable.assign(reader.get_tensor(key))
            left.remove(key)
    assert not left


def copy_rpn(ours, theirs, convs):
    """Sets Model Garden's RPN head to ours."""
    for i in range(convs):
        _copy_conv(ours.get_layer(f"rpn_{i}"), theirs._convs[i])
        for k, level in enumerate(range(3, 8)):
            _copy_norm(ours.get_layer(f"rpn_{i}_p{level}_bn"), theirs._norms[k][i])
    _copy_conv(ours.get_layer("rpn_score"), theirs._classifier)
    _copy_conv(ours.get_layer("rpn_box"), theirs._box_regressor)


def _copy_tower(ours, theirs, name):
    for i, (conv, norm) in enumerate(zip(theirs._convs, theirs._conv_norms, strict=True)):
        _copy_conv(ours.get_layer(f"{name}_{i}"), conv)
        _copy_norm(ours.get_layer(f"{name}_{i}_bn"), norm)


def copy_box_head(ours, theirs):
    """Sets Model Garden's detection head to ours."""
    _copy_tower(ours, theirs, "box_head")
    _copy_conv(ours.get_layer("box_head_fc"), theirs._fcs[0])
    _copy_norm(ours.get_layer("box_head_fc_bn"), theirs._fc_norms[0])
    _copy_conv(ours.get_layer("box_head_class"), theirs._classifier)
    _copy_conv(ours.get_layer("box_head_box"), theirs._box_regressor)


def copy_mask_head(ours, theirs):
    """Sets Model Garden's mask head to ours."""
    _copy_tower(ours, theirs, "mask_head")
    _copy_conv(ours.get_layer("mask_head_up"), theirs._deconv)
    _copy_norm(ours.get_layer("mask_head_up_bn"), theirs._deconv_bn)
    _copy_conv(ours.get_layer("mask_head_predict"), theirs._mask_regressor)


def same_detections(found, stored, masks=None, stored_masks=None):
    """Asserts that two lists of detections hold the same; the order of equal scores means nothing.

    Args:
      found: our Detections. stored: {'detection_boxes', 'detection_scores', 'detection_classes',
        'num_detections'} of another code. masks, stored_masks: [b, k, 28, 28] of both.
    """
    np.testing.assert_array_equal(found.count, stored["num_detections"])
    theirs = [np.asarray(stored[f"detection_{k}"]) for k in ("boxes", "scores", "classes")]
    for i, count in enumerate(np.asarray(found.count)):
        boxes, scores, classes = (part[i] for part in theirs)
        free = set(range(count))
        for k in range(count):
            near = [
                j for j in free
                if classes[j] == found.classes[i, k]
                and abs(scores[j] - found.scores[i, k]) < 1e-4 * scores.max()
                and np.abs(boxes[j] - found.boxes[i, k]).max() < 1e-4 * boxes.max()
            ]  # fmt: skip
            assert near, (i, k, np.asarray(found.boxes[i, k]), float(found.scores[i, k]))
            free.remove(near[0])
            if masks is not None:
                differ = np.abs(np.asarray(stored_masks)[i, near[0]] - np.asarray(masks)[i, k])
                assert differ.max() < 1e-4
