"""What of a request can only be judged knowing the model: its vocabulary, its mask token, its stop tokens."""

from __future__ import annotations

import math
from typing import Any

from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.mechanisms.base import ROWS
from vllm_d2cache.options.request import CANVAS, PREFIX, RequestOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.budget import extra_rows
from vllm_d2cache.policies.registry import policy_class
from vllm_d2cache.requests.asked import HOLE

# Entries a request may list; the tables of all running requests are as wide as the longest list.
LONGEST_LIST = 1024


def check_room(
    field: str, asked: int, room: int, default: bool = False, cap: int | None = None, echoes: bool = False
) -> None:
    """Refuse a canvas of ``asked`` positions where ``room`` are left for it; ``field`` asks for it, or could.

    Args:
        default: the request says nothing: ``asked`` is the server's default.
        cap: the longest canvas that the operator allows; None = no such limit.
        echoes: the prompt comes back with the answer, and may be all that is asked for.

    Raises:
        OptionError: names the field and the valid values.
    """
    if asked < 1 and not (asked == 0 and echoes):
        raise OptionError(f"{field}: a canvas has at least 1 position, got {asked}")
    if asked <= room:
        return
    if room < 1:
        raise OptionError(f"{field}: the prompt leaves no room for a canvas; shorten it by at least {1 - room} tokens")
    what = f"the default canvas of {asked}" if default else f"a canvas of {asked}"
    if cap is not None and room == cap:
        limit = f"is longer than the operator's max_new_tokens; valid values are 1 to {room}"
    else:
        limit = f"does not fit behind this prompt; valid values are 1 to {room}"
    raise OptionError(f"{field}: {what} positions {limit}")


def check_options_fit(options: RequestOptions, canvas_length: int, room: int, given: bool) -> None:
    """Refuse options that do not go with a canvas of ``canvas_length`` where ``room`` positions are left for it.

    Args:
        given: the request gives the canvas in part.

    Raises:
        OptionError: ``steps`` cannot be divided among the windows, there is no room for rows behind the text, or the
            decoder cannot tell given tokens from its own.
    """
    if given and DECODER_CLASSES[options.decoder].revokes:
        raise OptionError(
            f"{PREFIX}decoder: {options.decoder!r} may take back any token of its window and does not go with "
            f"{CANVAS}, whose tokens must stay; choose another decoder"
        )
    if given and options.block:
        raise OptionError(f"{CANVAS}: not with this model, whose text is written block by block; leave it out")
    behind = extra_rows(options, canvas_length)
    if canvas_length + behind > room:
        raise OptionError(
            f"{PREFIX}decoder: {options.decoder!r} needs {behind} positions, its window, besides the canvas of "
            f"{canvas_length}; behind this prompt there is room for {room}"
        )
    if options.block:
        return  # steps are those of a window
    window = options.window_length(canvas_length)
    windows = -(-canvas_length // window)
    if options.steps % windows:
        raise OptionError(
            f"{PREFIX}steps: must be a multiple of {windows}, the windows of {window} positions in a canvas of "
            f"{canvas_length}, got {options.steps}"
        )


def check_adapters_fit(options: RequestOptions) -> None:
    """Refuse what a server with adapters cannot do, for requests without one too: they may share a batch.

    Raises:
        OptionError: the policy has layers leave rows out; vLLM's adapters are told the rows of a step, not of a layer.
    """
    policy = policy_class(options.policy, options.block)
    if ROWS in policy.takes().union(*(use.takes for use in policy.uses)):
        raise OptionError(
            f"{PREFIX}policy: {options.policy!r} leaves rows out of layers, which adapters do not follow; on a server "
            "with --enable-lora choose another"
        )


def check_fit(params: Any, canvas: tuple[int, ...], vocab_size: int, mask_token_id: int) -> None:
    """Refuse what this model cannot do.

    Args:
        params: vLLM's SamplingParams after the tokenizer and the generation configuration were applied to them.
        canvas: that the request gives (requests/asked.py).

    Raises:
        OptionError: naming the field and its valid values.
    """
    if params.logprobs is not None and not 0 <= params.logprobs <= vocab_size:
        raise OptionError(f"logprobs: must be 0 to {vocab_size}, got {params.logprobs}")
    for field in ("logit_bias", "allowed_token_ids"):
        entries = getattr(params, field) or ()
        if len(entries) > LONGEST_LIST:
            raise OptionError(f"{field}: must have at most {LONGEST_LIST} entries, got {len(entries)}")
    for token, bias in (params.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise OptionError(f"logit_bias: must be finite, got {bias} for token {token}")
    banned = _banned(params)
    _check_choice(params, banned, vocab_size, mask_token_id)
    if canvas:
        _check_canvas(params, canvas, vocab_size, mask_token_id)


def _banned(params: Any) -> set[int]:
    """The token ids of bad_words."""
    if not params.bad_words:
        return set()
    words = params.bad_words_token_ids
    if words is None:
        raise OptionError("bad_words: needs a tokenizer, and this engine was started without one")
    several = [ids for ids in words if len(ids) != 1]
    if several:
        raise OptionError(
            "bad_words: each must be a single token, as tokens are committed in any order; these token ids are a word "
            f"of several: {several}"
        )
    return {ids[0] for ids in words}


def _check_choice(params: Any, banned: set[int], vocab_size: int, mask_token_id: int) -> None:
    """Some token must be left for every slot."""
    never = banned | {mask_token_id} | (set(params.all_stop_token_ids) if params.min_tokens else set())
    allowed = params.allowed_token_ids
    left = len(set(allowed) - never) if allowed else vocab_size - len(never)
    if left < 1:
        field = "allowed_token_ids" if allowed else "bad_words"
        raise OptionError(
            f"{field}: leaves no token to choose; bad_words, the mask token ({mask_token_id}) and, with min_tokens, "
            "stop tokens are never chosen"
        )


def _check_canvas(params: Any, canvas: tuple[int, ...], vocab_size: int, mask_token_id: int) -> None:
    if params.max_tokens != len(canvas):
        raise OptionError(
            f"max_tokens: must be the length of {CANVAS}, {len(canvas)}, or be left out over HTTP; "
            f"got {params.max_tokens}"
        )
    wrong = next((t for t in canvas if t >= vocab_size or t == mask_token_id), None)
    if wrong is not None:
        raise OptionError(
            f"{CANVAS}: must hold token ids from 0 to {vocab_size - 1} without the mask token ({mask_token_id}: "
            f"a hole is {HOLE}), got {wrong}"
        )
    stops = {params.eos_token_id, *(params.stop_token_ids or ())}
    if HOLE not in canvas[: next((i for i, t in enumerate(canvas) if t in stops), len(canvas))]:
        raise OptionError(f"{CANVAS}: must have a hole before its first stop token; behind that nothing is written")
