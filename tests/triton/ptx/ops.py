"""What instructions do to the lanes of a warp; branches, ends and barriers are the machine's."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np

from tests.triton.ptx import arithmetic
from tests.triton.ptx.arithmetic import ELEMENTWISE, dtype_of
from tests.triton.ptx.machine import LANES, Step, Warp
from tests.triton.ptx.memory import Array, Fault
from tests.triton.ptx.parse import Instruction

_ADDRESS = re.compile(r"^\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_LANE = np.arange(LANES)
_U32 = np.dtype(np.uint32)
_BOOL = np.dtype(bool)


def step_of(instruction: Instruction) -> Step:
    """What an instruction does.

    Raises:
        NotImplementedError: nobody has needed it yet.
    """
    name = instruction.name
    if name in ("bra", "ret", "bar"):
        return _nothing
    if name in _SPECIAL:
        return _SPECIAL[name](instruction)
    if name in ELEMENTWISE and not instruction.kind.endswith("x2"):
        return _elementwise(instruction, ELEMENTWISE[name])
    raise NotImplementedError(instruction.text)


def _nothing(warp: Warp) -> None:
    raise AssertionError("the machine's own")


def _elementwise(instruction: Instruction, function: Callable[..., Array]) -> Step:
    kind = dtype_of(instruction.kind)
    target, *sources = instruction.operands

    def step(warp: Warp) -> None:
        warp.write(target, function(*(warp.read(source, kind) for source in sources)))

    return step


def _typed(target: str, sources: list[tuple[str, np.dtype]], function: Callable[..., Array]) -> Step:
    """As above, each number of its own type."""

    def step(warp: Warp) -> None:
        warp.write(target, function(*(warp.read(source, kind) for source, kind in sources)))

    return step


def _product(instruction: Instruction) -> Step:
    """``mul`` and ``mad``, of which whole numbers keep the lower half, the upper half or all of the bits."""
    kind = dtype_of(instruction.kind)
    target, *sources = instruction.operands
    if "wide" in instruction.opcode:
        wide = arithmetic.wider(kind)

        def function(a: Array, b: Array, c: Array | None = None) -> Array:
            product = a.astype(wide) * b.astype(wide)
            return product if c is None else product + c

        kinds = [kind, kind, wide]
    else:
        multiply = arithmetic.high_product if "hi" in instruction.opcode else np.multiply

        def function(a: Array, b: Array, c: Array | None = None) -> Array:
            return multiply(a, b) if c is None else multiply(a, b) + c

        kinds = [kind] * 3
    return _typed(target, list(zip(sources, kinds, strict=False)), function)


def _shift(instruction: Instruction) -> Step:
    target, number, by = instruction.operands
    function = arithmetic.shifted_left if instruction.name == "shl" else arithmetic.shifted_right
    return _typed(target, [(number, dtype_of(instruction.kind)), (by, _U32)], function)


def _bit_field(instruction: Instruction) -> Step:
    target, number, first, length = instruction.operands
    kinds = [(number, dtype_of(instruction.kind)), (first, _U32), (length, _U32)]
    return _typed(target, kinds, arithmetic.bit_field)


def _extreme(instruction: Instruction) -> Step:
    return _elementwise(instruction, partial(arithmetic.extreme, instruction.name, "NaN" in instruction.opcode))


def _compare(instruction: Instruction) -> Step:
    if len(instruction.operands) != 3:
        raise NotImplementedError(instruction.text)
    return _elementwise(instruction, partial(arithmetic.compared, instruction.opcode[1]))


def _select(instruction: Instruction) -> Step:
    target, yes, no, which = instruction.operands
    kind = dtype_of(instruction.kind)
    return _typed(target, [(which, _BOOL), (yes, kind), (no, kind)], np.where)


def _convert(instruction: Instruction) -> Step:
    *modifiers, target_kind, source_kind = instruction.opcode[1:]
    if len(instruction.operands) != 2:
        raise NotImplementedError(instruction.text)
    target, source = instruction.operands
    function = partial(arithmetic.converted, source=source_kind, target=target_kind, modifiers=tuple(modifiers))
    return _typed(target, [(source, dtype_of(source_kind))], function)


def _move(instruction: Instruction) -> Step:
    """Also of parts into a wider register and back; the first part is the lowest bits."""
    kind = dtype_of(instruction.kind)
    targets, sources = instruction.parts
    if kind == np.bool_ or len(targets) == len(sources) == 1:
        return _elementwise(instruction, lambda number: number)
    if len(sources) > 1:
        part = np.dtype(f"u{kind.itemsize // len(sources)}")

        def step(warp: Warp) -> None:
            warp.write(targets[0], np.stack([warp.read(source, part) for source in sources], 1).view(kind)[:, 0])
    else:
        part = np.dtype(f"u{kind.itemsize // len(targets)}")

        def step(warp: Warp) -> None:
            for target, number in zip(
                targets, warp.read(sources[0], kind).view(part).reshape(LANES, -1).T, strict=True
            ):
                warp.write(target, number)

    return step


def _address(operand: str) -> tuple[str, int]:
    found = _ADDRESS.match(operand)
    assert found is not None, operand
    return found[1], int(found[2] or "0", 0)


def _load(instruction: Instruction) -> Step:
    base, offset = _address(instruction.operands[1])
    kind = dtype_of(instruction.kind)
    targets = instruction.parts[0]
    if "param" in instruction.opcode:
        assert offset == 0 and len(targets) == 1, instruction.text
        return lambda warp: warp.write(
            targets[0], np.full(LANES, warp.parameters[base], np.uint64).astype(f"u{kind.itemsize}").view(kind)
        )
    space, places = _space(instruction), _places(base, offset, kind, len(targets))

    def step(warp: Warp) -> None:
        for target, address in zip(targets, places(warp), strict=True):
            values = np.zeros(LANES, kind)
            values[warp.active] = warp.memory[space].load(address, kind)
            warp.write(target, values)

    return step


def _store(instruction: Instruction) -> Step:
    base, offset = _address(instruction.operands[0])
    kind = dtype_of(instruction.kind)
    sources = instruction.parts[1]
    space, places = _space(instruction), _places(base, offset, kind, len(sources))

    def step(warp: Warp) -> None:
        for source, address in zip(sources, places(warp), strict=True):
            warp.memory[space].store(address, warp.read(source, kind)[warp.active])

    return step


def _space(instruction: Instruction) -> str:
    return next(space for word in instruction.opcode if (space := word.partition("::")[0]) in ("global", "shared"))


def _places(base: str, offset: int, kind: np.dtype, numbers: int) -> Callable[[Warp], list[Array]]:
    """Addresses of each of the numbers side by side, in the active lanes."""

    def places(warp: Warp) -> list[Array]:
        width = np.dtype(np.int64) if base.startswith("%") and warp.program.width(base) == np.uint64 else _U32
        first = warp.read(base, width)[warp.active].astype(np.int64) + offset
        if (first % (numbers * kind.itemsize)).any():
            raise Fault(f"addresses are no multiples of {numbers * kind.itemsize}")
        return [first + i * kind.itemsize for i in range(numbers)]

    return places


def _shuffle(instruction: Instruction) -> Step:
    """Each lane takes another's number, or keeps its own where there is no such lane in its segment."""
    mode = instruction.opcode[2]
    target, source, by, bounds, _ = instruction.operands
    target, _, found = target.partition("|")

    def step(warp: Warp) -> None:
        distance, bound = (warp.read(x, _U32).astype(np.int64) for x in (by, bounds))
        segment, clamp = bound >> 8 & 31, bound & 31
        first = _LANE & segment
        last = first | clamp & ~segment
        if mode == "idx":
            lane = first | distance & 31 & ~segment
        else:
            lane = {"bfly": _LANE ^ distance, "up": _LANE - distance, "down": _LANE + distance}[mode]
        inside = lane >= last if mode == "up" else lane <= last
        warp.write(target, warp.read(source, _U32)[np.where(inside, lane, _LANE)])
        if found:
            warp.write(found, inside)

    return step


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def _reduce(instruction: Instruction) -> Step:
    """Over the lanes that name each other in their masks."""
    reduction, kind = _REDUCTIONS[instruction.opcode[2]], dtype_of(instruction.kind)
    target, source, members = instruction.operands

    def step(warp: Warp) -> None:
        numbers, masks = warp.read(source, kind), warp.read(members, _U32)
        out = np.empty_like(numbers)
        for mask in np.unique(masks):
            named = mask >> _LANE & 1 == 1
            if (named != (masks == mask)).any():
                raise Fault("lanes wait for others that wait for other lanes")
            out[named] = reduction.reduce(numbers[named], dtype=kind)
        warp.write(target, out)

    return step


_SPECIAL: dict[str, Callable[[Instruction], Step]] = {
    "mul": _product,
    "mad": _product,
    "shl": _shift,
    "shr": _shift,
    "bfe": _bit_field,
    "min": _extreme,
    "max": _extreme,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
    "mov": _move,
    "ld": _load,
    "st": _store,
    "shfl": _shuffle,
    "redux": _reduce,
}
