"""Records step_graphs.py's steps as CUDA graphs.

vLLM's own graph manager chooses a graph by numbers of requests and tokens before any hook of a step; it cannot tell a
first step, or a policy that needs exact rows, from a refresh step of as many tokens. So the graphs stand inside the
model's forward pass, which vLLM calls as it would an eager one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.distributed.parallel_state import graph_capture
from vllm.platforms import current_platform

from vllm_d2cache.step_graphs import StepGraphs


class CudaRecorder:
    """step_graphs.Recorder for a GPU; ``capture`` opens what vLLM's collectives need around it."""

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
