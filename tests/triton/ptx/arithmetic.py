"""What instructions compute, by their names: functions of arrays of a lane's numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.triton.ptx.memory import Array

_ROUND = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}


def dtype_of(kind: str) -> np.dtype:
    """Of a type's name: ``s32``, ``b8``, ``f64``, ``pred``; a ``bf16`` is read and written as its bits."""
    if kind == "pred":
        return np.dtype(bool)
    if kind == "bf16":
        return np.dtype(np.uint16)
    return np.dtype({"s": "i", "u": "u", "b": "u", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8))


def wider(kind: np.dtype) -> np.dtype:
    """The type of products that keep all their bits."""
    return np.dtype(f"{kind.kind}{2 * kind.itemsize}")


def quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero if whole; all bits set where the divisor is zero."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, np.ones_like(b), b)
    floor = a // safe
    up = (floor < 0) & (floor * safe != a)
    return np.where(b == 0, ~np.zeros_like(a), floor + up.astype(a.dtype))


def remainder(a: Array, b: Array) -> Array:
    """Of whole numbers; it has the sign of the dividend."""
    return a - quotient(a, b) * b


def high_product(a: Array, b: Array) -> Array:
    """The upper half of its bits."""
    bits = 8 * a.dtype.itemsize
    if bits == 64:
        mask = (1 << 64) - 1
        whole = [(int(x) * int(y) >> 64) & mask for x, y in zip(a, b, strict=True)]
        return np.array(whole, np.uint64).view(a.dtype)
    wide = wider(a.dtype)
    return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, in twice the precision or nearly so."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def shifted_left(a: Array, by: Array) -> Array:
    """Nothing is left of what is shifted by all its bits or more."""
    bits = 8 * a.dtype.itemsize
    moved = a << np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by >= bits, np.zeros_like(a), moved)


def shifted_right(a: Array, by: Array) -> Array:
    """The same; a sign stays."""
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(by >= bits, np.zeros_like(a), moved)


def bit_field(a: Array, first: Array, length: Array) -> Array:
    """So many bits from the first on, extended by the last of them if the type has a sign."""
    unused = 8 * a.dtype.itemsize - first.astype(np.int64) - length
    left = shifted_left(a, unused)
    return shifted_right(left, unused + first)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of a and b, each chosen by four bits, of which the highest asks for the byte's sign alone."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        choice = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (8 * (choice & np.uint32(7))).astype(np.uint64) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        out |= np.where(choice >= 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


def bits_set(a: Array) -> Array:
    """How many."""
    return np.bitwise_count(a).astype(np.uint32)


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "div": quotient,
    "rem": remainder,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "ex2": np.exp2,
    "prmt": permuted,
    "popc": bits_set,
}
_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def extreme(name: str, keeps_nan: bool, a: Array, b: Array) -> Array:
    """``min`` or ``max``: of a number and NaN it is the number, unless NaN is to be kept."""
    if a.dtype.kind == "f" and not keeps_nan:
        return {"min": np.fmin, "max": np.fmax}[name](a, b)
    return {"min": np.minimum, "max": np.maximum}[name](a, b)


def compared(name: str, a: Array, b: Array) -> Array:
    """``lt`` is false where a number is NaN, ``ltu`` is true there; ``num`` and ``nan`` ask for nothing else."""
    if a.dtype.kind != "f":
        return _COMPARISONS[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    if name.endswith("u"):
        return _COMPARISONS[name[:-1]](a, b) | unordered
    return _COMPARISONS[name](a, b) & ~unordered


def converted(a: Array, source: str, target: str, modifiers: tuple[str, ...]) -> Array:
    """Another type's nearest number; of a fraction what its rounding (``rzi``, ``rmi``) asks for."""
    if source == "bf16":
        a = (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    for modifier in modifiers:
        if modifier in _ROUND:
            a = _ROUND[modifier](a)
    if target == "bf16":
        return _bfloat(a)
    kind = dtype_of(target)
    return _saturated(a, kind) if a.dtype.kind == "f" and kind.kind in "iu" else a.astype(kind)


def _saturated(a: Array, kind: np.dtype) -> Array:
    """Whole numbers: the nearest there is, 0 for NaN."""
    limits = np.iinfo(kind)
    low, high = a <= float(limits.min), a >= float(limits.max)
    inside = np.where(low | high | np.isnan(a), 0, a).astype(kind)
    return np.where(high, kind.type(limits.max), np.where(low, kind.type(limits.min), inside))


def _bfloat(a: Array) -> Array:
    """Bits of the nearest, of two equally near the even one."""
    bits = a.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = bits + odd + np.uint32(0x7FFF) >> np.uint32(16)
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)
