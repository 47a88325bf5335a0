"""vLLM's grammar backends in the worker, where tokens are committed (canvas/grammar.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.request import StructuredOutputRequest

from vllm_d2cache.canvas.grammar import DeadEnd, GrammarState, Matcher, bits_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")


class Grammars:
    """Compiles the grammars of a worker's requests; a backend keeps what it has compiled for the next request with it.

    The scheduler has grammars of its own, which follow what is emitted. It has compiled each one before the worker
    meets it: a request whose grammar cannot be compiled never gets here.

    Args:
        all_reduce: sums a tensor over the ranks; None on a single rank.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, all_reduce: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        self._manager = StructuredOutputManager(vllm_config)
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._mask_token_id: int = vllm_config.model_config.hf_config.mask_token_id
        self._device = device
        self._all_reduce = all_reduce
        self._never: dict[tuple[bool, bytes], np.ndarray] = {}

    def start(self, params: SamplingParams) -> GrammarState:
        """The request's grammar at its start."""
        stops = [t for t in (params.eos_token_id, *(params.stop_token_ids or ())) if t is not None]
        matcher = self._agreed(self._compile(params))
        assert self._manager.backend is not None
        bitmask = self._manager.backend.allocate_token_bitmask(1)
        return GrammarState(matcher, bitmask, self._never_chosen(params, bitmask.shape[1]), stops)

    def _never_chosen(self, params: SamplingParams, width: int) -> np.ndarray:
        """[width] int32: bits of tokens that are not chosen, whatever the grammar says."""
        wanted = params.structured_outputs
        assert wanted is not None
        controls = b""
        if isinstance(self._manager.backend, XgrammarBackend):
            # It lets control characters into strings of limited length, which no JSON reader takes. Elsewhere JSON has
            # none of them without spare whitespace; around a structural tag there may be any text.
            if wanted.json is not None or wanted.json_object:
                controls = bytes(range(32))
            elif wanted.structural_tag is not None:
                controls = bytes(set(range(32)) - set(b"\t\n\r"))
        key = (params.skip_special_tokens, controls)
        if key not in self._never:
            tokens = {self._mask_token_id} | self._tokens_with(controls)
            if params.skip_special_tokens:
                # Text that the detokeniser drops is no text, whatever the grammar takes it for.
                tokens |= _special_token_ids(self._manager.tokenizer)
            self._never[key] = bits_of(tokens, width)
        return self._never[key]

    def _tokens_with(self, characters: bytes) -> set[int]:
        """Tokens that have one of these bytes."""
        if not characters:
            return set()
        from xgrammar import TokenizerInfo

        texts = TokenizerInfo.from_huggingface(self._manager.tokenizer, vocab_size=self._vocab_size).decoded_vocab
        found = re.compile(b"[" + re.escape(characters) + b"]").search
        return {token for token, text in enumerate(texts) if found(text)}

    def _compile(self, params: SamplingParams) -> Matcher | None:
        """None where it fails though the scheduler could do it: there is a limit of time for some."""
        wanted = StructuredOutputRequest.from_sampling_params(params)
        assert wanted is not None
        request: Any = SimpleNamespace(request_id="", sampling_params=params, structured_output_request=wanted)
        try:
            self._manager.grammar_init(request)
            made = wanted._grammar
            return made.result() if isinstance(made, Future) else made
        except Exception:
            logger.exception("A grammar that the scheduler could compile fails in the worker; its request ends.")
            return None

    def _agreed(self, matcher: Matcher | None) -> Matcher:
        """A request must not go on in one rank and end in another."""
        if self._all_reduce is not None:
            failures = self._all_reduce(torch.tensor([float(matcher is None)], device=self._device))
            if failures.item() > 0:
                return DeadEnd()
        return DeadEnd() if matcher is None else matcher


def _special_token_ids(tokenizer: Any) -> set[int]:
    """Tokens that are dropped with ``skip_special_tokens``."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
