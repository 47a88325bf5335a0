"""Slot-indexed state of every running request: tokens, masks, and what the next step is to refresh."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_d2cache.canvas.grammar import GrammarState
from vllm_d2cache.canvas.view import CanvasView, FamilyTraits, OptionColumns, SamplingSpec
from vllm_d2cache.options.server import CONFIDENCE_MEMORIES, SCORES, RequestOptions

# Wider than any text, and still exact in float32.
_WIDEST_GAP = 1 << 20
_MOST_STEPS = 1 << 24


@dataclass
class Request:
    """What the host knows of a running request."""

    req_id: str
    prompt_len: int
    canvas_len: int
    options: RequestOptions
    sampling: SamplingSpec
    row_budget: int = 0  # rows the scheduler reserves for each step after the first
    given: tuple[int, ...] = ()  # a token id for each canvas slot, -1 = hole; () = holes alone
    reserved_len: int = 0  # positions it takes the request for: prompt, canvas, and room for shadows
    grammar: GrammarState | None = None  # what its text must follow; given where options.ordered


class CanvasStates:
    """Device tensors with one line for each slot, and the host's records beside them.

    Args:
        num_slots: requests that can run at a time.
        max_len: most positions a request can have.
    """

    def __init__(self, num_slots: int, max_len: int, device: torch.device, traits: FamilyTraits) -> None:
        self.traits = traits
        self.device = device
        self.requests: dict[int, Request] = {}
        self.tokens = torch.zeros(num_slots, max_len, dtype=torch.int32, device=device)
        self.masked = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)  # by canvas slot
        self.terminal = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)  # by canvas slot
        self.refresh = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)  # by position
        self.observe = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)  # by canvas slot
        self.eligible = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)  # by canvas slot
        self.emitted = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.step = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.window_step = torch.zeros(num_slots, dtype=torch.int64, device=device)  # steps in the current window
        self.prompt_len = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.canvas_len = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.seed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.sampling = torch.zeros(num_slots, 3, device=device)  # temperature, top_p, top_k
        self.numbers = torch.zeros(num_slots, len(OptionColumns._fields), device=device)
        self.stop_ids = torch.full((num_slots, 1), -1, dtype=torch.int32, device=device)

    def add(self, slot: int, request: Request, prompt: np.ndarray, emitted: int) -> None:
        """Give ``slot`` to a request: its prompt and a canvas of masks.

        Args:
            prompt: [P] token ids.
            emitted: tokens already handed out before a preemption; they are decoded again but not emitted again.
        """
        p, g = request.prompt_len, request.canvas_len
        self.requests[slot] = request
        self.tokens[slot, :p] = torch.from_numpy(np.ascontiguousarray(prompt, dtype=np.int32)).to(self.device)
        self.tokens[slot, p : p + g] = self.traits.mask_token_id
        self.masked[slot] = False
        self.masked[slot, :g] = True
        self.terminal[slot] = False
        self._set_stop_ids(slot, request.sampling.stop_token_ids)
        if request.given:
            self._set_given(slot, request)
        self.emitted[slot] = emitted
        self.step[slot] = 0
        self.window_step[slot] = 0
        self.prompt_len[slot] = p
        self.canvas_len[slot] = g
        sampling, options = request.sampling, request.options
        self.seed[slot] = sampling.seed
        # The nucleus that shapes confidences also bounds what may be sampled.
        top_p = min(sampling.top_p, options.confidence_top_p) if sampling.temperature else options.confidence_top_p
        top_k = sampling.top_k if sampling.temperature else 0
        self.sampling[slot] = torch.tensor([sampling.temperature, top_p, float(top_k)])
        self.numbers[slot] = torch.tensor(_option_numbers(options, g))

    def remove(self, slot: int) -> None:
        """Forget the request in ``slot``."""
        del self.requests[slot]

    def _set_given(self, slot: int, request: Request) -> None:
        """Write the tokens the request gives; from then on they are like committed ones."""
        p, g = request.prompt_len, request.canvas_len
        given = torch.tensor(request.given, dtype=torch.int32, device=self.device)
        fixed = given >= 0
        self.tokens[slot, p : p + g][fixed] = given[fixed]
        self.masked[slot, :g] = ~fixed
        self.terminal[slot, :g] = fixed & torch.isin(given, self.stop_ids[slot])

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = torch.nn.functional.pad(self.stop_ids, (0, missing), value=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stop_ids)] = torch.tensor(stop_ids, dtype=torch.int32)

    def view(self, slots: torch.Tensor, slots_host: list[int]) -> CanvasView:
        """The canvases of ``slots`` [R] as they are now, padded to the widest."""
        requests = [self.requests[s] for s in slots_host]
        num_positions = max(r.prompt_len + r.canvas_len for r in requests)
        width = max(r.canvas_len for r in requests)
        masked, terminal = self.masked[slots, :width], self.terminal[slots, :width]
        options = _columns(self.numbers[slots])
        return make_view(
            slots, self.prompt_len[slots], self.canvas_len[slots], masked, terminal, num_positions, options
        )


def state_bytes(num_slots: int, max_len: int) -> int:
    """Bytes of the tensors of :class:`CanvasStates`, but for the columns that grow with the number of stop tokens."""
    return tensor_bytes(CanvasStates(num_slots, max_len, torch.device("meta"), FamilyTraits(mask_token_id=0)))


def tensor_bytes(owner: object) -> int:
    """Bytes of the tensors that are attributes of ``owner``, or in a dictionary that is one."""
    values = vars(owner).values()
    held = [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def make_view(
    slots: torch.Tensor,
    prompt_len: torch.Tensor,
    canvas_len: torch.Tensor,
    masked: torch.Tensor,
    terminal: torch.Tensor,
    num_positions: int,
    options: OptionColumns,
) -> CanvasView:
    """A view with the live slots and the current window worked out.

    The window is the one that holds the first masked live slot: windows fill up from left to right.
    """
    live = terminal.cumsum(1) == 0
    first = (masked & live).to(torch.int8).argmax(1)
    start = first - first % options.window
    return CanvasView(slots, prompt_len, canvas_len, masked, live, start, num_positions, options)


def canvas_to_positions(mask: torch.Tensor, view: CanvasView, shift: int = 0) -> torch.Tensor:
    """[R, G] bool (or numbers) over canvas slots as [R, T] over positions, moved left by ``shift``; elsewhere 0."""
    index = view.prompt_len.unsqueeze(1) + view.slot_index - shift
    # Slots past a row's canvas land in a column that is cut off.
    index = torch.where(view.in_canvas, index, view.num_positions)
    out = mask.new_zeros(mask.shape[0], view.num_positions + 1)
    return out.scatter_(1, index, mask)[:, : view.num_positions]


def positions_to_canvas(mask: torch.Tensor, view: CanvasView, shift: int = 0) -> torch.Tensor:
    """[R, T] bool over positions as [R, G] bool over the canvas slots that read them."""
    index = view.prompt_len.unsqueeze(1) + view.slot_index - shift
    return mask.gather(1, index.clamp(max=view.num_positions - 1)) & view.in_canvas


def _option_numbers(options: RequestOptions, canvas_len: int) -> list[float]:
    return [
        options.window_length(canvas_len),
        min(options.tokens_per_step, canvas_len),
        options.threshold,
        options.factor,
        SCORES.index(options.score),
        options.sigma,
        options.selection_sigma,
        min(options.current_k, canvas_len),
        options.rollout_p,
        min(options.inflate_w, _WIDEST_GAP),
        CONFIDENCE_MEMORIES.index(options.confidence_memory),
        min(options.steps, _MOST_STEPS),
        options.longest_run(canvas_len),
    ]


def _columns(numbers: torch.Tensor) -> OptionColumns:
    column = dict(zip(OptionColumns._fields, numbers.unbind(1), strict=True))
    for name in ("window", "tokens_per_step", "score", "current_k", "inflate_w", "steps", "longest_run"):
        column[name] = column[name].long()
    column["latest_memory"] = column["latest_memory"] > 0
    return OptionColumns(**column)
