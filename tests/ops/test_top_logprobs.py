"""Log-probabilities of chosen tokens and alternatives against float64 and a plain sort."""

from __future__ import annotations

import pytest
import torch

from vllm_d2cache.ops.row_stats import ROWS_PER_TILE
from vllm_d2cache.ops.top_logprobs import top_logprobs


@pytest.mark.parametrize("n", [0, 1, 7, ROWS_PER_TILE, 2 * ROWS_PER_TILE + 3])
@pytest.mark.parametrize("k", [0, 1, 5, 31])
def test_matches_float64(n: int, k: int, poison_empty: None) -> None:
    logits = 6 * torch.randn(n, 31)
    token = torch.randint(31, (n,))
    ids, logprobs, rank = top_logprobs(logits, torch.clone, token, k)
    want = logits.double().log_softmax(-1)
    order = [sorted(range(31), key=lambda t, r=r: (-float(logits[r, t]), t))[:k] for r in range(n)]
    assert ids.tolist() == [[int(token[r]), *order[r]] for r in range(n)]
    torch.testing.assert_close(logprobs.double(), want.gather(1, ids), rtol=0, atol=1e-5)
    assert rank.tolist() == [int((logits[r] >= logits[r, token[r]]).sum()) for r in range(n)]


def test_equal_logits_go_by_token_id_for_every_k() -> None:
    """bfloat16 heads give many equal logits; what a batch mate asks for must not show in their order."""
    logits = torch.randint(-2, 3, (9, 40)).float()
    logits[0, ::3] = -0.0
    token = torch.zeros(9, dtype=torch.int64)
    widest = top_logprobs(logits, torch.clone, token, 40)[0]
    for k in (1, 2, 3, 10, 20):
        assert torch.equal(top_logprobs(logits, torch.clone, token, k)[0], widest[:, : k + 1])
    assert widest[0, 1:].tolist() == sorted(range(40), key=lambda t: (-float(logits[0, t]), t))


def test_every_magnitude_is_ordered() -> None:
    values = torch.tensor([[-torch.inf, -1e30, -3.0, -1e-30, 0.0, 1e-30, 3.0, 1e30]])
    ids = top_logprobs(values, torch.clone, torch.tensor([4]), 8)[0]
    assert ids[0].tolist() == [4, 7, 6, 5, 4, 3, 2, 1, 0]


def test_head_sees_no_more_rows_than_a_tile() -> None:
    seen: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return hidden.clone()

    top_logprobs(torch.randn(150, 20), head, torch.zeros(150, dtype=torch.int64), 2)
    assert sum(seen) == 150
    assert max(seen) <= ROWS_PER_TILE
