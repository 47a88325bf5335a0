"""How many rows each request gets in a step; admission, and placing output where its masks stood.

A request enters with its canvas appended, so that stock scheduling computes all T positions in one step and
allocates every KV block the request will need. After each scheduling its computed count is rolled back by its row
budget: every later step is then an extension by that many rows, whatever the worker answers, so asynchronous
scheduling works unchanged.

A text that is cut into blocks enters with the masks of two blocks, and gets more when tokens are emitted; its prompt is
computed in pieces (canvas/extent.py). What is stored of it never changes and is put into vLLM's prefix cache.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_d2cache.canvas.extent import Extent
from vllm_d2cache.compat.internals import (
    append_canvas,
    attach_totals,
    cache_stored,
    cache_when_told,
    forget_hashes,
    place_output_token,
    snapshot_output,
    take_step_report,
)
from vllm_d2cache.engine.memory_plan import Network, request_memory
from vllm_d2cache.engine.startup_log import plan_lines
from vllm_d2cache.observe.figures import RequestFigures, Totals
from vllm_d2cache.observe.snapshots import read_snapshots
from vllm_d2cache.options.request import SECTION
from vllm_d2cache.policies.budget import extra_rows, row_budget
from vllm_d2cache.requests.asked import Asked
from vllm_d2cache.requests.resolve import server_options

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


class D2CacheScheduler(AsyncScheduler):
    """Serves synchronous and asynchronous scheduling alike."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = server_options(self.vllm_config)
        traits = self.vllm_config.model_config.hf_config.traits()
        self.mask_token_id: int = traits.mask_token_id
        self._shift = int(traits.logit_shift > 0)
        # A canvas position needs no further slot behind the last one, unlike a sampled token.
        self.num_sampled_tokens_per_step = 0
        self._most_active: int = self.max_num_active_reqs
        self._extents: dict[str, Extent] = {}
        self._started: set[str] = set()  # running requests whose first step has been scheduled
        self._admitted: set[str] = set()  # waiting requests that the step being scheduled may admit
        self._network = Network.of(self.vllm_config)
        self._memory = request_memory(self.options, self._network, self.vllm_config.model_config.max_model_len)
        self._held: dict[str, int] = {}  # bytes of this memory that a request takes while it runs
        self._figures: dict[str, RequestFigures] = {}
        self._reporting: set[str] = set()  # requests that want their figures
        self._intervals: dict[str, int] = {}  # steps between snapshots, of requests that want any
        self._totals = Totals()  # since they were last sent
        if self.options.prefill_piece:
            # vLLM asks ``_mamba_block_aligned_split`` how much of a text a step computes.
            self.need_mamba_block_aligned_split = True
        if self.cache_config.enable_prefix_caching:
            cache_when_told(self.kv_cache_manager)
        for line in plan_lines(self.vllm_config, self.options, self.kv_cache_config.num_blocks):
            logger.info("vllm-d2cache %s", line)

    def add_request(self, request: Request) -> None:
        """Append the canvas and work out the row budget."""
        params = request.sampling_params
        assert params is not None
        asked = Asked.of(params)
        options = asked.options(self.options)
        prompt_len = request.num_prompt_tokens
        canvas_len = options.canvas_length(prompt_len, request.max_tokens)
        budget = self.options.refresh_budget
        extent = self._extents[request.request_id] = Extent(
            prompt_len,
            # Rows without a place in the text are reserved behind it.
            prompt_len + canvas_len + extra_rows(options, canvas_len),
            row_budget(options, prompt_len, canvas_len, budget),
            options.block,
            self.options.prefill_piece,
            options.block * self._shift,
        )
        append_canvas(request, self.mask_token_id, extent.known(0) - prompt_len)
        forget_hashes(request, extent.reusable(0) // self.block_size)
        self._held[request.request_id] = self._network.request_bytes(options, prompt_len, canvas_len, budget)
        self._figures[request.request_id] = RequestFigures(options.policy, prompt_len + canvas_len, canvas_len)
        if asked.snapshots:
            self._intervals[request.request_id] = asked.snapshots
        if asked.report:
            self._reporting.add(request.request_id)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Stock scheduling, admitting only requests that can all get their rows from now on."""
        self._admitted = self._admissible()
        self.max_num_active_reqs = min(self._most_active, len(self.running) + len(self._admitted))
        return super().schedule(throttle_prefills)

    def _admissible(self) -> set[str]:
        """The waiting requests, in queue order, that fit the token budget now and in every later step, and the memory.

        A running request's rows must never be cut short, so what it will need is counted, not what it needs now. Who
        waits for a grammar to be compiled lets others pass.
        """
        later = now = sum(self._later(r, r.num_computed_tokens) for r in self.running)
        held = sum(self._held[r.request_id] for r in self.running)
        limit = self.max_num_scheduled_tokens
        admitted: set[str] = set()
        for request in islice(self.waiting, self._most_active):
            if not super()._handle_blocked_waiting_request(request):
                continue
            later += self._later(request, 0)
            now += self._extents[request.request_id].first(0, request.num_output_tokens)
            held += self._held[request.request_id]
            if later > limit or now > limit or held > self._memory:
                break
            admitted.add(request.request_id)
        return admitted

    def _later(self, request: Request, computed: int) -> int:
        """A bound on the rows of any later step of its own."""
        extent = self._extents[request.request_id]
        if request.request_id in self._started:
            return extent.budget
        return extent.later(computed, request.num_output_tokens)

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, num_local: int = 0, num_external: int = 0
    ) -> int:
        """How much of a text that is computed in pieces a step takes; 0 = none, as there is no room for a piece."""
        if request.request_id in self._started:
            return num_new_tokens
        start = request.num_computed_tokens + num_local + num_external
        piece = self._extents[request.request_id].first(start, request.num_output_tokens)
        return piece if piece <= num_new_tokens else 0

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # A grammar may be ready since; then its request has not been counted.
        return request.request_id in self._admitted

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """The worker follows a request's grammar itself (canvas/grammar.py); what it emits is checked here by vLLM."""
        return None

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # AsyncScheduler would add placeholders for sampled tokens; a step here emits any number of tokens or none.
        Scheduler._update_after_schedule(self, scheduler_output)
        for req_id in scheduler_output.num_scheduled_tokens:
            request, extent = self.requests[req_id], self._extents[req_id]
            emitted = request.num_output_tokens
            if request.num_computed_tokens < request.num_tokens:
                stored = request.num_computed_tokens  # a piece of the prompt
            else:
                # What a step left final is stored by the next one, which is scheduled by now.
                stored = extent.settled(emitted)
                self._started.add(req_id)
                request.num_computed_tokens = extent.resumed_at(emitted)
            if self.cache_config.enable_prefix_caching:
                cache_stored(self.kv_cache_manager, request, stored, self.block_size)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Count the step, then stock bookkeeping, and snapshots besides its outputs."""
        report = take_step_report(model_runner_output)
        for req_id, (rows, commits, *_) in report.items():
            reserved = scheduler_output.num_scheduled_tokens[req_id]
            if rows > reserved:
                # A worker that does not wait for its device cannot say so itself, and has left rows out.
                raise RuntimeError(f"the refresh set of {req_id} has {rows} rows, more than the {reserved} reserved")
            # A request that has ended since may have run one step more.
            if (figures := self._figures.get(req_id)) is None:
                continue
            if commits < 0:
                figures.observe_fill(rows, self._totals)
            else:
                figures.observe(rows, commits, reserved, self._totals)
        snapshots = self._snapshots(report) if self._intervals else []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request, snapshot, due in snapshots:
            if due or request.is_finished():
                # Before the step's own outputs, one of which may end the request.
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.insert(0, snapshot)
        return outputs

    def _snapshots(self, report: dict[str, list[int]]) -> list[tuple[Request, EngineCoreOutput, bool]]:
        """The snapshots in a step's report, of requests that still run, and whether the step is one they asked for."""
        ids, found = list(report), []
        for row, canvas in read_snapshots([n for _, _, *appended in report.values() for n in appended]).items():
            # A request that has ended since may have run one step more.
            if request := self.requests.get(ids[row]):
                steps = self._figures[ids[row]].steps
                output = snapshot_output(ids[row], steps, canvas)
                found.append((request, output, steps % self._intervals[ids[row]] == 0))
        return found

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, and the totals since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            attach_totals(stats, self._totals.by_name())
            self._totals.clear()
        return stats

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        for count, token_id in enumerate(new_token_ids, 1):
            place_output_token(request, token_id)
            if self._stops(request, token_id):
                del new_token_ids[count:]
                return new_token_ids, True
        extent = self._extents[request.request_id]
        missing = extent.known(request.num_output_tokens) - request.num_tokens
        if missing > 0:
            append_canvas(request, self.mask_token_id, missing)
            if request.request_id in self._started:
                request.num_computed_tokens = extent.resumed_at(request.num_output_tokens)
        return new_token_ids, False

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._started.discard(request.request_id)
        extent = self._extents[request.request_id]
        forget_hashes(request, extent.reusable(request.num_output_tokens) // self.block_size)
        super()._preempt_request(request, *args, **kwargs)

    @staticmethod
    def _stops(request: Request, token_id: int) -> bool:
        """vLLM's own rules, but for the one that counts the canvas as text already."""
        params = request.sampling_params
        assert params is not None
        if token_id == params.eos_token_id:
            request.status = RequestStatus.FINISHED_STOPPED
        elif token_id in (params.stop_token_ids or ()):
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = token_id
        elif request.num_output_tokens >= request.max_tokens:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return request.is_finished()

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self._extents.pop(request.request_id, None)
        self._started.discard(request.request_id)
        self._held.pop(request.request_id, None)
        self._intervals.pop(request.request_id, None)
        figures = self._figures.pop(request.request_id, None)
        kv_transfer_params, ec_transfer_params = super()._free_request(request, delay_free_blocks=delay_free_blocks)
        if figures is not None and request.request_id in self._reporting:
            # vLLM returns these with the finished request; nothing else is ever in them here.
            kv_transfer_params = {SECTION: figures.report(request.num_output_tokens)}
        self._reporting.discard(request.request_id)
        return kv_transfer_params, ec_transfer_params

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """There are no draft tokens."""

    def update_draft_token_ids_in_output(self, draft_token_ids: DraftTokenIds, *args: Any) -> None:
        """There are no draft tokens."""
