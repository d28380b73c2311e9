"""What a compiled TPU program costs, by the compiler's own estimates. An estimate and no run time.

The optimised program carries `estimated_cycles` for most operations that take time. Only executed
instructions are summed: the entry's, and loop bodies times their trip count. Copies have no
estimate and are priced by the bytes they move, apart from the rest; sorts by those of a bitonic
network.
"""

import collections
import math
import re
from typing import NamedTuple

from spinenet_tf.tpu.chips import Chip

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
}
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "get-dimension-size", "add-dependency",
}  # fmt: skip


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str  # attributes, metadata, backend configuration

    def find(self, pattern: str) -> str | None:
        """What the group of a pattern matches in the attributes."""
        found = re.search(pattern, self.rest)
        return found and found[1]


class Program(NamedTuple):
    """{computation: its instructions by name}, and which of them is run."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Cost(NamedTuple):
    """Milliseconds.

    Attributes:
      estimated: by the compiler.
      copied: of operations without an estimate, at the bandwidth of the memory.
      hidden: copies that run beside the rest, likewise priced; in no sum.
      by_layer: {part of the model: estimated and copied}, dearest first.
      unbounded: loops whose trip count the program does not tell; counted once.
    """

    estimated: float
    copied: float
    hidden: float
    by_layer: dict[str, float]
    unbounded: int


def parse(text: str) -> Program:
    """Reads the text of a scheduled HLO module."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY: this is not the text of an HLO module")
    return Program(computations, entry)


def cost(program: Program, chip: Chip) -> Cost:
    """Sums what a run of the entry costs on one device."""
    layers, sums = collections.Counter(), collections.Counter()

    def visit(name: str, times: int) -> None:
        computation = program.computations[name]
        for one in computation.values():
            if one.opcode == "while":
                trips = _trips(one, computation, program)
                sums["unbounded"] += trips is None
                for part in ("body", "condition"):
                    visit(one.find(part + r"=%([^\s,]+)"), times * (trips or 1))
                continue
            called = _called(one)
            for other in called:
                visit(other, times)
            if not called and one.opcode not in FREE:
                kind, milliseconds = _price(one, computation, chip)
                sums[kind] += times * milliseconds
                if kind != "hidden":
                    layers[layer_of(one)] += times * milliseconds

    visit(program.entry, 1)
    return Cost(
        sums["estimated"], sums["copied"], sums["hidden"],
        dict(layers.most_common()), int(sums["unbounded"]),
    )  # fmt: skip


def layer_of(one: Instruction) -> str:
    """The part of the model that an instruction computes, and whether it is of the gradient."""
    path = one.find(r'op_name="([^"]*)"') or one.opcode
    backward = "gradient_tape" in path
    parts = [
        p for p in re.split(r"[/.]", path) if not re.match(r"(gradient_tape|call|jit|XLA_Args)", p)
    ]
    name = parts[1] if len(parts) > 2 else parts[0] if parts else one.opcode
    return re.sub(r"(_\d+)+$", "", name) + (" backward" if backward else "")


def padded_bytes(shape: str) -> int:
    """Bytes of a shape in memory, such as 'f32[8,3]{1,0:T(8,128)}': tiles are whole."""
    total = 0
    for kind, sides, order, tile in re.findall(
        r"(\w+)\[([\d,<=]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?[^}]*\})?", shape
    ):
        sides = [int(n.lstrip("<=")) for n in sides.split(",") if n]
        order = [int(n) for n in order.split(",") if n] or list(range(len(sides)))[::-1]
        tile = [int(n) for n in tile.split(",") if n]
        for axis, cells in zip(order, reversed(tile), strict=False):
            sides[axis] = math.ceil(sides[axis] / cells) * cells
        total += math.prod(sides) * BITS.get(kind, 0) // 8
    return total


def _price(one: Instruction, computation: dict, chip: Chip) -> tuple[str, float]:
    cycles = one.find(r'"estimated_cycles":"(\d+)"')
    if cycles and int(cycles) > 0:
        return "estimated", int(cycles) / chip.megahertz / 1e3
    if one.opcode.endswith(("-start", "-done")):
        moved = padded_bytes(one.shape) if one.opcode.endswith("-done") else 0
        return "hidden", 2 * moved / chip.gigabytes / 1e6
    return "copied", _moved(one, computation) / chip.gigabytes / 1e6


def _moved(one: Instruction, computation: dict) -> int:
    """Bytes that an operation without an estimate reads and writes."""
    sizes = [padded_bytes(computation[n].shape) for n in one.operands if n in computation]
    path = one.name + (one.find(r'op_name="([^"]*)"') or "")
    if one.opcode == "dynamic-update-slice":  # in place
        return 2 * sizes[1]
    if one.opcode in ("gather", "dynamic-slice") or (one.opcode == "fusion" and "gather" in path):
        return 2 * padded_bytes(one.shape)
    if one.opcode == "sort":  # all of it once for each stage of a bitonic network
        axis = int(one.find(r"dimensions=\{(\d+)\}"))
        side = int(re.search(r"\[([\d,]+)\]", one.shape)[1].split(",")[axis])
        doublings = math.ceil(math.log2(max(side, 2)))
        return 2 * padded_bytes(one.shape) * doublings * (doublings + 1) // 2
    return padded_bytes(one.shape) + sum(sizes)


def _called(one: Instruction) -> list[str]:
    """Computations that an instruction runs once; those inside a fusion are in its own estimate."""
    if one.opcode == "call":
        return [one.find(r"to_apply=%([^\s,]+)")]
    if one.opcode == "conditional":  # either is counted: which is taken is not known
        branches = one.find(r"branch_computations=\{([^}]*)\}")
        if branches:
            return [name.strip(" %") for name in branches.split(",")]
        return [one.find(k + r"_computation=%([^\s,]+)") for k in ("true", "false")]
    return []


def _trips(loop: Instruction, computation: dict, program: Program) -> int | None:
    """How often a loop runs, at most: what its counter is compared with."""
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = program.computations[loop.find(r"condition=%([^\s,]+)")]
    initial = computation.get(loop.operands[0])
    counted, bounds = [], []
    for one in condition.values():
        if one.opcode in ("compare", "fusion"):
            values = [_constant(name, condition, computation, initial) for name in one.operands]
            bounds += [n for n in values if n is not None]
            # Of a condition on a counter and on what is found, the counter's is the bound.
            if one.opcode == "compare" and any(_is_carried(n, condition) for n in one.operands):
                counted += [n for n in values if n is not None]
    return min(counted, default=max(bounds, default=None))


def _is_carried(name: str, condition: dict) -> bool:
    """Whether a name in a loop's condition is an integer that an iteration hands to the next."""
    one = condition.get(name)
    return bool(one and one.opcode == "get-tuple-element" and one.shape.startswith("s32[]"))


def _constant(name: str, condition: dict, outer: dict, initial: Instruction | None) -> int | None:
    """The integer that a name in a loop's condition stands for, through the loop's own tuple."""
    one = condition.get(name)
    if one and one.opcode == "get-tuple-element" and initial and initial.opcode == "tuple":
        one = outer.get(initial.operands[int(one.find(r"index=(\d+)"))])
    while one and one.opcode in ("copy", "bitcast"):
        one = outer.get(one.operands[0])
    if one and one.opcode == "constant" and one.shape.startswith(("s32[]", "u32[]", "s64[]")):
        value = int(one.operands[0]) if one.operands else 0
        return value if value > 0 else None
    return None


def _instruction(line: str) -> Instruction:
    name, text = line.strip().removeprefix("ROOT ").split(" = ", 1)
    shape, text = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    opcode, text = text.strip().split("(", 1)
    operands, rest = _balanced("(" + text)
    names = re.findall(r"%([^\s,()]+)", operands) or [operands.strip("()")]
    return Instruction(name.lstrip("%"), opcode, shape, tuple(names), rest)


def _balanced(text: str) -> tuple[str, str]:
    """Splits after the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"parenthesis without end: {text[:80]}")
