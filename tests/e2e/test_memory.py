"""vLLM's profile run, with the memory plan in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.conftest import Engine, runner_of
from vllm_d2cache.engine.memory_plan import Rehearsal

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


class Noted(Rehearsal):
    """On the meta device, which has room for everything; notes when it is called."""

    def __init__(self, plan: Any) -> None:
        super().__init__(plan, torch.device("meta"))
        self.calls: list[str] = []

    def forward(self) -> None:
        super().forward()
        self.calls.append("forward")

    def sample(self) -> None:
        self.calls.append("sample with" if self._held is not None else "sample without")
        super().sample()


def test_the_plan_is_held_while_vllm_measures(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(engine)
    state = runner.model_state
    plan = state.rehearsal.plan
    rehearsal = Noted(plan)
    monkeypatch.setattr(state, "rehearsal", rehearsal)
    stock = runner.model.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        held = 0 if rehearsal._held is None else rehearsal._held.nbytes
        rehearsal.calls.append(f"network, {held}")
        return stock(*args, **kwargs)

    monkeypatch.setattr(runner.model, "forward", forward)
    runner.profile_run()
    assert rehearsal.calls == ["network, 0", "sample without"], "there is a KV cache: nothing is measured"
    rehearsal.calls.clear()
    for layer in runner.model.layers:
        monkeypatch.setattr(layer.self_attn.attn, "kv_cache", torch.tensor([]))
    runner.profile_run()
    assert rehearsal.calls == ["forward", f"network, {plan.in_forward}", "sample with"]
    assert rehearsal._held is None
