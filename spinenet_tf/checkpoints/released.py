"""The checkpoints that the paper's authors and Model Garden have released, and what they need.

From tensorflow/tpu's MODEL_ZOO, its configs, and Model Garden's pages. None was at hand when this
was written, so the accuracies are the zoo's and batch norm's epsilon is the likeliest: configs of
different dates have 1e-3 and 1e-4.
"""

from pathlib import PurePath
from typing import NamedTuple

from spinenet_tf import specs


class Release(NamedTuple):
    """A released file.

    Attributes:
      name: of the archive, without .tar.gz; RetinaNet's and Mask R-CNN's may share it.
      network: which of our builders makes it.
      size: row of `specs`.
      image_size: pixels.
      activation: 'relu' or 'swish'.
      accuracy: as published, on COCO val2017 or ImageNet's validation set.
      anchor_size: `Anchors.size`.
      note: what else is known.
      kind: 'official' or 'model_garden', as in `files.Weights`.
    """

    name: str
    network: str
    size: str
    image_size: int
    activation: str
    accuracy: str
    anchor_size: float = 3.0
    note: str = ""
    kind: str = "official"


_RETINANET = [
    ("r50-fpn", "R50-FPN", 640, "relu", "AP 40.4"),
    ("r50-nasfpn", "R50-NAS-FPN", 640, "relu", "AP 42.4"),
    ("spinenet-49S", "49S", 640, "relu", "AP 39.5"),
    ("spinenet-49", "49", 640, "relu", "AP 42.8"),
    ("spinenet-96", "96", 1024, "relu", "AP 46.7"),
    ("spinenet-143", "143", 1280, "relu", "AP 48.0", 4.0),
    ("spinenet-49S-best", "49S", 640, "swish", "AP 41.5"),
    ("spinenet-49-best", "49", 640, "swish", "AP 44.3"),
    ("spinenet-96-best", "96", 1024, "swish", "AP 48.5"),
    ("spinenet-143-best", "143", 1280, "swish", "AP 50.6", 4.0),
    ("spinenet-190-best", "190", 1280, "swish", "AP 52.0", 4.0),
    ("spinenet-143-ssl", "143", 1280, "swish", "AP 52.6", 4.0, "self-training"),
    ("spinenet-190-ssl", "190", 1280, "swish", "AP 54.2", 4.0, "self-training"),
    ("spinenetmbconv-49-best", "mobile-49", 384, "swish", "AP 28.6"),
]  # fmt: skip
_GARDEN = [
    ("spinenet-49-i640", "49", 640, "swish", "AP 44.2"),
    ("spinenet-96-i1024", "96", 1024, "swish", "AP 48.5"),
    ("spinenet-143-i1280", "143", 1280, "swish", "AP 50.0", 4.0),
    (
        "spinenet49mobile", "mobile-49", 384, "swish", "AP 28.1", 3.0,
        "its last configs train with hard_swish, which is not here",
    ),
]  # fmt: skip
_MASK_RCNN = [
    ("spinenet-49", "49", 640, "relu", "AP 42.8, mask 37.8"),
    ("spinenet-96", "96", 1024, "relu", "AP 46.8, mask 41.2"),
    ("spinenet-143", "143", 1280, "relu", "AP 48.7, mask 42.6"),
    ("spinenet-190", "190", 1536, "swish", "AP 52.0, mask 45.9", 5.0, "one RPN convolution"),
]
_IMAGENET = [
    ("spinenet-49-imagenet", "49", 224, "relu", "top-1 77.0"),
    ("spinenet-96-imagenet", "96", 224, "relu", "top-1 78.2"),
    ("spinenet-143-imagenet", "143", 224, "relu", "top-1 79.0"),
    ("spinenet-49-best-imagenet", "49", 224, "swish", "top-1 78.1"),
    ("spinenet-96-best-imagenet", "96", 224, "swish", "top-1 79.4"),
    ("spinenet-143-best-imagenet", "143", 224, "swish", "top-1 80.1"),
    ("spinenet-190-best-imagenet", "190", 224, "swish", "top-1 80.8"),
    ("resnet-34-imagenet", "R34", 224, "relu", "top-1 74.4"),
    ("resnet-101-imagenet", "R101", 224, "relu", "top-1 78.2"),
    ("resnet-152-imagenet", "R152", 224, "relu", "top-1 78.4"),
]

RELEASES = [
    *(Release(row[0], "RetinaNet", *row[1:]) for row in _RETINANET),
    *(Release(row[0], "RetinaNet", *row[1:])._replace(kind="model_garden") for row in _GARDEN),
    *(Release(row[0], "MaskRCNN", *row[1:]) for row in _MASK_RCNN),
    *(Release(row[0], "Classifier", *row[1:]) for row in _IMAGENET),
]

# COCO's classes by label; a gap is an id that the data set left out.
_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, , stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
bear, zebra, giraffe, , backpack, umbrella, , , handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, , wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, ,
dining table, , , toilet, , tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
toaster, sink, refrigerator, , book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
COCO = [name.strip() for name in _COCO.split(",")]

# For models that are none of them: what is likeliest.
EPSILONS = {"Classifier": 1e-5, "RetinaNet": 1e-3, "MaskRCNN": 1e-3, "": 1e-3}
SIDES = {"mobile-49XS": 256, "mobile-49S": 384, "R101-FPN": 1024, "R152-FPN": 1280}


def release_of(path: str, kind: str, network: str, size: str) -> Release | None:
    """The release of this origin, network and size after which a folder or file is named."""
    parts = {part.removesuffix(".tar.gz") for part in PurePath(path).parts}
    model = (kind, network, size)
    found = [r for r in RELEASES if r.name in parts and (r.kind, r.network, r.size) == model]
    return found[0] if found else None


def settings(release: Release) -> dict[str, str | float]:
    """What the shapes of a model do not tell."""
    found = {
        "activation": release.activation,
        "epsilon": EPSILONS[release.network],
        "image_size": release.image_size,
        "anchor_size": release.anchor_size,
    }
    if release.network not in ("RetinaNet", "MaskRCNN"):
        del found["anchor_size"]
    return found


def likeliest(kind: str, network: str, size: str) -> Release:
    """The first release of a model, which is the plain one; or one made up, without a name."""
    for release in RELEASES:
        if (release.kind, release.network, release.size) == (kind, network, size):
            return release._replace(name="")
    side = 224 if network == "Classifier" else SIDES.get(size, 640)
    theirs = kind == "model_garden" and network == "RetinaNet" and size in specs.SIZES
    activation = "swish" if theirs or size == "190" or size.startswith("mobile") else "relu"
    return Release("", network, size, side, activation, "", 4.0 if side >= 1280 else 3.0)


def categories(network: str, num_classes: int | None) -> list[dict]:
    """COCO's categories for detectors with its 91 classes; [] where nothing is known."""
    if not network or network == "Classifier" or num_classes != len(COCO) + 1:
        return []
    return [{"id": i, "name": n, "label": i} for i, n in enumerate(COCO, 1) if n]


def table() -> str:
    """The releases as the README's Markdown table."""
    rows = ["| file | model | image | activation | published |", "| --- | --- | --- | --- | --- |"]
    for r in RELEASES:
        garden = "Model Garden" if r.kind == "model_garden" else ""
        note = "".join(f"; {said}" for said in (garden, r.note) if said)
        model = f"{r.network} {r.size}"
        rows.append(
            f"| {r.name} | {model} | {r.image_size} | {r.activation} | {r.accuracy}{note} |"
        )
    return "\n".join(rows)
