"""The TPUs that a recipe can be compiled for. Figures of Google's system documentation."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A TPU as the compiler sees it: one device, which is a core of v3 and a chip of the others.

    Attributes:
      topology: libtpu's name of the smallest slice, which is enough to compile for one device.
      megahertz: of the cycles in the compiler's estimates.
      hbm: GiB of memory of a device.
      teraflops: peak of bfloat16 products.
      gigabytes: a second, between device and its memory.
      name: of a slice, with {} for what Google counts in it; `counted` of those a device has.
      slices: devices of the slices that exist.
    """

    topology: str
    megahertz: float
    hbm: float
    teraflops: float
    gigabytes: float
    name: str
    counted: int
    slices: tuple[int, ...]


CHIPS = {
    "v3": Chip("v3:2x2", 940, 16, 61.5, 450, "v3-{}", 1, (8, 32, 64, 128, 256, 512, 1024, 2048)),
    "v4": Chip("v4:2x2x1", 1050, 32, 275, 1228, "v4-{}", 2, (4, 8, 16, 32, 64, 128, 256, 512)),
    "v5e": Chip("v5e:2x2", 1500, 16, 197, 819, "v5litepod-{}", 1, (1, 4, 8, 16, 32, 64, 128, 256)),
    "v5p": Chip("v5p:2x2x1", 1750, 95, 459, 2765, "v5p-{}", 2, (4, 8, 16, 32, 64, 128, 256, 512)),
    "v6e": Chip("v6e:2x2", 1750, 32, 918, 1640, "v6e-{}", 1, (1, 4, 8, 16, 32, 64, 128, 256)),
}  # fmt: skip
