"""Each decoder on cases worked out by hand (docs/decoders.md,.

docs/methods/d2cache.md section 4, docs/methods/other-caches.md sections 6 and 13).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.views import view_of
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.decoders import DECODER_CLASSES, Decoder, DecoderStep, PredictedRows
from vllm_d2cache.decoders.klass import KlassDecoder
from vllm_d2cache.decoders.pool import CanvasPool
from vllm_d2cache.mechanisms.base import Finding, Worker
from vllm_d2cache.mechanisms.shadows import Verified
from vllm_d2cache.ops.row_stats import RowParams, RowStats
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions

SERVER = ServerOptions({}, token_frequencies=str(Path(__file__).parents[1].joinpath("token_freq_5.npy")))


def request(name: str, **own: Any) -> Request:
    """One that has chosen a decoder, with options of the decoder's own."""
    options = {option: own.get(option, spec.default) for option, spec in DECODER_CLASSES[name].options.items()}
    return Request("r", 0, 64, RequestOptions(decoder=name, decoder_options=options), SamplingSpec())


def made(name: str, num_slots: int = 1, **options: Any) -> Decoder:
    """A decoder whose slots all hold requests with these options."""
    decoder = DECODER_CLASSES[name](Worker(num_slots, 64, torch.device("cpu"), FamilyTraits(0), SERVER))
    for slot in range(num_slots):
        decoder.start(slot, request(name, **options))
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
    # Nothing has been verified where nobody says so.
    found: tuple[Finding, ...] = (Verified(torch.zeros_like(chosen), torch.zeros(chosen.shape)),)
    return DecoderStep(
        view,
        chosen,
        torch.zeros_like(chosen, dtype=torch.int32),
        torch.tensor([score]),
        torch.tensor([least]),
        None if entropy is None else torch.tensor([entropy]),
        found,
    )


def chosen(decoder: Decoder, step: DecoderStep) -> list[int]:
    """Slots committed for the one request."""
    return decoder.choose(step).slots[0].nonzero().flatten().tolist()


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


class TestKlass:
    """Stable candidates by threshold, else the best."""

    @staticmethod
    def decoder(calm: list[int], **options: Any) -> Decoder:
        decoder = made("klass", **options)
        assert isinstance(decoder, KlassDecoder)
        decoder.calm[0, : len(calm)] = torch.tensor(calm, dtype=torch.int32)
        return decoder

    def test_stable_ones_over_the_threshold_and_no_others(self) -> None:
        step = step_of("####", [0.99, 0.8, 0.6, 0.7], threshold=0.65)
        assert chosen(self.decoder([1, 2, 5, 3], kl_history_length=2), step) == [1, 3]
        assert chosen(self.decoder([1, 2, 5, 3], kl_history_length=3), step) == [3]

    def test_the_minimum_is_of_the_unstable_case_alone(self) -> None:
        step = step_of("####", [0.99, 0.8, 0.6, 0.7], least=3, threshold=0.65)
        assert chosen(self.decoder([0, 2, 0, 0]), step) == [1]
        assert chosen(self.decoder([0, 0, 2, 0]), step) == [0, 1, 3]

    def test_factor_among_the_stable(self) -> None:
        # 2 * 0.05 = 0.1, 3 * 0.1 = 0.3, 4 * 0.2 = 0.8 >= 0.5: two of the three stable ones.
        step = step_of("####", [0.8, 0.95, 0.99, 0.9], factor=0.5)
        assert chosen(self.decoder([2, 2, 0, 2]), step) == [1, 3]
        assert chosen(self.decoder([0, 2, 0, 0]), step) == [2], "one less than one is nothing"

    def test_a_history_by_hand(self) -> None:
        """Probabilities (1/2, 1/2), twice (3/4, 1/4), then (1/2, 1/2) again: divergence large, 0.131, 0, 0.144."""
        half, three = [0.0, 0.0], [math.log(3), 0.0]
        decoder = made("klass", kl_threshold=0.14)
        assert isinstance(decoder, KlassDecoder)
        seen = []
        for logits in (half, three, three, half):
            feed(decoder, torch.tensor([logits]), [2])
            seen.append(int(decoder.calm[0, 2]))
        assert seen == [0, 1, 2, 0]
        assert decoder.calm[0, 1] == 2, "untouched slots start with a history of zeros"

    def test_skipped_steps_do_not_count(self) -> None:
        """With a partial cache a slot is compared with the last time it was computed."""
        decoder = made("klass", kl_threshold=0.14)
        assert isinstance(decoder, KlassDecoder)
        feed(decoder, torch.tensor([[0.0, 1.0], [2.0, 0.0]]), [0, 1])
        feed(decoder, torch.tensor([[-5.0, 1.0]]), [1])
        feed(decoder, torch.tensor([[0.0, 1.0], [-5.0, 1.0]]), [0, 1])
        assert decoder.calm[0, :2].tolist() == [1, 1]

    def test_a_new_tenant_starts_over(self) -> None:
        decoder = made("klass")
        assert isinstance(decoder, KlassDecoder)
        same = torch.tensor([[0.0, 1.0]])
        feed(decoder, same, [0])
        decoder.stop(0)
        decoder.start(0, request("klass"))
        assert decoder.calm[0, 0] == 2
        feed(decoder, same, [0])
        assert decoder.calm[0, 0] == 0, "there is no last distribution"


class TestPc:
    """Confidence times rarity, clipped."""

    def test_the_debiased_confidence(self) -> None:
        stats = RowStats(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0.5, 0.5, 1.0, 1.0, 0.75]), None, None)
        decoder = made("pc", num_slots=2)
        got = decoder.rescore(stats, torch.full((5,), math.nan), torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1, 0]))
        want = [0.5 * math.log(2), 0.5 * math.log(4), math.log(8), 0.0, 10.0]
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=1e-6)

    def test_the_clip_is_each_requests_own(self) -> None:
        stats = RowStats(torch.tensor([4, 4]), torch.tensor([0.5, 1.0]), None, None)
        decoder = made("pc", num_slots=2)
        decoder.start(1, request("pc", clip_alpha=0.25))
        got = decoder.rescore(stats, torch.zeros(2), torch.tensor([1, 0]), torch.tensor([1, 0]))
        torch.testing.assert_close(got, torch.tensor([10.0, 0.25]))

    def test_a_fixed_count_and_ties_to_the_lower_slot(self) -> None:
        assert chosen(made("pc"), step_of("###", [3.0, 10.0, 10.0])) == [1]
        assert chosen(made("pc"), step_of("###", [3.0, 10.0, 10.0], least=2)) == [1, 2]


def feed(decoder: Decoder, logits: torch.Tensor, canvas_slots: list[int], window: int | None = None) -> torch.Tensor:
    """Show a decoder the logits of one request's canvas slots; returns them as the decoder left them.

    The mask token is the last of the vocabulary.
    """
    n = len(canvas_slots)
    zero = torch.zeros(n)
    params = RowParams(zero, zero + 1, zero.long(), zero.double(), False, False)
    slots = torch.zeros(n, dtype=torch.int64)
    length = 1 + max(canvas_slots)
    view = view_of(["#" * length], [1], window=window or length)
    predicted = torch.zeros_like(view.masked)
    predicted[0, canvas_slots] = True
    rows = PredictedRows(
        view,
        predicted,
        slots,
        torch.tensor(canvas_slots),
        None,
        None,
        logits.clone(),
        torch.clone,
        params,
        logits.shape[1] - 1,
    )
    read = decoder.tile_reader(rows)
    assert read is not None
    left = logits.clone()
    read(0, n, left)
    return left


class TestCredit:
    """Raised logits, and all candidates over the threshold."""

    LOGITS: ClassVar[list[list[float]]] = [[math.log(3), math.log(2), 0.0, -math.inf]]  # 1/2, 1/3, 1/6; the mask

    def test_credit_by_hand(self) -> None:
        decoder = made("credit", credit_alpha=2.0, credit_beta=0.5, credit_gamma=1.0)
        logits = torch.tensor(self.LOGITS)
        # Step 1: token 0 gains 1/2. Step 2, other logits: token 2 gains 1/2, token 0 keeps 1/4. Step 3: 1/8 + 1/2, 1/4.
        raised = feed(decoder, logits, [7])
        torch.testing.assert_close(raised, logits + torch.tensor([[2 * math.log(1.5), 0, 0, 0]]))
        turned = logits[:, [2, 1, 0, 3]]
        raised = feed(decoder, turned, [7])
        torch.testing.assert_close(raised, turned + torch.tensor([[2 * math.log(1.25), 0, 2 * math.log(1.5), 0]]))
        raised = feed(decoder, logits, [7])
        torch.testing.assert_close(raised, logits + torch.tensor([[2 * math.log(1.625), 0, 2 * math.log(1.25), 0]]))

    def test_raw_probabilities_give_credit(self) -> None:
        """Not those that credit has raised: else a token could never lose its lead."""
        decoder = made("credit", credit_alpha=50.0, credit_beta=0.0, credit_gamma=0.0)
        logits = torch.tensor(self.LOGITS)
        feed(decoder, logits, [0])
        raised = feed(decoder, logits[:, [1, 0, 2, 3]], [0])
        assert raised.argmax(1).tolist() == [1]

    def test_slots_outside_the_window_gain_none(self) -> None:
        decoder = made("credit")
        logits = torch.tensor(self.LOGITS * 2)
        raised = feed(decoder, logits, [0, 40], window=32)
        assert raised[0, 0] > logits[0, 0]
        assert torch.equal(raised[1], logits[1])
        first = feed(made("credit"), logits[1:], [40])
        assert torch.equal(feed(decoder, logits[1:], [40]), first)

    def test_the_mask_gains_none(self) -> None:
        logits = torch.tensor([[0.0, 1.0, 0.5, 9.0]])
        raised = feed(made("credit", credit_gamma=0.0), logits, [0])
        torch.testing.assert_close(raised - logits, torch.tensor([[0.0, 0.7 * math.log(2), 0.0, 0.0]]))

    @given(st.lists(st.integers(0, 11), min_size=1, max_size=20))
    def test_a_list_is_as_good_as_the_whole_vocabulary(self, winners: list[int]) -> None:
        decoder = made("credit", credit_alpha=1.0, credit_beta=0.75, credit_gamma=0.5)
        credit = torch.zeros(13)
        for token in winners:
            logits = torch.zeros(1, 13)
            logits[0, token] = 2.0
            logits[0, 12] = 1.0
            p = torch.softmax(logits, -1)[0, token]
            credit = 0.75 * credit
            credit[token] += p**0.5
            torch.testing.assert_close(feed(decoder, logits, [3])[0], logits[0] + (1 + credit).log())

    def test_a_new_tenant_has_no_credit(self) -> None:
        """In the released code credits survive into the next request."""
        decoder, logits = made("credit"), torch.tensor(self.LOGITS)
        first = feed(decoder, logits, [0])
        feed(decoder, logits, [0])
        decoder.stop(0)
        decoder.start(0, request("credit"))
        assert torch.equal(feed(decoder, logits, [0]), first)

    def test_the_threshold_rule(self) -> None:
        assert chosen(made("credit"), step_of("####", [0.9, 0.91, 0.89, 0.95], threshold=0.9)) == [0, 1, 3]
        assert chosen(made("credit"), step_of("####", [0.5, 0.7, 0.7 - 5e-6, 0.6], threshold=0.9)) == [1, 2]
        assert chosen(made("credit"), step_of("####", [0.5, 0.7, 0.1, 0.6], least=2, threshold=0.9)) == [1, 3]
        assert chosen(made("credit"), step_of("####", [0.99, 0.7, 0.1, 0.6], [1, 2], threshold=0.9)) == [1]


class TestHierarchical:
    """One of each run, what is sure, and the best."""

    def test_leaders_of_runs(self) -> None:
        step = step_of("##.###..#", [0.5, 0.6, 1, 0.45, 0.42, 0.41, 1, 1, 0.39], threshold=0.9)
        assert chosen(made("hierarchical"), step) == [1, 3]
        assert chosen(made("hierarchical", low_threshold=0.3), step) == [1, 3, 8]
        assert chosen(made("hierarchical", low_threshold=0.7), step) == [1], "the best in any case"

    def test_the_sure_ones_besides(self) -> None:
        step = step_of("#####", [0.95, 0.96, 0.2, 0.91, 0.9], threshold=0.9)
        assert chosen(made("hierarchical"), step) == [0, 1, 3]

    def test_both_limits_are_exclusive(self) -> None:
        step = step_of("##.##", [0.5, 0.1, 1, 0.75, 0.5], threshold=0.5)
        assert chosen(made("hierarchical", low_threshold=0.5), step) == [3]

    def test_ties_in_a_run_go_to_the_lower_slot(self) -> None:
        step = step_of("###.##", [0.5, 0.6, 0.6, 1, 0.5, 0.5], threshold=0.9)
        assert chosen(made("hierarchical"), step) == [1, 4]

    def test_runs_end_with_the_window(self) -> None:
        step = step_of("..######", [1, 1, 0.5, 0.6, 0.9, 0.9, 0.9, 0.9], threshold=0.95, window=4)
        assert chosen(made("hierarchical"), step) == [3]

    def test_masks_that_were_not_computed_hold_a_run_together(self) -> None:
        step = step_of("#####", [0.5, 0.9, 0.9, 0.9, 0.6], [0, 4], threshold=0.95)
        assert chosen(made("hierarchical"), step) == [4]


class TestLocalLeap:
    """A lower threshold around anchors."""

    def test_neighbours_within_the_radius(self) -> None:
        step = step_of("########", [0.8, 0.8, 0.7, 0.95, 0.74, 0.76, 0.9, 0.8], threshold=0.95)
        assert chosen(made("localleap", leap_radius=2), step) == [1, 3, 5]
        assert chosen(made("localleap", leap_radius=3), step) == [0, 1, 3, 5, 6]
        assert chosen(made("localleap", leap_radius=0), step) == [3]

    def test_both_limits_are_inclusive(self) -> None:
        step = step_of("##.", [0.5, 0.25, 1.0], threshold=0.5)
        assert chosen(made("localleap", leap_threshold=0.25), step) == [0, 1]

    def test_without_an_anchor_the_best_alone(self) -> None:
        step = step_of("####", [0.8, 0.85, 0.85, 0.8], threshold=0.9)
        assert chosen(made("localleap"), step) == [1]
        assert chosen(made("localleap"), step_of("####", [0.8] * 4, least=3, threshold=0.9)) == [0, 1, 2]

    def test_only_candidates_are_anchors_and_neighbours(self) -> None:
        step = step_of("####", [0.99, 0.8, 0.8, 0.1], [1, 3], threshold=0.9)
        assert chosen(made("localleap"), step) == [1]


class TestPool:
    """Ranges that never overlap, reused when free."""

    def test_first_fit(self) -> None:
        pool = CanvasPool(4, torch.device("cpu"))
        assert [pool.take(slot, n) for slot, n in [(0, 5), (1, 3), (2, 4)]] == [slice(0, 5), slice(5, 8), slice(8, 12)]
        pool.give_back(1)
        assert pool.take(3, 4) == slice(12, 16)
        assert pool.take(1, 2) == slice(5, 7)
        assert pool.take(0, 6) == slice(16, 22), "a request that starts over gives up its range"
        assert pool.num_lines == 22
        slots = torch.tensor([1, 2, 0])
        assert pool.lines(slots, torch.tensor([1, 0, 5])).tolist() == [6, 8, 21]

    def test_memory_grows_with_its_contents(self) -> None:
        pool = CanvasPool(2, torch.device("cpu"))
        pool.take(0, 2)
        memory = pool.fit(torch.zeros(0, 3)) + 1
        assert pool.fit(memory) is memory
        pool.take(1, 1)
        assert pool.fit(memory).tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]

    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=30))
    def test_ranges_do_not_overlap(self, moves: list[tuple[int, int]]) -> None:
        pool, held = CanvasPool(5, torch.device("cpu")), {}
        for slot, length in moves:
            if length:
                held[slot] = pool.take(slot, length)
                assert held[slot].stop - held[slot].start == length
            else:
                pool.give_back(slot)
                held.pop(slot, None)
            lines = [line for part in held.values() for line in range(part.start, part.stop)]
            assert len(lines) == len(set(lines))
            assert pool.num_lines == max(lines, default=-1) + 1


@pytest.mark.parametrize("name", DECODER_CLASSES)
def test_no_candidates_no_commits(name: str) -> None:
    assert chosen(made(name), step_of("####", [0.9] * 4, [], entropy=[0.1] * 4)) == []
