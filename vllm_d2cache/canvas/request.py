"""What the host knows of a running request."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_d2cache.canvas.grammar import GrammarState
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.sampling import SamplingSpec


@dataclass
class Request:
    """A running request, from its admission to its end."""

    req_id: str
    prompt_len: int
    canvas_len: int
    options: RequestOptions
    sampling: SamplingSpec
    row_budget: int = 0  # rows the scheduler reserves for each step once all positions have been computed
    given: tuple[int, ...] = ()  # a token id for each canvas slot, -1 = hole; () = holes alone
    reserved_len: int = 0  # positions it takes the request for: the text, and room for rows behind it
    grammar: GrammarState | None = None  # what its text must follow; given where options.ordered
    computed: int = 0  # positions whose K and V some step has written, from the left
    first_end: int = 0  # how far its first step must reach; until then it can only be filled
    reach: int = 0  # up to which position it has memory in the step under way; 0 = all of its text
    wanted: int = 0  # tokens after which it ends, where a last block sticks out of its answer; 0 = its whole canvas

    @property
    def length(self) -> int:
        """Positions of its text as it is now, T."""
        return self.prompt_len + self.canvas_len

    @property
    def visible(self) -> int:
        """Positions of its text that a step can see."""
        return min(self.length, self.reach or self.length)

    @property
    def most_rows(self) -> int:
        """Rows of the text that its next step can have: what has never been computed, then the row budget."""
        return self.length if self.computed < self.length else self.row_budget

    @property
    def most_emitted(self) -> int:
        """Most tokens that a step hands out: those of a window, as windows fill in turn; given ones may follow."""
        return self.canvas_len if self.given else self.options.window_length(self.canvas_len)
