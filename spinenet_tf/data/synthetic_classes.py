"""A synthetic fine-grained set: beetles of 20 kinds that differ in where their spots are.

Each beetle has three pairs of spots on its wing cases, at three of six places; the 20 ways to
choose them are the classes. Colours, size, place, turn, legs, feelers and background tell nothing,
a mirrored beetle is of its own class, and all have equally many equal spots. NumPy and Pillow only;
the same seed gives the same bytes.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from spinenet_tf.data.synthetic import JPEG_QUALITY, SPLITS, _background

MIN_BODY, MAX_BODY = 0.6, 0.85  # length of head and wing cases, of the image's side
MAX_TURN = 30  # degrees either way
SPOT = 0.105  # diameter of a spot, of the body's length: 6 to 8.6 px at 96 px
SUPERSAMPLING = 4
DISTRACTORS = (2, 7)
MIN_CONTRAST = 110  # distance in RGB between things that must be told apart
SPOT_HIGH, WING_LOW = 50, 90  # spots are dark, wing cases are not: greatest and least of a channel

# In body lengths, from the centre; y grows towards the tail, x away from the middle.
PLACES = (
    (0.085, -0.10),
    (0.225, -0.06),
    (0.085, 0.09),
    (0.235, 0.12),
    (0.075, 0.31),
    (0.205, 0.27),
)
KINDS = tuple(itertools.combinations(range(len(PLACES)), 3))
NAMES = tuple("beetle-" + "".join(str(place + 1) for place in kind) for kind in KINDS)


def _contrasting(rng: np.random.Generator, *others: np.ndarray, low: float = 0) -> np.ndarray:
    while True:
        colour = rng.uniform(low, 255, 3)
        if all(np.linalg.norm(colour - other) >= MIN_CONTRAST for other in others):
            return colour


def _ellipse(
    centre: tuple[float, float], radii: tuple[float, float], points: int = 48
) -> np.ndarray:
    angles = 2 * np.pi * np.arange(points) / points
    return np.stack([np.cos(angles), np.sin(angles)], -1) * radii + centre


class _Picture:
    """Draws in body lengths on a larger picture, which is reduced in the end."""

    def __init__(self, pixels: np.ndarray, matrix: np.ndarray, centre: np.ndarray):
        large = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        self.image = large.resize([side * SUPERSAMPLING for side in large.size], Image.BILINEAR)
        self.draw = ImageDraw.Draw(self.image)
        self.matrix, self.centre = matrix * SUPERSAMPLING, centre * SUPERSAMPLING

    def fill(self, outline: np.ndarray, colour: np.ndarray) -> None:
        """Fills the outline, [n, 2]."""
        self.draw.polygon(self._flat(outline), tuple(colour.astype(int).tolist()))

    def line(self, points: Sequence, colour: np.ndarray, width: float) -> None:
        """Draws a line through the points, `width` body lengths wide."""
        pixels = max(round(width * np.sqrt(abs(np.linalg.det(self.matrix)))), 1)
        self.draw.line(self._flat(points), tuple(colour.astype(int).tolist()), pixels)

    def _flat(self, points: Sequence) -> list[float]:
        return (np.asarray(points, float) @ self.matrix + self.centre).ravel().tolist()


def _limbs(rng: np.random.Generator, picture: _Picture, colour: np.ndarray) -> None:
    for side, row in itertools.product((-1, 1), (-0.15, 0.05, 0.25)):
        knee = side * rng.uniform(0.38, 0.44), row + rng.uniform(-0.1, 0.1)
        foot = side * rng.uniform(0.46, 0.54), knee[1] + rng.uniform(-0.06, 0.12)
        picture.line([(side * 0.2, row), knee, foot], colour, 0.025)
    for side in (-1, 1):
        tip = side * rng.uniform(0.12, 0.25), -0.5 - rng.uniform(0.02, 0.1)
        picture.line([(side * 0.05, -0.42), (side * 0.1, -0.48), tip], colour, 0.018)


def _beetle(rng: np.random.Generator, picture: _Picture, label: int, under: np.ndarray) -> None:
    spots = rng.uniform(0, SPOT_HIGH, 3)  # any colour would ask a small net for far more images
    wings, head = _contrasting(rng, under, spots, low=WING_LOW), _contrasting(rng, under)
    _limbs(rng, picture, head)
    picture.fill(_ellipse((0, -0.4), (0.13, 0.1)), head)
    picture.fill(_ellipse((0, -0.29), (0.24, 0.12)), head * 0.8)
    picture.fill(_ellipse((0, 0.12), (0.34, 0.38)), wings)
    picture.line([(0, -0.25), (0, 0.5)], wings * 0.6, 0.014)
    for place, side in itertools.product(KINDS[label - 1], (-1, 1)):
        x, y = PLACES[place]
        wobble = rng.uniform(-0.008, 0.008, 2)
        picture.fill(_ellipse((side * x + wobble[0], y + wobble[1]), (SPOT / 2, SPOT / 2)), spots)


def _distract(rng: np.random.Generator, picture: _Picture, size: int) -> None:
    """Pebbles and blades anywhere, under the beetle: some as large and round as its spots."""
    for _ in range(rng.integers(*DISTRACTORS)):
        centre = rng.uniform(0, size, 2) * SUPERSAMPLING
        radii = rng.uniform(0.02, 0.07, 2) * size * SUPERSAMPLING
        if rng.random() < 0.5:
            radii[:] = radii[0]
        colour = tuple(rng.integers(0, 256, 3).tolist())
        points = _ellipse(centre, radii, points=int(rng.choice([3, 4, 24])))
        picture.draw.polygon(points.ravel().tolist(), colour)


def render(
    seed: int | Sequence[int], label: int, *, size: int
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """One picture, [size, size, 3] uint8, of a beetle of class `label`, from 1; and its box.

    The box is xmin, ymin, width, height in pixels, of head and wing cases.
    """
    rng = np.random.default_rng(seed)
    body = rng.uniform(MIN_BODY, MAX_BODY) * size
    turn = np.deg2rad(rng.uniform(-MAX_TURN, MAX_TURN))
    matrix = body * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline = np.concatenate([_ellipse((0, 0.12), (0.34, 0.38)), _ellipse((0, -0.4), (0.13, 0.1))])
    low, high = (outline @ matrix).min(0), (outline @ matrix).max(0)
    centre = rng.uniform(-low, size - high)
    pixels = _background(rng, size, size)
    picture = _Picture(pixels, matrix, centre)
    _distract(rng, picture, size)
    _beetle(rng, picture, label, pixels.mean((0, 1)))
    box = *(low + centre).tolist(), *(high - low).tolist()
    return np.asarray(picture.image.reduce(SUPERSAMPLING)), tuple(round(v, 2) for v in box)


def write_classes(
    folder: str | Path,
    *,
    num_images: int,
    seed: int = 0,
    image_size: int = 96,
    split: str = "train",
) -> Path:
    """Writes `<folder>/<split>/*.jpg` and `<folder>/<split>.json` (returned), as iNaturalist 2017.

    Categories are numbered from 0 and have equally many images, up to one; annotations have boxes.
    An image depends on `seed`, `split` and its id only.
    """
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id in range(num_images):
        category = image_id % len(KINDS)
        pixels, box = render([seed, SPLITS[split], image_id], category + 1, size=image_size)
        name = f"{split}/{image_id:06}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=JPEG_QUALITY)
        sides = {"height": image_size, "width": image_size}
        images.append({"id": image_id, "file_name": name} | sides)
        ids = {"id": image_id, "image_id": image_id, "category_id": category}
        annotations.append(ids | {"bbox": list(box)})
    path = folder / f"{split}.json"
    value = {
        "info": {"description": f"Synthetic beetles, split {split}, seed {seed}", "version": "1"},
        "categories": [
            {"id": i, "name": n, "supercategory": "beetle"} for i, n in enumerate(NAMES)
        ],
        "images": images,
        "annotations": annotations,
    }
    path.write_text(json.dumps(value))
    return path
