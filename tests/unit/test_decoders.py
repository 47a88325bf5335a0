"""Each decoder on cases worked out by hand (docs/decoders.md, d2cache.md section 4, rivals.md sections 6 and 13)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.views import view_of
from vllm_d2cache.config import RequestOptions
from vllm_d2cache.samplers import DECODER_CLASSES, Decoder, DecoderStep


def made(name: str, num_slots: int = 1, **options: Any) -> Decoder:
    """A decoder whose slots all hold requests with these options."""
    decoder = DECODER_CLASSES[name](num_slots, 64, torch.device("cpu"))
    for slot in range(num_slots):
        decoder.start(slot, RequestOptions(decoder=name, **options), 64)
    return decoder


def step_of(
    canvas: str, score: list[float], candidates: list[int] | None = None, least: int = 1, **columns: Any
) -> DecoderStep:
    """One request's step on a canvas drawn as text (``#`` masked); all masked slots are candidates unless listed."""
    entropy = columns.pop("entropy", None)
    view = view_of([canvas], [3], **columns)
    chosen = view.masked & view.in_window
    if candidates is not None:
        chosen = torch.zeros_like(chosen)
        chosen[0, candidates] = True
    return DecoderStep(
        view,
        chosen,
        torch.tensor([score]),
        torch.tensor([least]),
        None if entropy is None else torch.tensor([entropy]),
    )


def chosen(decoder: Decoder, step: DecoderStep) -> list[int]:
    """Slots committed for the one request."""
    return decoder.choose(step)[0].nonzero().flatten().tolist()


class TestEb:
    """As many as keep the sum of entropies, less the largest, within gamma."""

    def test_the_largest_entropy_is_free(self) -> None:
        # By score: slots 1, 0, 3, 2 with entropies 0.1, 0.5, 0.25, 2: excess 0, 0.1, 0.35, 0.85.
        step = step_of("####", [0.8, 0.9, 0.1, 0.3], entropy=[0.5, 0.1, 2.0, 0.25])
        assert chosen(made("eb", gamma=0.0), step) == [1]
        assert chosen(made("eb", gamma=0.1001), step) == [0, 1]
        assert chosen(made("eb", gamma=0.36), step) == [0, 1, 3]
        assert chosen(made("eb", gamma=0.86), step) == [0, 1, 2, 3]

    def test_the_running_maximum_is_along_the_ranking(self) -> None:
        """The published code takes it across the batch: the excess would be the sum of all previous entropies."""
        # Entropies 1, 0.1, 0.1 by rank: excess 0, 0.1, 0.2; without the running maximum it would be 0, 1, 1.1.
        assert chosen(made("eb", gamma=0.21), step_of("###", [0.9, 0.8, 0.7], entropy=[1.0, 0.1, 0.1])) == [0, 1, 2]

    def test_between_the_least_and_all(self) -> None:
        assert chosen(made("eb", gamma=0.0), step_of("###", [0.9, 0.8, 0.7], least=2, entropy=[1.0] * 3)) == [0, 1]
        assert chosen(made("eb", gamma=99.0), step_of("###", [0.9, 0.8, 0.7], [2], entropy=[1.0] * 3)) == [2]
        assert chosen(made("eb", gamma=99.0), step_of("###", [0.9, 0.8, 0.7], [], entropy=[1.0] * 3)) == []

    def test_certain_tokens_come_together(self) -> None:
        assert chosen(made("eb"), step_of("#" * 5, [0.5] * 5, entropy=[0.0] * 5)) == [0, 1, 2, 3, 4]

    @given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8), st.integers(0, 20))
    def test_matches_the_loop(self, pairs: list[tuple[int, int]], gamma: int) -> None:
        score, entropy = [a / 8 for a, _ in pairs], [b / 8 for _, b in pairs]
        order = sorted(range(len(pairs)), key=lambda g: (-score[g], g))
        count = 0
        for n in range(1, len(order) + 1):
            head = [entropy[g] for g in order[:n]]
            if math.fsum(head) - max(head) <= gamma / 8:
                count = n
        step = step_of("#" * len(pairs), score, entropy=entropy)
        assert chosen(made("eb", gamma=gamma / 8), step) == sorted(order[: max(1, count)])


@pytest.mark.parametrize("name", DECODER_CLASSES)
def test_no_candidates_no_commits(name: str) -> None:
    assert chosen(made(name), step_of("####", [0.9] * 4, [], entropy=[0.1] * 4)) == []
