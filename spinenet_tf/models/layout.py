"""How a network's maps lie on a TPU: see `models.pairs` and `models.strips`."""

from collections import defaultdict
from typing import NamedTuple

from spinenet_tf.models.pairs import pair, pairs_fit, unpair
from spinenet_tf.models.strips import recut, strips_of


class Layout(NamedTuple):
    """[b, h, w, c] -> [b * strips, h / strips, w / columns, columns * c]."""

    columns: int = 1  # 2: pairs
    strips: int = 1


PLAIN = Layout()
LEVELS = range(2, 8)


def layouts(image: tuple, plain: bool = False) -> dict[int, Layout]:
    """{level: how its maps lie} for images [b, h, w, 3].

    `PLAIN` if so wished, for images of an unknown size, and where a TPU gains nothing.
    """
    found, height = defaultdict(Layout), image[1]
    for level in () if plain or None in image[1:3] else LEVELS:
        strips = strips_of(height // 2**level) if height % 2**level == 0 else 1
        found[level] = Layout(2 if level == 2 and pairs_fit(image) else 1, strips)
    return found


def relay(x, old: Layout, new: Layout):
    """The same maps, lying otherwise."""
    x = unpair(x) if old.columns > new.columns else x
    x = recut(x, old.strips, new.strips)
    return pair(x) if new.columns > old.columns else x
