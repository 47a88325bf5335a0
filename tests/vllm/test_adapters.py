"""Adapters: vLLM finds our modules by the checkpoint's names, and rows without one are left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models import supports_lora

from tests.reference.oracle import ORACLE
from tests.vllm.front_end_server import TINY, front_end
from vllm_d2cache.compat.adapters import leave_base_rows_alone, set_row_adapters
from vllm_d2cache.compat.internals import OLDEST

pytestmark = pytest.mark.vllm

# The checkpoint's name of a module -> ours, and where it is one of several that are joined here, which.
MODULES = {
    "llada": {
        "model.transformer.blocks.3.q_proj": ("layers.3.self_attn.qkv_proj", "q_proj"),
        "model.transformer.blocks.3.k_proj": ("layers.3.self_attn.qkv_proj", "k_proj"),
        "model.transformer.blocks.3.v_proj": ("layers.3.self_attn.qkv_proj", "v_proj"),
        "model.transformer.blocks.3.attn_out": ("layers.3.self_attn.o_proj", None),
        "model.transformer.blocks.3.ff_proj": ("layers.3.mlp.gate_up_proj", "ff_proj"),
        "model.transformer.blocks.3.up_proj": ("layers.3.mlp.gate_up_proj", "up_proj"),
        "model.transformer.blocks.3.ff_out": ("layers.3.mlp.down_proj", None),
    },
    "dream": {
        "model.layers.2.self_attn.q_proj": ("layers.2.self_attn.qkv_proj", "q_proj"),
        "model.layers.2.self_attn.v_proj": ("layers.2.self_attn.qkv_proj", "v_proj"),
        "model.layers.2.self_attn.o_proj": ("layers.2.self_attn.o_proj", None),
        "model.layers.2.mlp.gate_proj": ("layers.2.mlp.gate_up_proj", "gate_proj"),
        "model.layers.2.mlp.up_proj": ("layers.2.mlp.gate_up_proj", "up_proj"),
        "model.layers.2.mlp.down_proj": ("layers.2.mlp.down_proj", None),
    },
}


@pytest.mark.parametrize("family", MODULES)
def test_every_module_of_an_adapter_is_found(family: str, load: Any) -> None:
    model = load(ORACLE / family).model
    assert supports_lora(model)
    mapper = model.hf_to_vllm_mapper.get_rename_mapper()
    ours = dict(model.named_modules())
    for theirs, (module, part) in MODULES[family].items():
        for letter in "AB":
            name, is_a = parse_fine_tuned_lora_name(f"base_model.model.{theirs}.lora_{letter}.weight", mapper)
            assert is_a == (letter == "A")
            parent, _, last = module.rpartition(".")
            assert name == (module if part is None else f"{parent}.{part}")
        assert module in ours
        assert part is None or part in model.packed_modules_mapping[last]


PLACES = [7, 3]  # the adapters in vLLM's two places


def layers() -> tuple[Any, PunicaWrapperCPU]:
    """A model with adapters, as far as we look at it, and what applies them."""
    wrapper = PunicaWrapperCPU(16, 4, "cpu")
    manager = SimpleNamespace(
        punica_wrapper_mapping={"language_model": wrapper},
        set_adapter_mapping=lambda mapping: wrapper.update_metadata(mapping, PLACES, 3, 100),
    )
    return SimpleNamespace(lora_manager=manager), wrapper


def added(wrapper: PunicaWrapperCPU, rows: int) -> torch.Tensor:
    """[rows, 5] what adapters of ones, and of twos in the second place, add to a layer's output."""
    low = torch.stack([torch.ones(1, 2, 4), torch.full((1, 2, 4), 2.0)])
    high = torch.stack([torch.ones(1, 5, 2), torch.full((1, 5, 2), 2.0)])
    out, between = torch.zeros(rows, 5), torch.zeros(1, rows, 2)
    wrapper.add_shrink(between, torch.ones(rows, 4), (low,), 1.0)
    wrapper.add_expand(out, between, (high,), (5,), add_inputs=True)
    return out


def test_rows_without_an_adapter_are_left_alone() -> None:
    model, wrapper = layers()
    leave_base_rows_alone(model)
    leave_base_rows_alone(model)
    set_row_adapters(model, [0, 7, 3, 0], [0, 0, 7, 3, 3, 0])
    assert added(wrapper, 6)[:, 0].tolist() == [0, 0, 8, 32, 32, 0]
    set_row_adapters(model, [0, 0], [0, 0, 0])
    assert added(wrapper, 3).count_nonzero() == 0
    set_row_adapters(model, [7], [7])
    assert added(wrapper, 1)[0].tolist() == [8] * 5


def test_vllm_still_needs_the_patch() -> None:
    """Its layers for CPUs leave such rows alone themselves since 0.33; fails when the patch can go."""
    since = Version("0.33")
    _, wrapper = layers()
    wrapper.update_metadata(LoRAMapping((0, 7), (0, 7), is_prefill=True), PLACES, 3, 100)
    assert added(wrapper, 2)[:, 0].tolist() == [0 if Version(vllm.__version__) >= since else 32, 8]
    assert since > OLDEST, "drop compat/adapters.py: leave_base_rows_alone"


def test_a_server_hands_the_adapter_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with front_end(monkeypatch, TINY, "--enable-lora", "--lora-modules", "mine=/an/adapter") as server:
        base = {"prompt": "a", "max_tokens": 8}
        for stream in (False, True):
            assert server.post("/v1/completions", {**base, "model": "mine", "stream": stream}).status_code == 200
            assert server.core.requests[-1].lora_request.lora_name == "mine"
            assert server.post("/v1/completions", {**base, "stream": stream}).status_code == 200
            assert server.core.requests[-1].lora_request is None
            for model in ("mine", TINY):
                body = {**base, "model": model, "stream": stream, "vllm_xargs": {"d2cache_policy": "dllm_cache"}}
                refused = server.post("/v1/completions", body)
                assert refused.status_code == 400
                assert "d2cache_policy: 'dllm_cache' leaves rows out" in refused.json()["error"]["message"]
