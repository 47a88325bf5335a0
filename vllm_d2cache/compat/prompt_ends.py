"""A patch of vLLM's detokenizer: a prompt that ends within a character does not come back in its answer.

Not a diffusion model's trouble: vLLM does it to any model (vllm-project/vllm issue 48853). Our models alone are mended.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

_MARK = "_vllm_d2cache"
# What a character is shown as whose bytes are not all there.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes; a few tokens before it tell how they are joined.
_CONTEXT = 8


def watch(tokenizer: Any) -> None:
    """Have answers detokenized with this tokenizer begin behind their prompt; idempotent."""
    # Without it: the text of an answer is what is new behind the prompt's, of which vLLM knows nothing where it ends in
    # a broken character: all of the prompt is the answer's first piece. No hook: the stream of text is made inside of
    # vLLM. Remove when: vLLM's issue is closed.
    if tokenizer is None or getattr(tokenizer, _MARK, False):
        return
    setattr(tokenizer, _MARK, True)
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    original = IncrementalDetokenizer.from_new_request
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        if getattr(tokenizer, _MARK, False) and request.prompt_token_ids:
            ids = request.prompt_token_ids
            whole = whole_characters(tokenizer, ids)
            if whole < len(ids):
                import msgspec

                request = msgspec.structs.replace(request, prompt_token_ids=ids[:whole])
        return original(tokenizer, request)

    setattr(from_new_request, _MARK, True)
    IncrementalDetokenizer.from_new_request = classmethod(from_new_request)


def whole_characters(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many of the first tokens end with a whole character."""
    for count in range(len(ids), 0, -1):
        if not tokenizer.decode(ids[max(0, count - _CONTEXT) : count]).endswith(_BROKEN):
            return count
    return 0
