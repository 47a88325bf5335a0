"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: ``ok``; ``note``, which keeps nothing from working; ``problem``, with which serving fails.
        section: ``environment`` or ``model``.
        name: what was looked at.
        text: what was found, and for a problem what to do.
    """

    status: Literal["ok", "note", "problem"]
    section: str
    name: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)
