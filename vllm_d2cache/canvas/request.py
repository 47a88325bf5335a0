"""What the host knows of a running request."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_d2cache.canvas.grammar import GrammarState
from vllm_d2cache.options.request import RequestOptions


@dataclass(frozen=True)
class EditSpec:
    """What a request asks to be done to its logits before a token is chosen."""

    allowed: tuple[int, ...] = ()  # nothing else may be chosen; () = anything
    bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    banned: tuple[int, ...] = ()  # never chosen
    min_tokens: int = 0  # in this many first slots none of ``stop_ids`` is chosen
    stop_ids: tuple[int, ...] = ()
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)  # repetition, frequency, presence; these = off


@dataclass(frozen=True)
class SamplingSpec:
    """The part of a request's sampling parameters that the row statistics need."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end-of-text included unless the request ignores it
    num_logprobs: int | None = None  # alternatives to report with each token; None = no log-probabilities
    edits: EditSpec = EditSpec()


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

    @property
    def length(self) -> int:
        """Positions of its text as it is now, T."""
        return self.prompt_len + self.canvas_len

    @property
    def most_rows(self) -> int:
        """Rows of the text that its next step can have: what has never been computed, then the row budget."""
        return self.length if self.computed < self.length else self.row_budget
