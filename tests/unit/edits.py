"""Edits of logits in plain loops, one row at a time, in the order of vLLM's documentation."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from tests.unit.batches import MASK, VOCAB
from vllm_d2cache.canvas.request import EditSpec

NEVER = -float("inf")


def edited(logits: Sequence[float], spec: EditSpec, slot: int, prompt: Sequence[int], written: Sequence[int]) -> list:
    """The logits of one row; ``written`` are the tokens that stand in the canvas, in any order."""
    out = list(logits)
    if spec.allowed:
        out = [x if t in spec.allowed else NEVER for t, x in enumerate(out)]
    for token, value in spec.bias:
        out[token] += value
    if slot < spec.min_tokens:
        for token in spec.stop_ids:
            out[token] = NEVER
    repetition, frequency, presence = spec.penalties
    for token in set(prompt) | set(written):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token in set(written):
        out[token] -= frequency * list(written).count(token) + presence
    for token in spec.banned:
        out[token] = NEVER
    return out


_tokens = st.sampled_from([t for t in range(VOCAB) if t != MASK])
_some = st.lists(_tokens, min_size=1, max_size=4, unique=True).map(tuple)

specs = st.builds(
    EditSpec,
    allowed=st.one_of(st.just(()), st.lists(_tokens, min_size=9, max_size=12, unique=True).map(tuple)),
    bias=st.one_of(
        st.just(()),
        st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -2.5, 1.0, 100.0]), max_size=3).map(
            lambda d: tuple(d.items())
        ),
    ),
    banned=st.one_of(st.just(()), _some),
    min_tokens=st.sampled_from([0, 0, 1, 3, 50]),
    stop_ids=_some,
    penalties=st.sampled_from([(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.7, 0.5, -0.5), (1.0, 2.0, 0.0), (2.0, -1.0, 1.5)]),
)
