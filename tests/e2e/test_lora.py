"""LoRA adapters by vLLM's own layers, whose rows change from step to step; closes its engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import Engine
from tests.reference.oracle import ORACLE
from tests.reference.published import denoise
from tests.unit.test_oracle import dense_model
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import resolve

pytestmark = [pytest.mark.vllm, pytest.mark.engine]

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
COMMON = dict(zip(MODULES, ("q", "k", "v", "o", "gate", "up", "down"), strict=True))
RANK, ALPHA = 4, 8


def write_adapter(directory: Path, seed: int) -> Path:
    """A random adapter of the traces' Dream, as PEFT writes one; large enough to change its tokens."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    plain, tensors = load_file(ORACLE / "dream" / "model.safetensors"), {}
    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        if any(module.endswith(end) for end in MODULES) and weight.ndim == 2:
            rows, columns = weight.shape
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.2
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.05
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "bias": "none",
              "r": RANK, "lora_alpha": ALPHA, "target_modules": [m.rpartition(".")[2] for m in MODULES]}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merged(adapter: Path | None) -> Any:
    """The network in plain PyTorch, with the adapter added to its weights."""
    model = dense_model("dream")
    if adapter is None:
        return model
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        _, _, _, _, number, module = name.removesuffix(".lora_A.weight").split(".", 5)
        low, high = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        model.w[f"{number}.{COMMON[module]}"] = model.w[f"{number}.{COMMON[module]}"] + high @ low * (ALPHA / RANK)
    return model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [write_adapter(directory / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def lora_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    settings: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_model_len": 256}
    made = Engine(tmp_path_factory.mktemp("lora"), model=str(ORACLE / "dream"), **settings)
    yield made
    made.close()


Job = tuple[list[int], int, dict[str, Any], Path | None]  # prompt, canvas, options, adapter


def run(lora_engine: Engine, jobs: list[Job]) -> list[list[int]]:
    """Tokens of jobs that are submitted at once."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = lora_engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _, _, _ in jobs],
        [
            SamplingParams(
                temperature=0.0,
                max_tokens=canvas,
                ignore_eos=True,
                detokenize=False,
                extra_args={f"d2cache_{k}": v for k, v in options.items()},
            )
            for _, canvas, options, _ in jobs
        ],
        lora_request=[
            None if path is None else LoRARequest(path.name, int(path.name) + 1, str(path)) for *_, path in jobs
        ],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("options", [{"policy": "full"}, {"policy": "full", "window": 8, "threshold": 0.05}], ids=str)
def test_an_adapter_is_what_it_adds_to_the_weights(
    lora_engine: Engine, adapters: list[Path], options: dict[str, Any]
) -> None:
    prompt = list(range(20))
    found = []
    for adapter in (None, *adapters):
        (tokens,) = run(lora_engine, [(prompt, 16, options, adapter)])
        _, want = denoise(merged(adapter), prompt, 16, resolve(ServerOptions({}), options))
        assert tokens == want, adapter
        found.append(tokens)
    assert len({tuple(tokens) for tokens in found}) == 3, "adapters that change nothing would prove nothing"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"current_k": 4, "rollout_p": 0.05},
    {"window": 8, "threshold": 0.1},
    {"policy": "dual", "window": 8},
    {"policy": "sparse_dllm", "window": 8, "keep_ratio": 0.5},
    {"policy": "full", "decoder": "wino", "window": 8},
]


def test_base_and_adapters_in_one_batch_give_what_each_gives_alone(lora_engine: Engine, adapters: list[Path]) -> None:
    """Refresh sets change between steps, and rows of a decoder's own stand behind them."""
    prompts = [[(7 * i + j) % 300 for j in range(11 + 9 * i)] for i in range(6)]
    jobs: list[Job] = [(prompt, 16 + i, OPTIONS[i], (None, *adapters)[i % 3]) for i, prompt in enumerate(prompts)]
    jobs += [(prompts[0], 16, {}, adapter) for adapter in adapters]  # like the first, but for the adapter
    together = run(lora_engine, jobs)
    assert len({tuple(together[i]) for i in (0, 6, 7)}) == 3
    for job, tokens in zip(jobs, together, strict=True):
        assert run(lora_engine, [job]) == [tokens], job


@pytest.mark.parametrize("policy", ["dllm_cache", "spa", "es"])
def test_policies_whose_layers_leave_rows_out_are_refused(lora_engine: Engine, policy: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"d2cache_policy: '{policy}' leaves rows out of layers, which ad"):
        run(lora_engine, [(list(range(9)), 16, {"policy": policy}, None)])
