"""A program from the text of one kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_KERNEL = re.compile(
    r"\.entry\s+\w+\((?P<parameters>.*?)\)(?P<settings>[^{]*)\{(?P<body>.*?)^\}", re.DOTALL | re.MULTILINE
)
_COMMENT = re.compile(r"//[^\n]*")
_LINE_NUMBER = re.compile(r"^\s*\.loc\b[^\n]*$", re.MULTILINE)
_LABEL = re.compile(r"^([$\w]+):\s*")
_REGISTERS = re.compile(r"^\.reg\s+\.(\w+)\s+(.*)$")
_GUARD = re.compile(r"^@(!?)(\S+)\s+")
_OPERAND = re.compile(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,])+)")

# What all lanes of a warp do at once, and therefore wait for.
_TOGETHER = {"bar", "shfl", "redux", "vote", "match"}


@dataclass(frozen=True)
class Instruction:
    """One line: ``@!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 8 ];``."""

    opcode: tuple[str, ...]  # ("ld", "global", "v2", "b32")
    operands: tuple[str, ...]  # ("{ %r1, %r2 }", "[ %rd1 + 8 ]")
    guard: str | None = None  # "%p1"
    negated: bool = False
    text: str = ""

    @cached_property
    def name(self) -> str:
        """The first word of the opcode."""
        return self.opcode[0]

    @cached_property
    def kind(self) -> str:
        """The last word of the opcode: the type of its numbers."""
        return self.opcode[-1]

    @cached_property
    def together(self) -> bool:
        """Whether a lane waits here for the others of its warp."""
        return self.name in _TOGETHER

    @cached_property
    def parts(self) -> list[tuple[str, ...]]:
        """The registers of each operand that stands in braces; of others the operand itself."""
        return [tuple(x.strip() for x in operand.strip("{}").split(",")) for operand in self.operands]


class Program:
    """The instructions of a kernel.

    Attributes:
        parameters: their names, in order.
        threads: of a block.
        instructions: in the order of the text.
        labels: number of the instruction behind each.
        shared: names of the block's shared memory, which is one piece.
    """

    def __init__(self, ptx: str) -> None:
        found = _KERNEL.search(ptx)
        assert found is not None, "no kernel"
        self.parameters = re.findall(r"\.param\s[^,]*?(\w+)\s*(?:,|$)", found["parameters"].strip())
        threads = re.search(r"\.reqntid\s+(\d+)", found["settings"])
        assert threads is not None, found["settings"]
        self.threads = int(threads[1])
        self.shared = set(re.findall(r"\.shared\s[^;]*?(\w+)\[", ptx))
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._widths: dict[str, np.dtype] = {}
        for statement in _LINE_NUMBER.sub("", _COMMENT.sub("", found["body"])).split(";"):
            self._add(statement)

    def width(self, register: str) -> np.dtype:
        """What a register holds: bool, or uint16 to uint64."""
        width = self._widths.get(register)
        if width is None:
            width = self._widths[register] = self._widths[register.rstrip("0123456789")]
        return width

    def _add(self, statement: str) -> None:
        statement = statement.strip()
        # Braces around statements bound the scope of names, which are told apart without it.
        while statement[:1] in ("{", "}") or _LABEL.match(statement):
            label = _LABEL.match(statement)
            if label:
                self.labels[label[1]] = len(self.instructions)
            statement = statement[label.end() if label else 1 :].strip()
        registers = _REGISTERS.match(statement)
        if registers:
            width = np.dtype(bool if registers[1] == "pred" else f"u{int(registers[1][1:]) // 8}")
            for name in registers[2].split(","):
                self._widths[name.split("<")[0].strip().rstrip("0123456789")] = width
        elif statement and not statement.startswith("."):
            self.instructions.append(_instruction(statement))


def _instruction(text: str) -> Instruction:
    guard = _GUARD.match(text)
    opcode, _, rest = (text[guard.end() :] if guard else text).partition(" ")
    opcode, _, more = opcode.partition("\t")
    operands = tuple(x.strip() for x in _OPERAND.findall(f"{more} {rest}") if x.strip())
    return Instruction(
        tuple(opcode.split(".")),
        operands,
        guard[2] if guard else None,
        bool(guard and guard[1]),
        " ".join(text.split()),
    )
