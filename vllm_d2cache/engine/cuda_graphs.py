"""Records graphs/step_graphs.py's steps as CUDA graphs.

vLLM's own graph manager chooses a graph by numbers of requests and tokens before any hook of a step; it cannot tell a
first step, or a policy that needs exact rows, from a refresh step of as many tokens. So the graphs stand inside the
model's forward pass, which vLLM calls as it would an eager one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from vllm_d2cache.engine.attention_backend import D2CacheMetadata
from vllm_d2cache.graphs.graph_check import CacheSize, check_graphs
from vllm_d2cache.graphs.ridge import ridge
from vllm_d2cache.graphs.step_graphs import Forward, StepBuffers, StepGraphs, graph_length, graph_sizes
from vllm_d2cache.mechanisms.importance import ImportanceCapture
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.rollout import TensorParallel
from vllm_d2cache.step.step import Step

logger = init_logger(f"vllm.{__name__}")


def cache_of(model: torch.nn.Module) -> torch.Tensor:
    """[blocks, kv heads, block size, 2 * head size] of the first layer."""
    return next(m.kv_cache for m in model.modules() if isinstance(m, Attention))


def eager_forward(model: torch.nn.Module, config: VllmConfig) -> Forward:
    """The network on any rows of any layout, outside vLLM's runner."""
    layers = [m.layer_name for m in model.modules() if isinstance(m, Attention)]

    def forward(
        input_ids: torch.Tensor, positions: torch.Tensor, layout: PagedLayout, capture: ImportanceCapture
    ) -> torch.Tensor:
        metadata = dict.fromkeys(layers, D2CacheMetadata(layout, (capture,)))
        with set_forward_context(metadata, config, num_tokens=positions.shape[0]):
            return model(input_ids=input_ids, positions=positions)

    return forward


def eager_step(model: torch.nn.Module, config: VllmConfig) -> Callable[[Step], torch.Tensor]:
    """The network on a step that has been placed, outside vLLM's runner: what model_state.py has the runner do."""
    layers = [m.layer_name for m in model.modules() if isinstance(m, Attention)]
    of_step: Any = model.step

    def forward(step: Step) -> torch.Tensor:
        assert step.layout is not None
        metadata = D2CacheMetadata(step.layout, step.hooks)
        of_step.partial_forward = metadata.partial_forward()
        positions, ids = step.packed()
        with set_forward_context(dict.fromkeys(layers, metadata), config, num_tokens=positions.shape[0]):
            hidden = model(input_ids=ids, positions=positions)
        of_step.clear()
        return hidden

    return forward


def free_rows(config: VllmConfig) -> int:
    """Most rows of a padded graph on this device (graphs/ridge.py). Quantised weights are taken for a byte each."""
    model = config.model_config
    capability = current_platform.get_device_capability()
    name, found = current_platform.get_device_name(), (0, 0) if capability is None else tuple(capability)[:2]
    return ridge(name, found, 1 if config.quant_config is not None else model.dtype.itemsize)


def record_graphs(
    model: torch.nn.Module,
    config: VllmConfig,
    max_rows: int,
    device: torch.device,
    tensor_parallel: TensorParallel | None,
) -> StepGraphs:
    """Record the graphs of all sizes up to ``max_rows`` and check them. The KV cache must be there, and be nobody's.

    Raises:
        GraphError: a graph does not do what the eager step does.
    """
    start = time.monotonic()
    blocks, _, block_size, _ = cache_of(model).shape
    scheduler, model_config = config.scheduler_config, config.model_config
    forward = eager_forward(model, config)
    block = model_config.hf_config.traits().block_length or 0
    sizes = graph_sizes(min(max_rows, scheduler.max_num_batched_tokens), scheduler.max_num_seqs, block)
    buffers = StepBuffers(sizes[-1], graph_length(model_config.max_model_len, block), block_size, device, block)
    recorder = CudaRecorder(device)
    graphs = StepGraphs(sizes, buffers, forward, recorder.record, tensor_parallel)
    recorder.capture(graphs)
    check_graphs(graphs, CacheSize(blocks, block_size), model_config.get_vocab_size(), device)
    logger.info(
        "%d CUDA graphs of refresh steps, up to %d rows (padded up to %d) and %d positions a request, recorded and "
        "checked in %.1f s.",
        len(sizes),
        sizes[-1].rows,
        free_rows(config),
        buffers.max_length,
        time.monotonic() - start,
    )
    return graphs


class CudaRecorder:
    """graphs.step_graphs.Recorder for a GPU; ``capture`` opens what vLLM's collectives need around it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def capture(self, graphs: StepGraphs) -> None:
        """Record all of them."""
        torch.cuda.synchronize()
        with graph_capture(device=self.device) as context:
            self._stream = context.stream
            graphs.capture()
        torch.cuda.synchronize()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """One graph. Graphs share memory: a step is over before the next one begins."""
        # Kernels are compiled and loaded, and libraries allocate, before recording.
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=current_platform.get_global_graph_pool(), stream=self._stream):
            step()
        return graph.replay
