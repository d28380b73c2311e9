"""A synthetic detection set in COCO format: shapes of every size on textured backgrounds.

Six classes that differ in shape alone; colour, gradient, outline, size (8 to 200 px), rotation and
background tell nothing about the class. Objects hide one another, and annotations are those of the
visible pixels. NumPy and Pillow only; the same seed gives the same bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

MIN_SIDE, MAX_SIDE = 8, 200  # pixels, of the longer side of an object
MAX_FRACTION = 0.6  # of the image's short side
MAX_OBJECTS = 8
MIN_VISIBLE = 0.35  # of an object's own area; what would hide more is placed elsewhere
MAX_TURN = 25  # degrees either way; more would make a diamond of the square
CROWD_RATE = 0.02  # of the images have a crowd region
CROWD_MEMBERS = (15, 30)
CROWD_MEMBER_SIDE = (8, 14)
MIN_CONTRAST = 110  # distance in RGB between an object's colours and what lies under it
SUPERSAMPLING = 3
PLACEMENT_TRIES = 12
JPEG_QUALITY = 92
SPLITS = {"train": 1, "val": 2}  # part of every image's seed, so that no picture is in both


def _radial(radii: Sequence[float], points: int) -> np.ndarray:
    """A closed outline whose radius takes the given values in turn, first point at the top."""
    angles = 2 * np.pi * np.arange(points) / points
    radius = np.resize(radii, points)
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], -1)


_CROSS = np.array(
    [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)], float
) / 3  # one half; the other is its mirror image
_SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)

# Outline and hole of each class; the label is the place in the table, from 1.
SHAPES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "disc": (_radial([1], 60), None),
    "square": (_SQUARE, None),
    "triangle": (_radial([1], 3), None),
    "ring": (_radial([1], 60), _radial([0.55], 60)),
    "cross": (np.concatenate([_CROSS, -_CROSS]), None),
    "star": (_radial([1, 0.42], 10), None),
}
NAMES = tuple(SHAPES)


@dataclass(frozen=True)
class VisibleObject:
    """What can be seen of an object, or of a crowd of them."""

    label: int  # 1 is the first of NAMES
    mask: np.ndarray  # [h, w] bool
    crowd: bool = False

    @property
    def area(self) -> int:
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight xmin, ymin, width, height."""
        return _tight_box(self.mask)


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        return 0, 0, 0, 0
    return tuple(int(v) for v in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1))


class Canvas:
    """The picture so far, and for each pixel the number of the object seen there (0: none)."""

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.rng = rng
        self.pixels = _background(rng, height, width)
        self.owner = np.zeros([height, width], np.uint8)
        self.full_areas = [0.0]  # pixels that each object would have with nothing in front
        self.labels = [0]
