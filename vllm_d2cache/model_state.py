"""The conductor of a step: vLLM's ModelState hooks, each a few calls into the modules that do the work.

Order within a step, as Model Runner V2 calls it: add_request, preprocess_state, prepare_attn, prepare_inputs,
forward, sampler (runner_sampler.py). It computes nothing itself.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_d2cache.attention.backend import D2CacheMetadata
from vllm_d2cache.attention.capture import ImportanceCapture, MapPool, TensorParallel
from vllm_d2cache.attention.drift import DriftMeter, FocusBySlot
from vllm_d2cache.attention.eviction import KeptBySlot, LayerKeys
from vllm_d2cache.canvas import Request
from vllm_d2cache.compat.grammars import Grammars
from vllm_d2cache.compat.internals import set_logits_rows, settle_request_state
from vllm_d2cache.config import SECTION, parse_request_options, parse_server_options
from vllm_d2cache.cuda_graphs import record_graphs
from vllm_d2cache.denoiser import Denoiser
from vllm_d2cache.grammar import GrammarState, is_constrained
from vllm_d2cache.infill import parse_canvas
from vllm_d2cache.logprobs import LogprobRecorder
from vllm_d2cache.memory_plan import Rehearsal, plan_memory
from vllm_d2cache.ops.backends import AttentionShape, select_backend
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.shadow_attention import ShadowRows
from vllm_d2cache.policies import POLICY_CLASSES, row_budget
from vllm_d2cache.records import EditSpec, SamplingSpec, StepRows
from vllm_d2cache.row_exits import RowGate
from vllm_d2cache.row_store import RowStore
from vllm_d2cache.runner_sampler import D2CacheSampler
from vllm_d2cache.snapshots import snapshot_interval
from vllm_d2cache.step_graphs import GraphSize, GraphStep, StepGraphs
from vllm_d2cache.stored_outputs import PartialForward
from vllm_d2cache.trace import TraceRecorder
from vllm_d2cache.value_directions import ValueDirections

logger = init_logger(f"vllm.{__name__}")


class D2CacheModelState(ModelState):
    """State of all running requests of one worker."""

    def __init__(
        self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        additional = vllm_config.additional_config
        self.options = parse_server_options(additional.get(SECTION) if isinstance(additional, dict) else None)
        backend = select_backend(self.options.attention_backend, device, _attention_shape(vllm_config))
        logger.info("Attention, maps and statistics are computed on %s with %s.", device, backend)
        self.denoiser = Denoiser(self.max_num_reqs, self.max_model_len, device, model.traits, self.options)
        self.logprobs = LogprobRecorder(self.denoiser.canvas)
        # Every rank computes the same; one of them writes.
        writes = self.options.trace_dir is not None and vllm_config.parallel_config.rank == 0
        name = vllm_config.model_config.model
        self.tracer = TraceRecorder(self.options.trace_dir, name) if writes and self.options.trace_dir else None
        self.rehearsal = Rehearsal(plan_memory(vllm_config, self.options), device)
        self.rows: StepRows | None = None  # of the step under way
        self.capture: ImportanceCapture | GraphStep | None = None
        self.drift: DriftMeter | None = None
        self._pool = MapPool()
        size = vllm_config.parallel_config.tensor_parallel_size
        self._tensor_parallel = TensorParallel(size, tensor_model_parallel_all_reduce) if size > 1 else None
        self._kept_keys: KeptBySlot = {}
        self._focus: FocusBySlot = {}
        self.gate: RowGate | None = None  # where some request of the step drops rows
        self._outputs = RowStore()
        self._exit_states = RowStore()
        self._directions = ValueDirections(self._tensor_parallel)
        self.watched: set[int] = set()  # slots of requests that want snapshots
        self._slots: dict[str, int] = {}
        self._first_block: dict[int, int] = {}
        self._unsettled: dict[int, int] = {}  # slot -> tokens emitted before a preemption
        self._grammars: Grammars | None = None  # made for the first request that has one
        self.graphs: StepGraphs | None = None
        self._wants_graphs = (
            device.type == "cuda" and self.options.graph_rows > 0 and not vllm_config.model_config.enforce_eager
        )
        self._graph_size: GraphSize | None = None  # of the step under way; None = eager

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Replace vLLM's sampler; there is no rejection sampler."""
        return D2CacheSampler(self, sampler), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Start a request, or start it over after a preemption: the result is the same, its cached K and V are gone."""
        if self._wants_graphs and self.graphs is None:
            # The first request is one of vLLM's warm-up, at start-up; by then there is a KV cache.
            self.graphs = record_graphs(
                self.model, self.vllm_config, self.options.graph_rows, self.device, self._tensor_parallel
            )
        params = new_req_data.sampling_params
        if params is None or new_req_data.req_id.startswith("_warmup_"):
            return
        prompt, text = new_req_data.prompt_token_ids, new_req_data.prefill_token_ids
        assert prompt is not None and text is not None
        options = self.options.resolve(parse_request_options(params.extra_args), is_constrained(params))
        canvas_len = params.max_tokens  # behind it, the text may hold room for shadows
        assert canvas_len is not None
        seed = self.vllm_config.model_config.seed
        request = Request(
            new_req_data.req_id,
            len(prompt),
            canvas_len,
            options,
            _sampling_spec(params, new_req_data.req_id, seed),
            row_budget(options, len(prompt), canvas_len, self.options.refresh_budget),
            parse_canvas(params.extra_args),
            len(text),
            self._start_grammar(params),
        )
        mask = self.denoiser.traits.mask_token_id
        canvas = np.asarray(text[len(prompt) :])
        # Only tokens already emitted stand in a resumed canvas, and they stand at its left end.
        emitted = int((canvas != mask).sum())
        self.denoiser.add(req_index, request, np.asarray(prompt), emitted)
        self.logprobs.add(req_index, request)
        if snapshot_interval(params.extra_args):
            self.watched.add(req_index)
        blocks = new_req_data.block_ids[0]
        consecutive = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        self._first_block[req_index] = blocks[0] if consecutive else -1
        self._slots[request.req_id] = req_index
        self._unsettled[req_index] = emitted
        if self.tracer:
            self.tracer.start(req_index, request, list(prompt))

    def _start_grammar(self, params: SamplingParams) -> GrammarState | None:
        if not is_constrained(params):
            return None
        if self._grammars is None:
            all_reduce = None if self._tensor_parallel is None else self._tensor_parallel.all_reduce
            self._grammars = Grammars(self.vllm_config, self.denoiser.canvas.device, all_reduce)
        return self._grammars.start(params)

    def remove_request(self, req_id: str) -> None:
        """Forget a finished, aborted or preempted request."""
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            if self.tracer:
                self.tracer.finish(slot, "abort")
            self._unsettled.pop(slot, None)
            self._kept_keys.pop(slot, None)
            self._focus.pop(slot, None)
            self.logprobs.remove(slot)
            self.watched.discard(slot)
            self._outputs.drop(slot)
            self._exit_states.drop(slot)
            self.denoiser.remove(slot)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: torch.Tensor,
    ) -> None:
        """Put the refresh set where the runner has contiguous positions."""
        slots = input_batch.idx_mapping_np.tolist()
        if any(slot not in self.denoiser.canvas.requests for slot in slots):
            return  # vLLM's own warm-up batch
        self._graph_size = self._fitting_graph(slots)
        rows = self.denoiser.begin(input_batch.idx_mapping, slots, padded=self._graph_size is not None)
        count = rows.positions.shape[0]
        if count > input_batch.num_tokens:
            raise RuntimeError(f"the refresh sets have {count} rows, more than the {input_batch.num_tokens} reserved")
        input_batch.positions[:count] = rows.positions
        input_batch.input_ids[:count] = rows.input_ids
        set_logits_rows(input_batch, rows.logits_rows)
        self.rows = rows
        self.model.head_in_sampler = True

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
        if self.rows is None:
            return None  # type: ignore[return-value]  # a dummy run: attention does nothing
        rows, table = self.rows, block_tables[0]
        group = kv_cache_config.kv_cache_groups[0]
        block_size = group.kv_cache_spec.block_size
        positions = rows.positions[: rows.request.shape[0]]  # shadows have no page
        page = positions.div(block_size, rounding_mode="floor")
        slots = table[rows.request, page].long() * block_size + positions - page * block_size
        slots = torch.where(rows.live, slots, -1)
        requests = [self.denoiser.canvas.requests[s] for s in rows.slots]
        layout = PagedLayout(
            rows.counts,
            [r.prompt_len + r.canvas_len for r in requests],
            table,
            [self._first_block[s] for s in rows.slots],
            slots,
            rows.keys,
        )
        if self._graph_size is not None:
            assert self.graphs is not None
            self.capture = self.graphs.step(self._graph_size, rows, layout)
            self.model.replay = self.capture.replay
            return None  # type: ignore[return-value]  # the graph has its own
        self.capture = ImportanceCapture(layout, rows.reads_importance, positions, self._pool, self._tensor_parallel)
        layer_keys = None
        if any(rows.choices):
            layer_keys = LayerKeys(layout, rows.choices, rows.slots, self._kept_keys, self._tensor_parallel)
        shadows = ShadowRows(rows.shadows, rows.positions[len(positions) :]) if any(rows.shadows) else None
        if any(w is not None for w in rows.watched):
            self.drift = DriftMeter(layout, rows.watched, rows.slots, self._focus, self._tensor_parallel)
        metadata = D2CacheMetadata(layout, self.capture, layer_keys, shadows, self.drift)
        if rows.exiting is not None:
            self.gate = RowGate.open(rows.exiting, rows.slots, self._exit_states)
        if rows.stored is not None or self.gate is not None:
            self.model.partial_forward = PartialForward(
                rows.stored,
                self.gate,
                rows.slots,
                layout,
                metadata.use_layout,
                self._outputs,
                self._directions,
                self._tensor_parallel,
            )
        return dict.fromkeys((name for g in kv_cache_config.kv_cache_groups for name in g.layer_names), metadata)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Give the model the rows of the refresh sets alone: what was reserved beyond them costs nothing."""
        if self.rows is None:
            if not self.model.layers[0].pages.numel():
                self.rehearsal.forward()  # there is no KV cache yet: vLLM measures what it may take
            return {}
        for slot in self.rows.slots:
            if slot in self._unsettled:
                request = self.denoiser.canvas.requests[slot]
                computed = request.reserved_len - request.row_budget
                settle_request_state(req_states, slot, request.prompt_len + self._unsettled.pop(slot), computed)
        count = self.rows.positions.shape[0]
        return {"input_ids": input_batch.input_ids[:count], "positions": input_batch.positions[:count]}

    def finish_step(self) -> None:
        """Called by the sampler at its end."""
        self.rows, self.capture, self.drift, self.gate, self._graph_size = None, None, None, None, None
        self.model.head_in_sampler = False
        self.model.partial_forward = self.model.replay = None

    def _fitting_graph(self, slots: list[int]) -> GraphSize | None:
        """The graph that does a step of these requests; None = eager, with exact rows."""
        if self.graphs is None or self.tracer or self.logprobs.any_of(slots) or not self.denoiser.can_pad(slots):
            return None
        requests = [self.denoiser.canvas.requests[s] for s in slots]
        lengths = [r.prompt_len + r.canvas_len for r in requests]
        reads = [POLICY_CLASSES[r.options.policy].reads_importance for r in requests]
        return self.graphs.fitting([r.row_budget for r in requests], lengths, reads)

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


def _attention_shape(config: VllmConfig) -> AttentionShape:
    """What a rank's attention looks like."""
    model, parallel = config.model_config, config.parallel_config
    return AttentionShape(
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
        config.cache_config.block_size,
        model.dtype,
    )


def _sampling_spec(params: SamplingParams, req_id: str, engine_seed: int) -> SamplingSpec:
    stop = list(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        stop.append(params.eos_token_id)
    seed = params.seed
    if seed is None:
        # The same on every rank, different for every request.
        digest = hashlib.blake2b(f"{engine_seed}:{req_id}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little", signed=True)
    return SamplingSpec(
        params.temperature,
        params.top_p,
        max(0, params.top_k),
        seed,
        tuple(dict.fromkeys(stop)),
        params.logprobs,
        _edit_spec(params),
    )


def _edit_spec(params: SamplingParams) -> EditSpec:
    """What request_fit.py let through: bad words of one token, lists that leave something to choose."""
    return EditSpec(
        tuple(params.allowed_token_ids or ()),
        tuple((params.logit_bias or {}).items()),
        tuple(ids[0] for ids in params.bad_words_token_ids or ()),
        params.min_tokens,
        tuple(sorted(params.all_stop_token_ids)),
        (params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
    )
