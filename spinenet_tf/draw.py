"""Pictures of detections."""

import colorsys
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def draw_boxes(
    image: np.ndarray, boxes, classes, scores=None, names: dict[int, str] | None = None
) -> np.ndarray:
    """Draws boxes with class names and scores.

    Args:
      image: [h, w, 3] uint8.
      boxes: [n, 4] yxyx pixels. classes: [n] int. scores: [n] in 0..1, or None.
      names: {class: name}.

    Returns:
      [h, w, 3] uint8.
    """
    picture = Image.fromarray(np.asarray(image))
    pen = ImageDraw.Draw(picture)
    scores = [None] * len(boxes) if scores is None else scores
    for box, label, score in reversed(list(zip(boxes, classes, scores, strict=True))):
        name = (names or {}).get(int(label), str(int(label)))
        text = name if score is None else f"{name} {score:.2f}"
        _draw_one(pen, picture.size, [float(v) for v in box], text, _colour(int(label)))
    return np.asarray(picture)


def draw_masks(image: np.ndarray, masks: list[np.ndarray], classes, opacity: float = 0.5):
    """Tints the pixels of masks in their classes' colours.

    Args:
      image: [h, w, 3] uint8.
      masks: [h, w] each, 1 inside. classes: [n] int. The first mask ends on top.

    Returns:
      [h, w, 3] uint8.
    """
    picture = np.asarray(image, np.float32).copy()
    for mask, label in reversed(list(zip(masks, classes, strict=True))):
        inside = np.asarray(mask, bool)
        colour = np.array(_colour(int(label)), np.float32)
        picture[inside] += opacity * (colour - picture[inside])
    return picture.round().astype(np.uint8)


def draw_text(image: np.ndarray, lines: list[str]) -> np.ndarray:
    """Writes lines into the top left corner of [h, w, 3] uint8; returns a copy."""
    picture = Image.fromarray(np.asarray(image))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(10, min(picture.size) // 20))
    if lines:
        box = pen.multiline_textbbox((4, 4), "\n".join(lines), font=font)
        pen.rectangle([0, 0, box[2] + 4, box[3] + 4], fill="white")
        pen.multiline_text((4, 4), "\n".join(lines), fill="black", font=font)
    return np.asarray(picture)


def _draw_one(pen: Any, size: tuple[int, int], box: list[float], text: str, colour) -> None:
    font = ImageFont.load_default(max(10, min(size) // 40))
    y0, x0, y1, x1 = box
    pen.rectangle([x0, y0, max(x1, x0), max(y1, y0)], outline=colour, width=2)
    _, _, width, height = pen.textbbox((0, 0), text, font=font)
    left = min(max(x0, 0), max(size[0] - width - 2, 0))  # keep the label in the picture
    top = y0 - height - 2 if y0 > height + 2 else y0
    pen.rectangle([left, top, left + width + 2, top + height + 2], fill=colour)
    pen.text((left + 1, top), text, fill="black", font=font)


def _colour(label: int) -> tuple[int, int, int]:
    """Neighbouring labels get hues far apart."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(label * 0.618 % 1.0, 0.75, 1.0))
