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


_HALF_CROSS = np.array([(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]) / 3
_SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)

# Outline and hole of each class; the label is the place in the table, from 1.
SHAPES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "disc": (_radial([1], 60), None),
    "square": (_SQUARE, None),
    "triangle": (_radial([1], 3), None),
    "ring": (_radial([1], 60), _radial([0.55], 60)),
    "cross": (np.concatenate([_HALF_CROSS, -_HALF_CROSS]), None),
    "star": (_radial([1, 0.42], 10), None),
}
NAMES = tuple(SHAPES)


@dataclass(frozen=True)
class VisibleObject:
    """What can be seen of an object or a crowd."""

    label: int  # 1 is the first of NAMES
    mask: np.ndarray  # [h, w] bool
    crowd: bool = False

    @property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """xmin, ymin, width, height of the visible pixels."""
        return _tight_box(self.mask)


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        return 0, 0, 0, 0
    return tuple(int(v) for v in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1))


def _place(
    rng: np.random.Generator, label: int, side: float, centre: np.ndarray
) -> list[np.ndarray]:
    """Outline, and hole if any, in pixels: turned a little, the longer side `side`."""
    outline, hole = SHAPES[NAMES[label - 1]]
    turn = np.deg2rad(rng.uniform(-MAX_TURN, MAX_TURN))
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    matrix = rotation * side / np.ptp(outline @ rotation, 0).max()
    return [points @ matrix + centre for points in (outline, hole) if points is not None]


def _polygon_area(points: np.ndarray) -> float:
    (x, y), (x2, y2) = points.T, np.roll(points, -1, 0).T
    return abs(float(np.sum(x * y2 - x2 * y))) / 2


def _coverage(
    polygons: list[np.ndarray], window: tuple[int, int, int, int], line: float = 0
) -> np.ndarray:
    """How much of each pixel of the window the shape (or its outline as a line) covers, 0..1."""
    x, y, w, h = window
    image = Image.new("L", (w * SUPERSAMPLING, h * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for points, value in zip(polygons, (255, 0), strict=False):
        flat = ((points - (x, y)) * SUPERSAMPLING - 0.5).ravel().tolist()
        if line:
            draw.line(flat + flat[:4], 255, round(line * SUPERSAMPLING))
        else:
            draw.polygon(flat, value)
    return np.asarray(image.reduce(SUPERSAMPLING), np.float32) / 255


def _contrasting(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - under) >= MIN_CONTRAST:
            return colour


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width, 3] float32: a smooth gradient, a few stray lines and noise of some grain."""
    size = width, height
    cells = rng.integers(2, 5, 2)
    colours = rng.uniform(60, 195, 3) + rng.uniform(-55, 55, [*cells, 3])
    image = Image.fromarray(colours.clip(0, 255).astype(np.uint8)).resize(size, Image.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 6)):
        ends = (rng.uniform(0, 1, [2, 2]) * size).ravel().tolist()
        draw.line(ends, tuple(rng.integers(0, 256, 3).tolist()), int(rng.integers(1, 4)))
    grain = int(rng.integers(1, 7))
    noise = rng.standard_normal([-(-height // grain), -(-width // grain)], np.float32)
    noise = np.asarray(Image.fromarray(noise).resize(size, Image.BILINEAR))
    return np.asarray(image, np.float32) + noise[..., None] * rng.uniform(2, 22)


class Canvas:
    """The picture so far, and for each pixel the number of the object seen there (0: none)."""

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.rng = rng
        self.pixels = _background(rng, height, width)
        self.owner = np.zeros([height, width], np.uint8)
        self.labels = [0]
        self.full_areas = [0.0]  # pixels of each object if nothing hid any of it
        self.crowd = 0  # the number of the crowd region, if there is one

    @property
    def size(self) -> np.ndarray:
        """Width and height."""
        return np.array(self.owner.shape[::-1])

    def add_object(self) -> bool:
        """Draws one object over the others where it hides none of them too much."""
        label = int(self.rng.integers(1, len(NAMES) + 1))
        longest = min(MAX_SIDE, MAX_FRACTION * self.size.min())
        side = np.exp(self.rng.uniform(np.log(MIN_SIDE), np.log(longest)))
        for _ in range(PLACEMENT_TRIES):
            centre = self.rng.uniform(0.3 * side, self.size - 0.3 * side)
            polygons = _place(self.rng, label, side, centre)
            full = _polygon_area(polygons[0]) - sum(map(_polygon_area, polygons[1:]))
            if self._draw(polygons, label, full):
                return True
        return False

    def add_crowd(self) -> None:
        """Draws a cluster of small objects of one class that count as one region."""
        label = int(self.rng.integers(1, len(NAMES) + 1))
        self.crowd = len(self.labels)
        middle = self.rng.uniform(0.25, 0.75, 2) * self.size
        for _ in range(self.rng.integers(*CROWD_MEMBERS)):
            centre = middle + self.rng.normal(0, 0.08 * self.size.min(), 2)
            side = self.rng.uniform(*CROWD_MEMBER_SIDE)
            polygons = _place(self.rng, label, side, centre)
            self.owner, window, coverage = self._owner_with(polygons, self.crowd)
            self._paint([], window, coverage)
        self.labels.append(label)
        self.full_areas.append(float((self.owner == self.crowd).sum()))

    def visible_objects(self) -> list[VisibleObject]:
        """What has been drawn, in order, as far as later objects leave it to be seen."""
        visible = [self.owner == number for number in range(len(self.labels))]
        numbered = enumerate(zip(self.labels, visible, strict=True))
        return [VisibleObject(label, m, n == self.crowd) for n, (label, m) in numbered if n]

    def _draw(self, polygons: list[np.ndarray], label: int, full_area: float) -> bool:
        owner, window, coverage = self._owner_with(polygons, len(self.labels))
        full_areas = [*self.full_areas, full_area]
        if not _enough_visible(owner, full_areas):
            return False
        self.owner, self.full_areas = owner, full_areas
        self.labels.append(label)
        self._paint(polygons, window, coverage)
        return True

    def _owner_with(
        self, polygons: list[np.ndarray], number: int
    ) -> tuple[np.ndarray, tuple[int, int, int, int], np.ndarray]:
        """`owner` with one more shape; the shape's window (x, y, w, h) and its coverage of it."""
        low = np.floor(polygons[0].min(0) - 1).clip(0, self.size).astype(int)
        high = np.ceil(polygons[0].max(0) + 1).clip(0, self.size).astype(int)
        window = *low.tolist(), *np.maximum(high - low, 1).tolist()
        coverage = _coverage(polygons, window)
        owner = self.owner.copy()
        _crop(owner, window)[coverage >= 0.5] = number
        return owner, window, coverage

    def _paint(
        self, polygons: list[np.ndarray], window: tuple[int, int, int, int], coverage: np.ndarray
    ) -> None:
        """Fills the shape with a colour gradient; half of the shapes get an outline."""
        patch, alpha = _crop(self.pixels, window), coverage[..., None]
        under = (patch * alpha).sum((0, 1)) / max(coverage.sum(), 1)
        colour, change = _contrasting(self.rng, under), self.rng.uniform(-45, 45, [2, 3])
        y, x = np.mgrid[-0.5 : 0.5 : coverage.shape[0] * 1j, -0.5 : 0.5 : coverage.shape[1] * 1j]
        fill = colour + np.stack([y, x], -1) @ change
        patch += alpha * (fill - patch)
        if polygons and self.rng.random() < 0.5:
            line = max(1.0, self.rng.uniform(0.02, 0.06) * max(window[2:]))
            edge = np.minimum(_coverage(polygons, window, line), coverage)[..., None]
            patch += edge * (_contrasting(self.rng, under) - patch)


def _crop(image: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    x, y, w, h = window
    return image[y : y + h, x : x + w]


def _enough_visible(owner: np.ndarray, full_areas: list[float]) -> bool:
    visible = np.bincount(owner.ravel(), minlength=len(full_areas))
    if np.any(visible[1:] < MIN_VISIBLE * np.array(full_areas[1:])):
        return False
    boxes = [_tight_box(owner == number) for number in range(1, len(full_areas))]
    return all(MIN_SIDE <= max(w, h) for _, _, w, h in boxes)


def render(
    seed: int | Sequence[int], *, size: tuple[int, int]
) -> tuple[np.ndarray, list[VisibleObject]]:
    """One picture of (height, width) as [h, w, 3] uint8, and 1 to 8 objects (and maybe a crowd)."""
    rng = np.random.default_rng(seed)
    canvas = Canvas(rng, *size)
    if rng.random() < CROWD_RATE:
        canvas.add_crowd()
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        canvas.add_object()
    return canvas.pixels.round().clip(0, 255).astype(np.uint8), canvas.visible_objects()


def _rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, mask.size]).tolist()}


def _annotation(visible: VisibleObject, image_id: int) -> dict:
    return {
        "image_id": image_id,
        "category_id": visible.label,
        "bbox": list(visible.box),
        "area": visible.area,
        "iscrowd": int(visible.crowd),
        "segmentation": _rle(visible.mask),
    }


def write_coco(
    folder: str | Path,
    *,
    num_images: int,
    seed: int = 0,
    image_size: int = 320,
    first_id: int = 1,
    split: str = "train",
) -> Path:
    """Writes `<folder>/<split>/*.jpg` and `<folder>/annotations/instances_<split>.json` (returned).

    Each image's longer side is `image_size`; an image depends on `seed`, `split` and its id only.
    """
    folder = Path(folder)
    images, annotations = [], []
    for path in (folder / split, folder / "annotations"):
        path.mkdir(parents=True, exist_ok=True)
    for image_id in range(first_id, first_id + num_images):
        stream = [seed, SPLITS[split], image_id]
        rng = np.random.default_rng([*stream, 1])  # independent of the picture's
        height, width = rng.permutation(
            [image_size, round(image_size * rng.uniform(0.7, 1))]
        ).tolist()
        pixels, objects = render(stream, size=(height, width))
        name = f"{image_id:012}.jpg"
        Image.fromarray(pixels).save(folder / split / name, quality=JPEG_QUALITY)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        annotations += [_annotation(visible, image_id) for visible in objects]
    coco = {
        "info": {"description": f"Synthetic shapes, split {split}, seed {seed}", "version": "1"},
        "licenses": [],
        "categories": [
            {"id": i, "name": n, "supercategory": "shape"} for i, n in enumerate(NAMES, 1)
        ],
        "images": images,
        "annotations": [{"id": number} | entry for number, entry in enumerate(annotations, 1)],
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(coco))
    return path
