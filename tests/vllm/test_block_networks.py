"""The networks of the block-diffusion families in vLLM's layers, against the published logits and traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.blocks import BLOCK_ORACLE, load_trace, trace_names
from tests.unit.models.test_block_oracle import MODELS, difference
from tests.vllm.conftest import Loaded
from tests.vllm.networks import PagedNetwork
from vllm_d2cache.models.block_configs import FastDLLMv2Config, LLaDA2Config, SDARConfig, SDARMoeConfig
from vllm_d2cache.models.shape import Mixture, TransformerShape

pytestmark = pytest.mark.vllm

Load = Callable[..., Loaded]
CONFIGS = {"llada2": LLaDA2Config, "sdar": SDARConfig, "sdar_moe": SDARMoeConfig, "fast_dllm_v2": FastDLLMv2Config}


def network(family: str, load: Load) -> PagedNetwork:
    return PagedNetwork(load(BLOCK_ORACLE / family, dtype="float32"))


def golden(family: str, net: PagedNetwork) -> float:
    """The largest difference to the published logits."""
    want = np.load(BLOCK_ORACLE / "golden" / f"{family}.npz")
    length, ids = int(want["block_length"]), want["prefill_ids"].tolist()
    net.reset(len(ids))
    gaps = [net.store(ids, 0, length) - torch.from_numpy(want["prefill_logits"])]
    ids = want["denoise_ids"].tolist()
    start = len(ids) - length
    net.reset(len(ids))
    net.store(ids[:start], 0, length)
    gaps.append(net.rows(ids[start:], start, len(ids)) - torch.from_numpy(want["denoise_logits"]))
    return max(float(gap.abs().max()) for gap in gaps)


@pytest.mark.parametrize("family", MODELS)
def test_logits_and_traces(family: str, load: Load) -> None:
    net = network(family, load)
    assert golden(family, net) < 1e-4
    traces = [trace for trace in map(load_trace, trace_names()) if trace["checkpoint"] == family]
    assert len(traces) >= 6
    for trace in traces:
        assert difference(trace, network=net) is None, trace["case"]


def mixture(**changes: Any) -> Callable[[TransformerShape], TransformerShape]:
    def changed(shape: TransformerShape) -> TransformerShape:
        assert isinstance(shape.mixture, Mixture)
        return replace(shape, mixture=replace(shape.mixture, **changes))

    return changed


def shape(**changes: Any) -> Callable[[TransformerShape], TransformerShape]:
    return lambda of: replace(of, **changes)


OTHER_NETWORKS: dict[str, tuple[str, Callable[[TransformerShape], TransformerShape]]] = {
    "rotary over the whole head": ("llada2", shape(rotary_dim=None)),
    "groups ignored": ("llada2", mixture(groups=1, groups_kept=1)),
    "softmax router": ("llada2", mixture(scoring="softmax")),
    "no scaling": ("llada2", mixture(scale=1.0)),
    "other theta": ("llada2", shape(rope_theta=1e4)),
    "fewer experts": ("llada2", mixture(per_token=3)),
    "not renormalised": ("sdar_moe", mixture(renormalised=False)),
    "another epsilon": ("sdar", shape(norm_eps=1e-2)),
    "expert bias ignored": ("llada2", mixture(bias=False)),
    "no shared expert": ("llada2", mixture(shared_width=0)),
    "mixture in the first layer": ("llada2", shape(dense_layers=0)),
    "no q/k norm": ("sdar", shape(qk_norm=False)),
    "heads of hidden / heads": ("sdar", shape(head_dim=None)),
    "no q/k/v bias": ("fast_dllm_v2", shape(qkv_bias=False)),
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_another_network_is_noticed(name: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loader, as tensors are not those of the list, or by the logits."""
    family, change = OTHER_NETWORKS[name]
    cls = CONFIGS[family]
    original = cls.shape
    monkeypatch.setattr(cls, "shape", lambda self: change(original(self)))
    monkeypatch.setattr(cls, "unsupported", lambda self: [])
    try:
        net = network(family, load)
    except ValueError as error:
        assert "the checkpoint" in str(error)
        return
    assert golden(family, net) > 1e-2
