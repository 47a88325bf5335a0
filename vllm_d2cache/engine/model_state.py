"""vLLM's ModelState hooks, each a call or two of the step runner (step/runner.py).

Order within a step, as Model Runner V2 calls them: add_request, preprocess_state, prepare_attn, prepare_inputs,
forward, sampler (engine/runner_sampler.py). It decides nothing about a step.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_d2cache.canvas.extent import settled_positions
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.compat.adapters import adapter_of, leave_base_rows_alone, set_row_adapters
from vllm_d2cache.compat.grammars import Grammars
from vllm_d2cache.compat.internals import say_nothing_of_skipped_graphs, set_logits_rows, settle_request_state
from vllm_d2cache.engine.attention_backend import D2CacheMetadata, attention_shape
from vllm_d2cache.engine.cuda_graphs import cache_of, eager_step, free_rows, record_graphs
from vllm_d2cache.engine.memory_plan import Rehearsal, plan_memory
from vllm_d2cache.engine.runner_sampler import D2CacheSampler
from vllm_d2cache.engine.warm_up import Place, warm_up
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.observe.trace import TraceRecorder
from vllm_d2cache.ops.backends import select_backend
from vllm_d2cache.ops.rollout import TensorParallel
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.asked import Asked
from vllm_d2cache.requests.resolve import server_options
from vllm_d2cache.requests.sampling import sampling_spec
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import StepRunner
from vllm_d2cache.step.step import Step

logger = init_logger(f"vllm.{__name__}")


def sum_of_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of tensor parallelism, of the shape of ``values``.

    In one row: on cards with NVLink vLLM hands what has two dimensions to FlashInfer, which takes hidden states and
    raises where a line of fp32 is no multiple of four numbers, as texts and rows of ours are not.
    """
    return tensor_model_parallel_all_reduce(values.reshape(-1)).view(values.shape)


class D2CacheModelState(ModelState):
    """State of all running requests of one worker."""

    def __init__(
        self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.options = server_options(vllm_config)
        backend = select_backend(self.options.attention_backend, device, attention_shape(vllm_config))
        logger.info("Attention, maps and statistics are computed on %s with %s.", device, backend)
        size = vllm_config.parallel_config.tensor_parallel_size
        ranks = TensorParallel(size, sum_of_ranks) if size > 1 else None
        traits: Any = model.traits
        vocab_size = vllm_config.model_config.get_vocab_size()
        worker = Worker(self.max_num_reqs, self.max_model_len, device, traits, self.options, ranks, vocab_size)
        # Every rank computes the same; one of them writes.
        directory = self.options.trace_dir if vllm_config.parallel_config.rank == 0 else None
        self.tracer = TraceRecorder(directory, vllm_config.model_config.model) if directory else None
        self.steps = StepRunner(worker, may_graph=self.tracer is None)
        self.step: Step | None = None  # the one under way
        self.rehearsal = Rehearsal(plan_memory(vllm_config, self.options), device)
        self.watched: set[int] = set()  # slots of requests that want snapshots
        self._slots: dict[str, int] = {}
        self._adapters: dict[int, int] | None = None  # of each slot, 0 for none; on a server with adapters
        if vllm_config.lora_config is not None:
            self._adapters = {}
            leave_base_rows_alone(model)
        self._unsettled: dict[int, int] = {}  # slot -> tokens emitted before a preemption
        wants_graphs = self.options.graph_rows > 0 and not vllm_config.model_config.enforce_eager
        self._records_graphs = device.type == "cuda" and wants_graphs
        self._is_ready = False

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Replace vLLM's sampler; there is no rejection sampler."""
        return D2CacheSampler(self, sampler), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Start a request, or start it again after a preemption: the result is the same, its cached K and V are gone.

        It starts over, or behind the last whole block that has been emitted.
        """
        if not self._is_ready:
            # The first request is one of vLLM's warm-up, at start-up; by then there is a KV cache.
            self._is_ready = True
            self._get_ready()
        params, req_id = new_req_data.sampling_params, new_req_data.req_id
        if params is None or req_id.startswith("_warmup_"):
            return
        prompt, text = new_req_data.prompt_token_ids, new_req_data.prefill_token_ids
        assert prompt is not None and text is not None and params.max_tokens is not None
        asked = Asked.of(params)
        options = asked.options(self.options)
        canvas_len = options.canvas_length(len(prompt), params.max_tokens)
        # Only tokens already emitted stand in a resumed canvas, and they stand at its left end.
        written = text[len(prompt) :]
        emitted = int((np.asarray(written) != self.steps.worker.traits.mask_token_id).sum())
        settled = settled_positions(len(prompt), emitted, options.block)
        known = tuple(written[: max(0, settled - len(prompt))])
        request = Request(
            req_id,
            len(prompt),
            canvas_len,
            options,
            sampling_spec(params, req_id, self.vllm_config.model_config.seed),
            row_budget(options, len(prompt), canvas_len, self.options.refresh_budget),
            (*known, *[-1] * (canvas_len - len(known))) if known else asked.canvas,
            len(text),
            self._grammars.start(params) if asked.constrained else None,
            computed=new_req_data.num_computed_tokens,
            first_end=settled + options.block,
            wanted=params.max_tokens,
        )
        if request.grammar is not None:
            request.grammar.go_on(known)
        self.steps.add(req_index, request, np.asarray(prompt), emitted)
        if asked.snapshots:
            self.watched.add(req_index)
        self._slots[req_id] = req_index
        if self._adapters is not None:
            self._adapters[req_index] = adapter_of(new_req_data)
        self._unsettled[req_index] = emitted
        if self.tracer:
            self.tracer.start(req_index, request, list(prompt))

    def _get_ready(self) -> None:
        """Record graphs, then run what requests can ask for, so that none of them waits for a compiler."""
        say_nothing_of_skipped_graphs()
        worker, config = self.steps.worker, self.vllm_config
        if self._records_graphs:
            graphs = record_graphs(self.model, config, self.options.graph_rows, self.device, worker.tensor_parallel)
            self.steps.forms.graphs = graphs
            self.steps.forms.free_rows = free_rows(config)
        forward = eager_step(self.model, config)

        def layers(step: Step) -> torch.Tensor:
            if self._adapters is not None:
                self._place_adapters(dict.fromkeys(step.slots, 0), step)
            return forward(step)

        begin, (blocks, _, size, _) = time.monotonic(), cache_of(self.model).shape
        most = config.scheduler_config.max_num_batched_tokens
        if steps := warm_up(Place(worker, layers, self.model.lm_logits, blocks, size, most)):
            logger.info("Kernels are compiled: %d synthetic steps in %.1f s.", steps, time.monotonic() - begin)

    @cached_property
    def _grammars(self) -> Grammars:
        """Made for the first request that has one."""
        ranks = self.steps.worker.tensor_parallel
        return Grammars(self.vllm_config, self.device, None if ranks is None else ranks.all_reduce)

    def remove_request(self, req_id: str) -> None:
        """Forget a finished, aborted or preempted request."""
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            if self.tracer:
                self.tracer.finish(slot, "abort")
            self._unsettled.pop(slot, None)
            self.watched.discard(slot)
            self.steps.remove(slot)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: torch.Tensor,
    ) -> None:
        """Put the refresh set where the runner has contiguous positions."""
        slots = input_batch.idx_mapping_np.tolist()
        if any(slot not in self.steps.canvas.requests for slot in slots):
            return  # vLLM's own warm-up batch
        reaches = None
        if self.steps.worker.traits.block_length is not None:
            reaches = (input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens).tolist()
        requests = input_batch.idx_mapping
        if requests.dtype != torch.int64:  # vLLM 0.31 has them in int32
            requests = requests.long()
        self.step = self.steps.open(requests, slots, reaches=reaches)
        count = self.step.num_rows
        if count > input_batch.num_tokens:
            raise RuntimeError(f"the refresh sets have {count} rows, more than the {input_batch.num_tokens} reserved")
        rows = self.step.rows
        set_logits_rows(input_batch, input_batch.idx_mapping[:0] if rows is None else rows.logits_rows)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[Any],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Where the fresh K and V go, and where each request's keys lie."""
        if self.step is None:
            return None  # type: ignore[return-value]  # a dummy run: attention does nothing
        groups = kv_cache_config.kv_cache_groups
        step = self.steps.place(self.step, Pages(block_tables[0], groups[0].kv_cache_spec.block_size))
        self.model.step.head_in_sampler = True
        if step.graph is not None:
            self.model.step.replay = step.graph.replay
            return None  # type: ignore[return-value]  # the graph has its own
        assert step.layout is not None
        metadata = D2CacheMetadata(step.layout, step.hooks)
        self.model.step.partial_forward = metadata.partial_forward()
        return dict.fromkeys((name for group in groups for name in group.layer_names), metadata)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Give the model the rows of the refresh sets alone: what was reserved beyond them costs nothing."""
        if self.step is None:
            if not self.model.layers[0].pages.numel():
                self.rehearsal.forward()  # there is no KV cache yet: vLLM measures what it may take
            return {}
        for slot in input_batch.idx_mapping_np.tolist():
            if slot in self._unsettled:
                request = self.steps.canvas.requests[slot]
                computed = max(0, request.reserved_len - request.row_budget)
                settle_request_state(req_states, slot, request.prompt_len + self._unsettled.pop(slot), computed)
        if self._adapters is not None:
            self._place_adapters(self._adapters, self.step)
        positions, input_ids = self.step.packed()
        return {"input_ids": input_ids, "positions": positions}

    def _place_adapters(self, adapters: dict[int, int], step: Step) -> None:
        """Which row is whose, in the order in which the rows are packed."""
        packed = [adapters[slot] for slot, count in step.owners() for _ in range(count)]
        set_row_adapters(self.model, [adapters[slot] for slot in step.slots], packed)

    def finish_step(self) -> None:
        """Called by the sampler at its end."""
        self.step = None
        self.model.step.clear()

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Nothing beyond vLLM's own dummy inputs."""
        return {}

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> None:
        """Token ids only."""
