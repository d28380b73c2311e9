"""The TPUs that a recipe can be compiled for. Figures of Google's system documentation."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """A TPU as the compiler sees it: one device, which is a core of v3 and a chip of the others.

    Attributes:
      topology: libtpu's name of the smallest slice, which is enough to compile for one device.
      megahertz: of the cycles in the compiler's estimates.
      hbm: GiB of memory of a device.
      teraflops: peak of bfloat16 products.
      gigabytes: a second, between device and its memory.
      counted: what a device counts in the names of slices: v4-64 has 32.
      devices: of the slices that exist.
    """

    topology: str
    megahertz: float
    hbm: float
    teraflops: float
    gigabytes: float
    counted: int
    devices: tuple[int, ...]


_CUBES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SQUARES = (1, 4, 8, 16, 32, 64, 128, 256)
CHIPS = {
    "v3": Chip("v3:2x2", 940, 16, 61.5, 450, 1, (8, 32, 64, 128, 256, 512, 1024, 2048)),
    "v4": Chip("v4:2x2x1", 1050, 32, 275, 1228, 2, _CUBES),
    "v5e": Chip("v5e:2x2", 1500, 16, 197, 819, 1, _SQUARES),
    "v5p": Chip("v5p:2x2x1", 1750, 95, 459, 2765, 2, _CUBES),
    "v6e": Chip("v6e:2x2", 1750, 32, 918, 1640, 1, _SQUARES),
}
DEFAULT = 32  # devices where a type names none


def find(tpu_type: str) -> tuple[str, Chip, int]:
    """'v3', 'v3-32', 'v4-64', 'v5litepod-16' -> name of the chip, chip, devices of the slice.

    Raises:
      ValueError: there is no such chip or slice.
    """
    name, _, size = tpu_type.replace("v5litepod", "v5e").partition("-")
    if name not in CHIPS or not re.fullmatch(r"\d*", size):
        raise ValueError(f"--tpu_type={tpu_type} is none of {list(CHIPS)}, nor a slice like v3-32")
    chip = CHIPS[name]
    sizes = [n * chip.counted for n in chip.devices]
    if size and int(size) not in sizes:
        raise ValueError(f"--tpu_type={tpu_type}: slices of {name} have {sizes}")
    return name, chip, int(size) // chip.counted if size else DEFAULT
