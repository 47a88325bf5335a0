"""Blocks and their warps: registers, memory, which lanes go where, and who waits for whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tests.triton.ptx.memory import Array, Fault, Memory, Region
from tests.triton.ptx.parse import Instruction, Program

LANES = 32
ALL = np.ones(LANES, bool)
# What nobody has written: shared memory and registers. No number that a test could take for its own.
_POISON = 0xA5
_BLOCK_REGISTERS = [f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"]


class Order(Enum):
    """In which a grid's blocks run, and a block's warps from barrier to barrier."""

    FORWARDS = "first to last"
    BACKWARDS = "last to first"

    def arranged(self, things: list) -> list:
        """These, in order."""
        return things if self is Order.FORWARDS else things[::-1]


class Warp:
    """32 lanes that go one way until a branch parts them.

    Attributes:
        registers: a number of each lane, by the register's name.
        active: [32] bool, the lanes that run the instruction at hand; ``ALL`` itself where all do.
        parameters: of the kernel, their bits by name.
        memory: "global" and "shared".
    """

    def __init__(
        self,
        program: Program,
        special: Mapping[str, Array],
        parameters: Mapping[str, int],
        memory: Mapping[str, Memory],
    ) -> None:
        self.program = program
        self.registers: dict[str, Array] = dict(special)
        self.parameters = parameters
        self.memory = memory
        self.active: NDArray[np.bool_] = ALL
        self._at = {0: ALL}  # lanes by the number of their next instruction

    def read(self, operand: str, kind: np.dtype) -> Array:
        """[32] numbers of that type: a register's low bits, a constant, or the address of shared memory."""
        found = self.registers.get(operand)
        if found is None:
            if operand in self.program.shared:
                return np.zeros(LANES, kind)
            if operand[0] != "%":
                return _constant(operand, kind)
            found = self._poison(operand)
        if found.dtype == kind:
            return found
        if found.dtype.itemsize != kind.itemsize:
            found = found.astype(f"u{kind.itemsize}")  # its low bits
        return found.view(kind)

    def write(self, register: str, values: Array) -> None:
        """[32] numbers into the lanes that are active; a narrow one is extended by its sign if it has one."""
        if register == "_":
            return
        width = self.program.width(register)
        if values.dtype.kind == "f":
            values = values.view(f"u{values.dtype.itemsize}")
        values = values.astype(width, copy=False)
        if self.active is not ALL:
            before = self.registers.get(register)
            values = np.where(self.active, values, self._poison(register) if before is None else before)
        self.registers[register] = values

    def run(self, steps: Sequence[Step]) -> bool:
        """To the next barrier, or to the end.

        Args:
            steps: what each instruction does.

        Returns:
            Whether it waits at a barrier.
        """
        while self._at:
            pc = self._next()
            lanes = self._at.pop(pc)
            instruction = self.program.instructions[pc]
            if instruction.name == "bar":
                assert instruction.guard is None, instruction.text
                self._go(pc + 1, lanes)
                return True
            taken = lanes if instruction.guard is None else self._guarded(instruction, lanes)
            if instruction.name == "bra":
                self._go(self.program.labels[instruction.operands[0]], taken)
                self._go(pc + 1, lanes & ~taken)
            elif instruction.name == "ret":
                self._go(pc + 1, lanes & ~taken)
            else:
                self.active = taken
                if taken is ALL or taken.any():
                    self._do(steps[pc], instruction)
                self._go(pc + 1, lanes)
        return False

    @property
    def place(self) -> int:
        """Number of the instruction where all lanes are; -1 at the end."""
        return next(iter(self._at), -1)

    def _do(self, step: Step, instruction: Instruction) -> None:
        try:
            step(self)
        except Fault as fault:
            raise Fault(f"{fault}: {instruction.text}") from None

    def _next(self) -> int:
        """The earliest instruction that can run, so that lanes meet again behind a branch."""
        for pc in sorted(self._at) if len(self._at) > 1 else self._at:
            if self._at[pc] is ALL or not self.program.instructions[pc].together:
                return pc
        raise Fault(f"lanes wait for others that never come: {self.program.instructions[min(self._at)].text}")

    def _go(self, pc: int, lanes: NDArray[np.bool_]) -> None:
        if lanes is ALL:
            self._at[pc] = ALL
        elif lanes.any():
            lanes = lanes | self._at.get(pc, False)
            self._at[pc] = ALL if lanes.all() else lanes

    def _guarded(self, instruction: Instruction, lanes: NDArray[np.bool_]) -> NDArray[np.bool_]:
        guard = self.read(instruction.guard or "", np.dtype(bool))
        chosen = lanes & (~guard if instruction.negated else guard)
        return ALL if chosen.all() else chosen

    def _poison(self, register: str) -> Array:
        width = self.program.width(register)
        return ALL if width == np.bool_ else np.full(LANES * width.itemsize, _POISON, np.uint8).view(width)


# What an instruction does to the active lanes.
Step = Callable[[Warp], None]


@cache
def _constant(text: str, kind: np.dtype) -> Array:
    if text[:2] in ("0f", "0d"):
        bits = np.full(LANES, int(text[2:], 16), f"u{(len(text) - 2) // 2}")
        return bits.view(kind)
    number = int(text.rstrip("U"), 0)
    if kind == np.bool_:
        return np.full(LANES, number != 0)
    return np.full(LANES, number & ((1 << 8 * kind.itemsize) - 1), f"u{kind.itemsize}").view(kind)


class Machine:
    """Runs one program.

    Args:
        step_of: what an instruction does; branches, ends and barriers are the machine's own.
        shared_bytes: of a block.
    """

    def __init__(self, program: Program, step_of: Callable[[Instruction], Step], shared_bytes: int) -> None:
        self.program = program
        self.shared_bytes = shared_bytes
        self._steps = [step_of(instruction) for instruction in program.instructions]

    def launch(self, grid: tuple[int, ...], parameters: list[int], memory: Memory, order: Order) -> None:
        """Run the blocks one after another.

        Args:
            grid: blocks in up to three directions.
            parameters: bits of each, in order; scratch memory of the compiler's own, which follows, is nowhere.
            memory: what pointers among them lead to.

        Raises:
            Fault: of an address, or of lanes or warps that wait for nobody.
        """
        missing = len(self.program.parameters) - len(parameters)
        named = dict(zip(self.program.parameters, parameters + [0] * missing, strict=True))
        size = (*grid, 1, 1)[:3]
        blocks = [block[::-1] for block in itertools.product(*(range(n) for n in size[::-1]))]
        with np.errstate(all="ignore"):
            for block in order.arranged(blocks):
                self._run_block(block, size, named, memory, order)

    def _run_block(
        self,
        block: tuple[int, ...],
        grid: tuple[int, ...],
        parameters: Mapping[str, int],
        memory: Memory,
        order: Order,
    ) -> None:
        shared = Memory([Region(0, np.full(self.shared_bytes, _POISON, np.uint8))])
        constants = dict(zip(_BLOCK_REGISTERS, [*block, *grid], strict=True))
        special = {name: np.full(LANES, number, np.uint32) for name, number in constants.items()}
        special["%laneid"] = np.arange(LANES, dtype=np.uint32)
        warps = [
            Warp(
                self.program,
                {**special, "%tid.x": special["%laneid"] + np.uint32(first)},
                parameters,
                {"global": memory, "shared": shared},
            )
            for first in range(0, self.program.threads, LANES)
        ]
        while True:
            waiting = [warp.run(self._steps) for warp in order.arranged(warps)]
            if len({warp.place for warp in warps}) > 1:
                raise Fault("warps of a block wait at different places, or some of them have ended")
            if not any(waiting):
                return
