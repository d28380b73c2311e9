"""Anchor boxes of a feature pyramid."""

import dataclasses
import math

import gin
import numpy as np


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchors:
    """Anchor boxes (section 5.1; RetinaNet section 4).

    Attributes:
      size: side of the smallest anchor in units of the level's stride: 3 up to SpineNet-96, 4 from
        SpineNet-143.
      scales: sizes per octave, 2**(i / scales).
      aspect_ratios: width / height. The order fixes the meaning of the prediction's channels:
        (1, 2, 0.5) is the official code's, Model Garden uses (0.5, 1, 2).
      levels: pyramid levels.
    """

    size: float = 3.0
    scales: int = 3
    aspect_ratios: tuple[float, ...] = (1.0, 2.0, 0.5)
    levels: tuple[int, ...] = (3, 4, 5, 6, 7)

    @property
    def per_place(self) -> int:
        """Anchors at one place of a feature map."""
        return self.scales * len(self.aspect_ratios)

    def boxes(self, image_size: tuple[int, int]) -> np.ndarray:
        """All anchors for images of (height, width): [a, 4] float32, yxyx pixels.

        Ordered by level, row, column, scale, aspect ratio: as the flattened predictions are.
        """
        return np.concatenate([self._level(level, image_size) for level in self.levels])

    def _level(self, level: int, image_size: tuple[int, int]) -> np.ndarray:
        stride = 2**level
        y, x = ((np.arange(math.ceil(side / stride)) + 0.5) * stride for side in image_size)
        half = np.array(self._shapes(), np.float64) * stride / 2  # [k, 2]
        centres = np.stack(np.meshgrid(y, x, indexing="ij"), -1)[:, :, None]  # [h, w, 1, 2]
        boxes = np.concatenate([centres - half, centres + half], -1)
        return boxes.reshape(-1, 4).astype(np.float32)

    def _shapes(self) -> list[tuple[float, float]]:
        """(height, width) in strides, scale-major."""
        sides = [self.size * 2 ** (i / self.scales) for i in range(self.scales)]
        return [(s / r**0.5, s * r**0.5) for s in sides for r in self.aspect_ratios]


def one_scale() -> Anchors:
    """Mask R-CNN's anchors (arXiv 1703.06870): one scale, unless `Anchors.scales` is bound."""
    return Anchors(scales=gin.get_bindings("Anchors").get("scales", 1))
