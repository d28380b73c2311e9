"""The checkpoints that the paper's authors and Model Garden have released, and what they need.

From tensorflow/tpu's MODEL_ZOO, its configs, and Model Garden's pages. None was at hand when this
was written, so the accuracies are the zoo's and batch norm's epsilon is the likeliest: configs of
different dates have 1e-3 and 1e-4.
"""

from pathlib import PurePath
from typing import NamedTuple


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
    """

    name: str
    network: str
    size: str
    image_size: int
    activation: str
    accuracy: str
    anchor_size: float = 3.0
    note: str = ""


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
    ("spinenet-49-i640", "49", 640, "swish", "AP 44.2", 3.0, "Model Garden"),
    ("spinenet-96-i1024", "96", 1024, "swish", "AP 48.5", 3.0, "Model Garden"),
    ("spinenet-143-i1280", "143", 1280, "swish", "AP 50.0", 4.0, "Model Garden"),
    (
        "spinenet49mobile", "mobile-49", 384, "swish", "AP 28.1", 3.0,
        "Model Garden; its last configs train with hard_swish, which is not here",
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
    *(Release(row[0], "MaskRCNN", *row[1:]) for row in _MASK_RCNN),
    *(Release(row[0], "Classifier", *row[1:]) for row in _IMAGENET),
]

# For models that are none of them: what is likeliest by size.
IMAGE_SIZES = {"Classifier": 224, "RetinaNet": 640, "MaskRCNN": 640, "": 640}
EPSILONS = {"Classifier": 1e-5, "RetinaNet": 1e-3, "MaskRCNN": 1e-3, "": 1e-3}
SIZED = {
    "mobile-49XS": (256, 3.0), "mobile-49S": (384, 3.0),
    "R101-FPN": (1024, 3.0), "R152-FPN": (1280, 4.0),
}  # fmt: skip


def release_of(path: str, network: str, size: str) -> Release | None:
    """The release of this network and size that a folder or file of `path` is named after."""
    parts = {part.removesuffix(".tar.gz") for part in PurePath(path).parts}
    found = [r for r in RELEASES if r.name in parts and (r.network, r.size) == (network, size)]
    return found[0] if found else None


def likely(network: str, size: str) -> tuple[int, float]:
    """Image size and anchor size of a model whose file name says nothing."""
    if size in SIZED and network != "Classifier":
        return SIZED[size]
    of_size = [r for r in RELEASES if (r.network, r.size) == (network, size)]
    if of_size:
        return of_size[0].image_size, of_size[0].anchor_size
    return IMAGE_SIZES[network], 3.0


def table() -> str:
    """The releases as the README's Markdown table."""
    rows = ["| file | model | image | activation | published |", "| --- | --- | --- | --- | --- |"]
    for r in RELEASES:
        note = f"; {r.note}" if r.note else ""
        model = f"{r.network} {r.size}"
        rows.append(
            f"| {r.name} | {model} | {r.image_size} | {r.activation} | {r.accuracy}{note} |"
        )
    return "\n".join(rows)
