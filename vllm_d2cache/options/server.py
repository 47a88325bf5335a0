"""What the operator may say. Imports neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_d2cache.options.types import Choice, Number, OptionError, Text

ATTENTION_BACKENDS = ("triton", "xformers", "torch")
# Canvas length of a request that names no max_tokens (the published gen_length of most tasks). Where texts grow it is
# what is left of the context.
DEFAULT_CANVAS_LENGTH = 256
# Beyond this many rows a step of an 8B model is long enough to hide its launches, and padding costs real time
# (docs/performance.md, "CUDA graphs").
DEFAULT_GRAPH_ROWS = 512

# Settings of the server, and of no request; null is the same as leaving one out.
SERVER_FIELDS: dict[str, Number | Choice | Text] = {
    "trace_dir": Text("a directory name"),
    "refresh_budget": Number(int, 1, note="rows per request and step"),
    "max_canvas": Number(int, DEFAULT_CANVAS_LENGTH, note="positions; the default canvas must fit"),
    "token_frequencies": Text("the name of a .npy file"),
    "attention_backend": Choice(ATTENTION_BACKENDS),
    "graph_rows": Number(int, 0, note="rows; 0 = no CUDA graphs"),
    "request_memory": Number(float, 0, open_low=True, note="GiB"),
    "part_rows": Number(int, 1, note="rows that a layer computes at a time"),
    "block_length": Number(int, 0, note="positions; set by the plugin itself"),
    "prefill_piece": Number(int, 0, note="positions; of models whose text is cut into blocks"),
}


@dataclass(frozen=True)
class ServerOptions:
    """Server-wide options. ``request_defaults`` holds only what the operator set.

    Attributes:
        trace_dir: directory for per-request traces; None = off.
        refresh_budget: rows a request may recompute in a step after its first; None = as many as its policy
            asks for. What does not fit waits for the next step, which makes results approximate.
        max_canvas: longest canvas a request may ask for; None = whatever fits behind its prompt.
        token_frequencies: ``.npy`` file of corpus frequencies, for decoders that need one; None = there is none.
        attention_backend: what computes on a GPU, one of :data:`ATTENTION_BACKENDS`; None = triton there, torch on CPU.
        graph_rows: on a GPU, refresh steps of up to this many rows are CUDA graphs; 0 = none are.
        request_memory: GiB that running requests may take beside K and V (engine/memory_plan.py); None = 2, or more
            where the longest request needs more.
        part_rows: most rows that a layer computes at a time; None = all of a step's. The config hook puts
            ``--max-num-batched-tokens`` here where a first step may have more.
        block_length: of the model family (canvas/traits.py), which the config hook puts here; 0 = it has none.
        prefill_piece: most positions of a prompt that a step computes before the request's first one, where texts are
            cut into blocks; the config hook puts it here, from ``--long-prefill-token-threshold`` where that is set;
            0 = all of a text is computed at once.
    """

    request_defaults: Mapping[str, Any]
    trace_dir: str | None = None
    refresh_budget: int | None = None
    max_canvas: int | None = None
    token_frequencies: str | None = None
    attention_backend: str | None = None
    graph_rows: int = DEFAULT_GRAPH_ROWS
    request_memory: float | None = None
    part_rows: int | None = None
    block_length: int = 0
    prefill_piece: int = 0

    def check_canvas_length(self, length: int) -> None:
        """Refuse a canvas that is longer than the operator allows.

        Raises:
            OptionError: names max_tokens and the valid values.
        """
        if self.max_canvas is not None and length > self.max_canvas:
            raise OptionError(
                f"max_tokens: this server allows canvases of 1 to {self.max_canvas} positions, got {length}"
            )
