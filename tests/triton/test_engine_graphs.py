"""Graphs inside the engine, without a GPU: kernels in Triton's interpreter, graphs recorded by the emulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.e2e.conftest import Engine, runner_of
from tests.graph_emulator import Emulator
from tests.reference.blocks import BLOCK_ORACLE
from tests.reference.oracle import ORACLE
from vllm_d2cache.graphs.step_graphs import GraphSize, StepGraphs
from vllm_d2cache.ops.triton import pages, rotary

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.engine,
    pytest.mark.skipif("torch.cuda.is_available()", reason="an engine on a GPU records graphs itself"),
]

Requests = list[tuple[list[int], int, dict[str, Any]]]  # prompt, canvas, options
REQUESTS: Requests = [
    ([7, 300, 12] * 16, 6, {"current_k": 3, "rollout_p": 0.05}),
    (list(range(40, 110)), 4, {"current_k": 2, "tokens_per_step": 2}),
    ([5] * 9, 3, {"policy": "full"}),
]
# Texts in blocks of 4: two blocks are entered behind the first.
IN_BLOCKS: Requests = [
    ([7, 300, 12] * 5, 7, {"threshold": 0}),
    (list(range(40, 58)), 6, {"policy": "d2cache", "current_k": 1, "threshold": 0.5}),
    ([5] * 9, 5, {"decoder": "edit"}),
]


class EmulatedRecorder(Emulator):
    """Stands in for cuda_graphs.CudaRecorder."""

    def capture(self, graphs: StepGraphs) -> None:
        graphs.capture()


def generate(engine: Engine, requests: Requests) -> list[list[int]]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            max_tokens=canvas,
            detokenize=False,
            extra_args={f"d2cache_{name}": value for name, value in options.items()},
        )
        for _, canvas, options in requests
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
    return [list(o.outputs[0].token_ids) for o in engine.llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("model", "requests", "parts"),
    [
        (ORACLE / "llada", REQUESTS, {}),
        (BLOCK_ORACLE / "sdar", IN_BLOCKS, {}),
        (ORACLE / "llada", REQUESTS, {"part_rows": 24}),
    ],
    ids=["llada", "sdar", "llada in parts"],
)
def test_an_engine_with_graphs_gives_the_tokens_of_one_without(
    model: Path, requests: Requests, parts: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.attention import Attention

    from vllm_d2cache.engine import cuda_graphs, model_state
    from vllm_d2cache.ops import dispatch

    options = {"d2cache": {"graph_rows": 32, **parts}}
    size = {"max_num_seqs": 2, "max_model_len": 128, "num_gpu_blocks_override": 12, "block_size": 32}
    engine = Engine(tmp_path, model=str(model), **size, additional_config=options)
    try:
        want = generate(engine, requests)
        state, emulator = runner_of(engine).model_state, EmulatedRecorder()
        assert state.steps.forms.graphs is None, "there are none on a CPU"
        monkeypatch.setitem(dispatch._chosen, "cpu", "triton")
        monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda device: emulator)
        monkeypatch.setattr(state, "_records_graphs", True)
        monkeypatch.setattr(state, "_is_ready", False)
        # Minutes in the interpreter; tests/triton/test_warm_up.py runs it in an engine.
        warmed = Mock(return_value=0)
        monkeypatch.setattr(model_state, "warm_up", warmed)
        for layer in runner_of(engine).model.modules():
            if isinstance(layer, Attention):
                # Seen through: behind vLLM's operator the recording would find nothing but the operator.
                monkeypatch.setattr(layer, "use_direct_call", True)
        replays: list[GraphSize] = []
        stock = StepGraphs.run

        def run(graphs: StepGraphs, size: GraphSize) -> torch.Tensor:
            replays.append(size)
            return stock(graphs, size)

        monkeypatch.setattr(StepGraphs, "run", run)
        rotated = Mock(wraps=rotary.rotate_and_write)
        monkeypatch.setattr(rotary, "rotate_and_write", rotated)
        monkeypatch.setattr(pages, "write_kv", Mock(side_effect=AssertionError("pages are written with the rotation")))
        assert generate(engine, requests) == want
        assert rotated.call_count > 0
        assert emulator.graphs == 2
        warmed.assert_called_once()
        assert replays[:2] == state.steps.forms.graphs.sizes, "the check at start-up"
        # Of llada steps of the first two requests at least; the third refreshes everything and fits as well.
        assert len(replays) >= 2 + 4
        if model.name == "sdar":
            assert len(replays) >= 2 + 5, "all but steps with a prompt"
    finally:
        engine.close()
