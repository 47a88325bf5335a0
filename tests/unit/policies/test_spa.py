"""spa: rows and budgets by hand from.

docs/methods/other-caches.md, section 4; what layers compare; the specification in loops.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from tests.reference.dense import DenseModel
from tests.reference.dream import DenseDream
from tests.reference.llada import DenseLlada
from tests.reference.loop import Job, run_jobs
from tests.reference.oracle import ORACLE
from tests.unit.replay import one_by_one, replay
from tests.unit.views import view_of
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.mechanisms.partial_forward import PartialForward
from vllm_d2cache.mechanisms.row_store import RowStore
from vllm_d2cache.mechanisms.stored_outputs import OutputHook
from vllm_d2cache.mechanisms.value_directions import MOST_DIRECTIONS, ValueDirections, leading
from vllm_d2cache.models.configs import DreamConfig, LLaDAConfig
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.rollout import TensorParallel
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies.spa import SPAPolicy
from vllm_d2cache.requests.resolve import resolve

P, G = 3, 8
ALL, CANVAS = list(range(11)), list(range(3, 11))


def run(shift: int = 0, **options: Any) -> list[Any]:
    moves = one_by_one(1, 0, 3, 2, 7, 4, 6, 5)
    settings = {"policy": "spa", "refresh_steps": 6, "refresh_gen_steps": 4, "window": 4, **options}
    return replay(settings, P, G, moves, shift)


def test_everything_and_canvas_are_refreshed_by_their_periods() -> None:
    got = run(update_ratio_dist="uniform")
    assert [s.refreshed for s in got] == [ALL, *[CANVAS] * 5, ALL, CANVAS]
    # Rows of the second of three layers: all, a quarter of eight, the canvas in step 4.
    assert [s.stored.computed[0][0] for s in got] == [11, 2, 2, 2, 8, 2, 11, 2]
    assert [len(s.stored.compared) for s in got] == [0, 8, 8, 8, 0, 8, 0, 8]


def test_warm_up_recomputes_everything_once_more_than_its_steps() -> None:
    assert [s.refreshed for s in run(n_warmup_steps=2)] == [ALL, ALL, ALL, *[CANVAS] * 3, ALL, CANVAS]


def test_a_shifted_family_carries_the_row_its_first_slot_is_read_from() -> None:
    got = run(shift=1)
    assert got[1].refreshed == ALL[2:]
    assert got[1].stored.stored.tolist() == [True] * 9
    assert got[1].stored.compared.tolist() == list(range(1, 9))
    assert got[1].stored.proxied[0].tolist() == list(range(8)), "all compared rows"
    assert got[1].stored.proxied[1].tolist() == [128] * 8


def counts(traits: FamilyTraits, canvas: int, **options: Any) -> list[int]:
    """Rows that each layer behind the first computes of a canvas."""
    policy = SPAPolicy(Worker(1, 2 * canvas, torch.device("cpu"), traits))
    policy.start(0, resolve(ServerOptions({}), {"policy": "spa", **options}))
    plan = policy.first_plan(view_of(["#" * canvas], [1]))
    (stored,) = plan.wishes
    return stored.count.tolist()[0]


def test_budgets_of_llada() -> None:
    """Mean and peak are.

    docs/methods/other-caches.md's; the others are worked out from the published edges: 3 and 13 of 25 hundredths.
    """
    got = counts(LLaDAConfig(n_layers=32, mask_token_id=0).traits(), 10_000)
    assert len(got) == 31
    assert got[24 - 1] == 2500
    # Layer 12 is half way to the peak: a fourth root of 0.12. Layer 28 is half way behind it, of 0.52.
    assert got[12 - 1] == int(2500 * 0.12**0.25)
    assert got[28 - 1] == int(2500 * 0.52**0.25)
    assert got[1 - 1] == int(2500 * math.exp(math.log(0.12) * (23 / 24) ** 2))
    assert all(a < b for a, b in pairwise(got[:24]))
    assert all(a > b for a, b in pairwise(got[23:]))
    assert (sum(got) + 312.5) / 32 == pytest.approx(1590, abs=5)


def test_budgets_before_the_peak_have_a_floor() -> None:
    """A thirty-second of the canvas, whatever the peak; behind the peak there is none."""
    got = counts(LLaDAConfig(n_layers=32, mask_token_id=0).traits(), 640, max_update_ratio=0.05)
    assert got[0] == got[10] == 20
    assert got[24 - 1] == 32
    assert got[31 - 1] == int(640 * 0.05 * 0.52 ** ((7 / 8) ** 2))
    assert got[31 - 1] < 20


def test_budgets_of_dream() -> None:
    got = counts(DreamConfig(num_hidden_layers=28, num_key_value_heads=4).traits(), 1000, max_update_ratio=0.3)
    assert got[14 - 1] == 300
    assert got[7 - 1] == int(300 * (1 / 6) ** 0.25)
    assert got[21 - 1] == int(300 * (5 / 6) ** 0.25)


def test_a_uniform_budget_may_be_everything() -> None:
    traits = LLaDAConfig(n_layers=5, mask_token_id=0).traits()
    assert counts(traits, 30, update_ratio_dist="uniform", max_update_ratio=1) == [30] * 4
    assert counts(traits, 30, update_ratio_dist="uniform", max_update_ratio=0.01) == [0] * 4


# ---- directions


class Projection:
    """A value projection of 3 heads of 4, for rows of width 20."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.asked = 0

    def value_projection(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += 1
        return self.weight, self.bias


WEIGHT, BIAS = torch.randn(12, 20, generator=torch.Generator().manual_seed(3)), torch.arange(12.0)
ROWS = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(4))


def cosine_of_proxies(rank: int) -> torch.Tensor:
    """By the definition: the singular values and right vectors, applied to rows."""
    _, scale, right = torch.linalg.svd(WEIGHT.double(), full_matrices=False)
    proxies = ROWS.double() @ (scale[:rank, None] * right[:rank]).T
    return torch.cosine_similarity(proxies[0], proxies[1], dim=-1).float()


@pytest.mark.parametrize("rank", [1, 3, 12, 256])
def test_components_of_values_compare_like_proxies(rank: int) -> None:
    layer, directions = Projection(WEIGHT, BIAS), ValueDirections()
    values = (ROWS @ WEIGHT.T + BIAS).view(2, 6, 3, 4)
    for _ in range(2):
        got = leading(directions.components(5, layer, values), torch.full((6,), rank))
    torch.testing.assert_close(torch.cosine_similarity(got[0], got[1], dim=-1), cosine_of_proxies(rank))
    assert layer.asked == 1, "found once"
    assert got.shape[2] <= min(20, MOST_DIRECTIONS)


def test_each_row_has_its_own_rank() -> None:
    components = torch.ones(2, 3, 4)
    got = leading(components, torch.tensor([1, 4, 2]))
    assert got[0].tolist() == got[1].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("heads", [(slice(0, 4), slice(4, 12)), (slice(0, 12), slice(0, 12))])
def test_ranks_add_up_their_heads(heads: tuple[slice, slice]) -> None:
    """Heads that are spread over ranks, and heads that each rank has all of."""
    total_gram = sum(WEIGHT[part].T @ WEIGHT[part] for part in heads)
    parts = []
    for part in heads:
        directions = ValueDirections(TensorParallel(2, lambda own: total_gram))
        values = (ROWS @ WEIGHT[part].T + BIAS[part]).view(2, 6, -1, 4)
        parts.append(directions.components(0, Projection(WEIGHT[part], BIAS[part]), values))
    got = leading(sum(parts), torch.full((6,), 3))
    want = cosine_of_proxies(3)
    torch.testing.assert_close(torch.cosine_similarity(got[0], got[1], dim=-1), want, atol=1e-4, rtol=1e-4)


# ---- layers


class ToyLayer(nn.Module):
    """Values are the stream times 2, keys are positions. The first element is the leading direction."""

    weight = torch.diag(torch.tensor([9.0, 2.0, 1.0, 1.0]))

    def __init__(self) -> None:
        super().__init__()
        self.pages = torch.zeros(1, 1, 16, 8)
        self.pages[0, 0, :5, 4:] = torch.eye(5)[:, :4] + 1  # old values
        self.seen: list[list[int]] = []

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        self.seen.append(positions.tolist())
        stream = hidden if residual is None else hidden + residual
        return torch.zeros_like(stream), stream

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return (hidden + residual).unsqueeze(1)

    def keys_and_values(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        return positions.float().view(-1, 1, 1).expand(-1, 1, 4), self.values(hidden, residual)

    def value_projection(self, dtype: torch.dtype) -> Any:
        return self.weight, torch.zeros(4)


def test_rows_are_compared_along_leading_directions_and_keys_are_renewed() -> None:
    """Two requests: three rows of spa, two of dllm_cache. Each computes the row that changed most, in its own sense."""
    new = torch.tensor(
        [
            [3.0, 1.0, 1.0, -9.0],  # far from 2 1 1 1, but its first two numbers are not
            [-1.0, 2.0, 1.0, 1.0],  # the other way round in the first number
            [1.0, 1.0, 2.0, 1.0],
            [1.0, 1.0, 1.0, -9.0],  # far from 1 1 1 2
            [-1.0, 1.0, 1.0, 1.0],
        ]
    )
    hook = OutputHook(
        torch.ones(5, dtype=torch.bool),
        torch.arange(5),
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([[1], [1]]),
        [[1, 1]],
        (torch.arange(3), torch.tensor([2, 2, 2])),
        {},
        {},
        [0, 1],
        RowStore(),
        ValueDirections(),
    )
    layout = PagedLayout([3, 2], [3, 2], torch.zeros(2, 1, dtype=torch.int32), [0, 0], torch.arange(5))
    layers = [ToyLayer(), ToyLayer()]
    PartialForward([hook], layout, lambda _: None).run(layers, torch.arange(20, 25), new)
    assert layers[1].seen == [[21, 23]]
    keys, values = layers[1].pages[0, 0, :5].split(4, dim=1)
    assert keys[:, 0].tolist() == [20.0, 21.0, 22.0, 0.0, 0.0], "of spa's rows alone"
    assert values.tolist() == new.tolist()


# ---- against the specification in loops, on a network


@pytest.mark.parametrize("model", [DenseLlada, DenseDream])
@pytest.mark.parametrize(
    "options",
    [
        {"refresh_steps": 7, "refresh_gen_steps": 3, "max_update_ratio": 0.5, "proxy_rank": 4},
        {"refresh_steps": 100, "refresh_gen_steps": 100, "update_ratio_dist": "uniform", "proxy_rank": 256},
    ],
)
def test_the_reference_denoises_under_this_policys_plans(model: type[DenseModel], options: dict[str, Any]) -> None:
    """Its layers compute as many rows as the plans say."""
    job = Job([5, 9, 33, 2], 24, {"policy": "spa", "window": 12, **options})
    run_jobs([model(ORACLE / model.__name__.removeprefix("Dense").lower())], [job])
    assert len(job.output) == 24
    assert job.layers is not None
    share = options.get("max_update_ratio", 0.25)
    normal = [step for step in job.layers.refreshed if len(step[1]) < 24]
    assert normal
    # Four layers; LLaDA's peak is at the last of them, Dream's at the one before.
    assert {len(step[3 if model is DenseLlada else 2]) for step in normal} == {int(24 * share)}
