"""What is written beside weights so that they can be used: a JSON object, and models out of it.

Its keys: network (builder of the model, '' for a backbone alone), size, bindings (arguments of the
builders, by their gin names), task (its fields), categories ([{'id', 'name', 'label'}]),
preprocessing, and source (where foreign weights are from).
"""

import dataclasses
from typing import Any

import gin
import keras

from spinenet_tf import specs
from spinenet_tf.checkpoints import recognize, released
from spinenet_tf.models.backbones import BUILDERS
from spinenet_tf.models.classifier import Classifier
from spinenet_tf.models.layers import Style
from spinenet_tf.models.resnet import ResNet
from spinenet_tf.ops import augment
from spinenet_tf.ops.anchors import Anchors
from spinenet_tf.tasks.classification import Classification
from spinenet_tf.tasks.detection import Detection, RetinaNet
from spinenet_tf.tasks.instances import InstanceSegmentation, MaskRCNN

TASKS = {task.network: task for task in (Detection, InstanceSegmentation, Classification)}
NETWORKS = {"RetinaNet": RetinaNet, "MaskRCNN": MaskRCNN, "Classifier": Classifier}
HEADS = {"RetinaNet": specs.RETINANET_HEADS, "MaskRCNN": specs.REGION_HEADS}
TABLES = (*BUILDERS, (specs.RESNETS, ResNet))
# The order of an anchor's ratios is the order of the prediction's channels.
ASPECT_RATIOS = {"official": (1.0, 2.0, 0.5), "model_garden": (0.5, 1.0, 2.0)}
PREPROCESSING = {
    "channels": "RGB",
    "mean": [255 * float(c) for c in augment.MEAN],
    "stddev": [255 * float(c) for c in augment.STDDEV],
}


def of_run(task: Any, categories: list[dict]) -> dict:
    """The description of the model that a task builds under the recipe that gin has read."""
    network = gin.get_bindings(task.network)
    size = network.get("size", "49")
    names = {task.network, _builder(size).__name__}
    bindings = {name: dict(gin.get_bindings(name)) for name in sorted(names)}
    bindings["Style"] = dataclasses.asdict(Style())
    return _description(task, size, bindings, categories)


def of_foreign(path: str, kind: str, facts: dict[str, Any], given: dict[str, Any]) -> dict:
    """The description of weights whose shapes gave `facts` (see `recognize`).

    What shapes cannot tell comes from `given`, then from the name of a released file, then from
    what is likeliest; prints what was taken for granted.

    Args:
      path: of the checkpoint.
      kind: 'official' or 'model_garden'.
      given: activation, epsilon, image_size and anchor_size, or None for each.
    """
    network, size = facts["network"], facts["size"]
    release = released.release_of(path, kind, network, size)
    release = release or released.likeliest(kind, network, size)
    guessed = released.settings(release)
    chosen = {k: v if given[k] is None else given[k] for k, v in guessed.items()}
    _say(path, facts, release, {k: v for k, v in guessed.items() if given[k] is None})
    style = Style(activation=chosen["activation"], epsilon=chosen["epsilon"], numerics=kind)
    bindings = {"Style": dataclasses.asdict(style)} | _overrides(facts)
    task = _foreign_task(facts, kind, chosen)
    source = {"path": path, "kind": kind, "release": release.name}
    categories = released.categories(network, facts.get("num_classes"))
    return _description(task, size, bindings, categories) | {
        "network": network, "source": source | chosen, "image_size": chosen["image_size"],
    }  # fmt: skip


def build(description: dict) -> tuple[Any, keras.Model]:
    """The task (None for a backbone alone) and the model, with random weights.

    Raises:
      ValueError: a size or setting that this version does not know.
    """
    network, size = description["network"], description["size"]
    bindings = {name: dict(values) for name, values in description["bindings"].items()}
    style, builder = bindings["Style"], _builder(size)
    side = description["image_size"]
    options = bindings.get(builder.__name__, {}) | {"input_shape": (side, side, 3)}
    options.pop("size", None)
    arguments = bindings.get(network, {})
    arguments.pop("size", None)
    if network in HEADS:
        row = specs.row(HEADS[network], size, endpoints=arguments.pop("endpoints", None))
        options["endpoints"] = row.endpoints
    backbone = builder(size, **options, **style)
    if not network:
        return None, backbone
    task = _task(network, description["task"])
    arguments |= {"num_classes": task.num_classes, "backbone": backbone}
    if network in HEADS:
        arguments["anchors_per_place"] = task.anchors.per_place
    return task, NETWORKS[network](size, **arguments, **style)


def recipe(description: dict) -> str:
    """A gin recipe of the same model: for evaluation, export and further training."""
    network = description["network"]
    task = TASKS[network]
    lines = [
        f"# Written with the weights from {description.get('source', {}).get('path', '')}",
        f"make_task.task = @{task.__name__}",
        f"{network}.size = {description['size']!r}",
    ]
    for name, values in sorted(description["bindings"].items()):
        if name == "Style":
            lines += _changed(name, Style, values)
        else:
            lines += [f"{name}.{k} = {_tuples(v)!r}" for k, v in values.items() if k != "size"]
    fields = dict(description["task"])
    anchors = dict(fields.pop("anchors", {}))
    if anchors:
        lines.append(f"Anchors.scales = {anchors.pop('scales')}")  # the default is the task's
    lines += _changed("Anchors", Anchors, anchors)
    lines += _changed(task.__name__, task, fields)
    lines += [f"Data.canvas = {description['image_size']}", "Data.batch_size = 8"]
    lines += ["make_strategy.kind = 'auto'", "Training.precision = 'float32'"]
    return "\n".join(lines) + "\n"


def _changed(name: str, of: type, values: dict) -> list[str]:
    """Bindings of the fields of a dataclass that have not their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(of)}
    values = {k: _tuples(v) for k, v in values.items()}
    return [f"{name}.{k} = {v!r}" for k, v in values.items() if v != defaults[k]]


def _description(task: Any, size: str, bindings: dict, categories: list[dict]) -> dict:
    return {
        "network": task.network if task else "",
        "size": size,
        "image_size": task.image_size if task else None,
        "bindings": bindings,
        "task": dataclasses.asdict(task) if task else {},
        "preprocessing": PREPROCESSING,
        "categories": categories,
    }


def _builder(size: str):
    """Which function makes the backbone of a size."""
    return next(builder for table, builder in TABLES if size in table)


def _overrides(facts: dict[str, Any]) -> dict[str, dict]:
    """The arguments of the builders by which the facts differ from the tables."""
    network, size, family = facts["network"], facts["size"], facts["family"]
    overrides = {}
    if network in HEADS:
        overrides[network] = _differing(facts, HEADS[network][size])
    table = {"SpineNet": specs.SIZES, "SpineNetMobile": specs.MOBILE_SIZES}.get(family)
    backbone = _differing(facts, table[size]) if table else {}
    if network in HEADS:
        backbone.pop("endpoints", None)  # the head's
    if facts.get("project"):
        backbone["project"] = True
    return overrides | ({family: backbone} if backbone else {})


def _differing(facts: dict[str, Any], row: Any) -> dict[str, Any]:
    found = {k: facts[k] for k in row._fields if facts.get(k) is not None}
    found = {k: v for k, v in found.items() if v != getattr(row, k)}
    if facts.get("box_convs") == facts.get("convs"):
        found.pop("box_convs", None)  # its default
    return found


def _foreign_task(facts: dict[str, Any], kind: str, chosen: dict[str, Any]) -> Any:
    network = facts["network"]
    if not network:
        return None
    fields = {"image_size": chosen["image_size"], "num_classes": facts["num_classes"]}
    if network in HEADS:
        ratios = ASPECT_RATIOS[kind]
        scales = facts["anchors_per_place"] // len(ratios)
        size = chosen["anchor_size"]
        fields["anchors"] = Anchors(size=size, scales=scales, aspect_ratios=ratios)
        fields["inclusive_boxes"] = kind == "official"
    return TASKS[network](**fields)


def _task(network: str, fields: dict) -> Any:
    fields = {name: _tuples(value) for name, value in fields.items()}
    if "anchors" in fields:
        fields["anchors"] = Anchors(**{k: _tuples(v) for k, v in fields["anchors"].items()})
    return TASKS[network](**fields)


def _tuples(value: Any) -> Any:
    """JSON has lists where our fields are tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _say(path: str, facts: dict, release: released.Release, guessed: dict) -> None:
    shown = {k: v for k, v in facts.items() if k in recognize.WORDS and v not in (None, "", False)}
    print(f"{path}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    if guessed:
        why = f"the release {release.name}" if release.name else "no more than likely"
        settings = ", ".join(f"{k}={v}" for k, v in guessed.items())
        print(f"shapes do not tell {settings}: {why}; if wrong, give them as arguments or flags")
