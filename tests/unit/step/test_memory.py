"""A step's memory grows with rows times text length, never with its square nor with rows times vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.shapes import Shapes
from tests.unit.batches import without_layers
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.ops import row_stats
from vllm_d2cache.ops.row_stats import ROWS_PER_TILE
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.sampling import SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.runner import StepRunner

PROMPT, CANVAS, VOCAB, WIDTH = 150, 170, 577, 4
TOTAL = PROMPT + CANVAS


def run_steps(shapes: Shapes, options: RequestOptions, sampling: SamplingSpec, steps: int) -> None:
    runner = StepRunner(Worker(2, TOTAL, torch.device("cpu"), FamilyTraits(0)))
    head = torch.randn(WIDTH, VOCAB)
    request = Request("r", PROMPT, CANVAS, options, sampling)
    with shapes:
        runner.add(1, request, torch.ones(PROMPT, dtype=torch.int64).numpy())
        for _ in range(steps):
            step = runner.open(torch.tensor([1]), [1])
            hidden = torch.randn(step.rows.positions.shape[0], WIDTH)[step.rows.logits_rows]
            step.hooks = without_layers(step, [torch.rand(TOTAL)])
            runner.close(step, hidden, lambda x: x @ head)


CASES: list[dict[str, Any]] = [{}, {"policy": "full"}, {"score": "entropy", "inflate_w": 4, "window": 32}]
CASES += [
    {"decoder": "eb", "gamma": 1.0},
    {"decoder": "klass", "threshold": 0.9},
    {"decoder": "credit", "threshold": 0.9},
    {"decoder": "wino", "policy": "full", "wide_in_thres": 0.0},
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", CASES)
def test_no_square_and_no_vocabulary_of_all_rows(
    options: dict[str, Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_stats, "TILE_LOGITS", 0)  # as of a large vocabulary
    shapes = Shapes()
    run_steps(shapes, resolve(ServerOptions({}), options), SamplingSpec(temperature, 0.9, 5), 3)
    assert shapes.seen
    # The density's windows [slots, reach of the prior] stay below: they grow with the canvas alone.
    squares = {s: f for s, f in shapes.squares(TOTAL).items() if VOCAB not in s}
    assert squares == {}
    logits = [s for s in shapes.seen if VOCAB in s and len(s) > 1 and s != (WIDTH, VOCAB)]
    assert logits
    assert max(s[0] for s in logits) <= ROWS_PER_TILE
