"""COCO segmentations -> what records hold of an object's mask: a PNG, and its box's view of it.

An object covers a small part of its image, so only the window of its pixels is ever unpacked.
"""

import functools
import struct
import zlib
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from spinenet_tf.data.shards import Rejection, finite

FAR_OUTSIDE = 10  # image sides; a vertex further out is a mistake
ADLER = 65521  # modulus of zlib's checksum


class Window(NamedTuple):
    """The part of a mask that has all of the object.

    Attributes:
      pixels: [h', w'] uint8, 1 in the object.
      top, left: its first row and column in the image.
      height, width: of the image.
    """

    pixels: np.ndarray
    top: int
    left: int
    height: int
    width: int


def window_of(segmentation: object, height: int, width: int) -> Window:
    """Polygons or run lengths (compressed or not) as pixels.

    Raises:
      Rejection: it is neither, or does not fit to the image.
    """
    if isinstance(segmentation, dict):
        runs = _checked_runs(segmentation, height, width)
    else:
        polygons = _checked_polygons(segmentation, height, width)
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        runs = run_lengths(rle["counts"])
    return _unpack(runs, height, width)


def run_lengths(compressed: bytes) -> np.ndarray:
    """The numbers of pycocotools' compressed run lengths.

    Five bits a character, lowest first; bit 5 says that more follow, the last one's bit 4 is the
    sign. From the fourth number on they are differences to the number before the last.
    """
    bits = np.frombuffer(compressed, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits < 32)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[:1] += 1
    first = ends - lengths + 1
    bits = bits[: lengths.sum()]  # a number that does not end is none
    place = np.arange(len(bits)) - first.repeat(lengths)
    values = np.add.reduceat((bits & 31) << (5 * place), first) if len(first) else bits
    values -= (bits[ends] >> 4 & 1) << (5 * lengths)
    values[1::2].cumsum(out=values[1::2])
    values[2::2].cumsum(out=values[2::2])
    return values


def png(window: Window) -> bytes:
    """A PNG of the whole image, one channel, 0 or 1.

    Ours, as Pillow's takes five times as long: it compresses the zeros around the window each time
    again, and tries five filters.
    """
    pixels, stride = window.pixels, window.width + 1  # a row begins with the number of its filter
    rows = np.zeros([len(pixels), stride], np.uint8)
    rows[:, 1 + window.left : 1 + window.left + pixels.shape[1]] = pixels
    above, below = window.top * stride, (window.height - window.top - len(pixels)) * stride
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    checksum = zlib.adler32(rows, _adler_of_zeros(above, 1))
    stream = [
        b"\x78\x01",
        _zeros(above, last=False),
        deflate.compress(rows) + deflate.flush(zlib.Z_FULL_FLUSH),
        _zeros(below, last=True),
        struct.pack(">I", _adler_of_zeros(below, checksum)),
    ]
    header = struct.pack(">IIBBBBB", window.width, window.height, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", b"".join(stream)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def box_mask(window: Window, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """[size, size] uint8: what `data.images.crop_masks` makes of the mask, at most 1 apart.

    Args:
      box: xmin, ymin, width, height in pixels.
    """
    x, y, w, h = box
    step = (np.arange(size) + 0.5) / size
    height, width = window.pixels.shape
    framed = np.full([width + 2, height + 2], 0.5, np.float32)  # rounds; around the object is 0
    framed[1:-1, 1:-1] += window.pixels.T * np.float32(255)
    columns = _interpolated(framed, x + step * w - window.left)
    rows = _interpolated(np.ascontiguousarray(columns.T), y + step * h - window.top)
    return rows.astype(np.uint8)


def _interpolated(framed: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows at positions `at` (0.5 is the middle of the second), linear between their middles."""
    at = np.minimum(np.maximum(at + 0.5, 0), len(framed) - 1)
    above = np.minimum(at.astype(int), len(framed) - 2)
    values, change = framed.take(above, 0), framed.take(above + 1, 0)
    change -= values
    change *= (at - above).astype(np.float32)[:, None]
    values += change
    return values


def _unpack(runs: np.ndarray, height: int, width: int) -> Window:
    """Run lengths, by columns, of 0 and 1 in turn -> the window with all ones."""
    ends = runs.cumsum()
    starts, ends = ends[0:-1:2], ends[1::2]  # of the ones
    some = ends > starts
    starts, ends = starts[some], ends[some]
    if not len(starts):
        return Window(np.zeros([1, 1], np.uint8), 0, 0, height, width)
    left, right = int(starts[0]) // height, (int(ends[-1]) - 1) // height + 1
    lengths = np.empty([2 * len(starts) + 1], np.int64)  # zeros, ones, zeros, ... of these columns
    lengths[1::2] = ends - starts
    lengths[0] = starts[0] - left * height
    lengths[2:-1:2] = starts[1:] - ends[:-1]
    lengths[-1] = right * height - ends[-1]
    kinds = np.zeros(len(lengths), np.uint8)
    kinds[1::2] = 1
    columns = kinds.repeat(lengths).reshape([right - left, height])
    first, last = starts % height, (ends - 1) % height
    whole = (last - first != lengths[1::2] - 1).any()  # a run goes on in the next column
    top, bottom = (0, height) if whole else (int(first.min()), int(last.max()) + 1)
    return Window(columns[:, top:bottom].T, top, left, height, width)


def _checked_runs(rle: dict, height: int, width: int) -> np.ndarray:
    counts = rle.get("counts")
    if rle.get("size") != [height, width]:
        raise Rejection("segmentation", rle, f"RLE size is not [{height}, {width}]")
    if isinstance(counts, str):
        counts = run_lengths(counts.encode()).tolist()
    valid = isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
    if not valid or sum(counts) != height * width:
        raise Rejection("segmentation", rle, "RLE counts do not add up to the image")
    return np.array(counts, np.int64)


def _checked_polygons(polygons: object, height: int, width: int) -> list[list[float]]:
    if not isinstance(polygons, list) or not polygons:
        raise Rejection("segmentation", polygons, "neither polygons nor RLE; --nomasks needs none")
    for polygon in polygons:
        if not finite(polygon) or len(polygon) < 6 or len(polygon) % 2:
            raise Rejection("segmentation", polygon, "not a polygon [x1, y1, x2, y2, x3, y3, ...]")
        if max(map(abs, polygon)) > FAR_OUTSIDE * max(height, width):
            raise Rejection("segmentation", polygon, "polygon far outside the image")
    return polygons


@functools.lru_cache(maxsize=2**16)  # an object has one of a few thousand places
def _zeros(number: int, last: bool) -> bytes:
    """A deflate stream's blocks of so many zeros, ending at a whole byte."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    end = zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH
    return deflate.compress(bytes(number)) + deflate.flush(end)


def _adler_of_zeros(number: int, before: int) -> int:
    low, high = before & 0xFFFF, before >> 16
    return low | (high + number * low) % ADLER << 16


def _chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
