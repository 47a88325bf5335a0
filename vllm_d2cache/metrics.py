"""Prometheus counters, fed from what the scheduler sends with vLLM's own statistics (docs/metrics.md)."""

from __future__ import annotations

from typing import Any, ClassVar

from prometheus_client import REGISTRY, Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_d2cache.compat.internals import take_totals
from vllm_d2cache.models.families import FAMILIES

# Counter -> the totals it is the sum of, and what it says. vLLM's own names, so that its tools find them:
# `vllm bench serve` takes positions per step for the canvas length, and one step of each canvas for its commit.
_DIFFUSION = {
    "vllm:diffusion_num_denoising_steps": (("steps", "canvases"), "Denoising steps, and one more for each canvas."),
    "vllm:diffusion_num_canvas_positions": (
        ("canvas_slots", "first_canvas_slots"),
        "Canvas length, added in each of these steps.",
    ),
    "vllm:diffusion_num_committed_tokens": (("commits",), "Tokens committed."),
}
_OWN = {
    "vllm_d2cache:steps": ("steps", "Denoising steps of all requests."),
    "vllm_d2cache:rows_refreshed": ("rows_refreshed", "Rows computed."),
    "vllm_d2cache:rows_saved": ("rows_saved", "Rows that full recompute would have computed besides."),
    "vllm_d2cache:budget_rows": ("rows_reserved", "Rows reserved for steps after a request's first."),
    "vllm_d2cache:budget_rows_used": ("rows_used", "Of these, rows computed."),
    "vllm_d2cache:commits": ("commits", "Tokens committed."),
    "vllm_d2cache:canvases": ("canvases", "Requests that ran their first step."),
}


class D2CacheStatLogger(AggregateStatLoggerBase):
    """Entry point ``vllm.stat_logger_plugins``; vLLM makes one in each front end, whatever the model.

    Does nothing for models that are not the plugin's.
    """

    _registered: ClassVar[list[Counter]] = []

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.ours = not set(FAMILIES).isdisjoint(vllm_config.model_config.architectures)
        self.model_name = vllm_config.model_config.served_model_name
        self.engine_indexes = engine_indexes
        self.diffusion: dict[str, Counter] = {}
        self.own: dict[str, Counter] = {}

    def log_engine_initialized(self) -> None:
        """Register the counters: vLLM's own logger, which is made after this one, clears all that are vLLM's."""
        if not self.ours:
            return
        while self._registered:
            collector = self._registered.pop()
            if collector in REGISTRY._collector_to_names:
                REGISTRY.unregister(collector)
        labels = ["model_name", "engine"]
        self.diffusion = {name: Counter(name, text, labels) for name, (_, text) in _DIFFUSION.items()}
        self.own = {name: Counter(name, text, [*labels, "policy"]) for name, (_, text) in _OWN.items()}
        self._registered.extend([*self.diffusion.values(), *self.own.values()])
        for counter in self.diffusion.values():
            for engine in self.engine_indexes:
                counter.labels(self.model_name, str(engine))

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add what the scheduler of an engine sent."""
        if not self.diffusion or scheduler_stats is None:
            return
        for (policy, total), value in take_totals(scheduler_stats).items():
            for name, (totals, _) in _DIFFUSION.items():
                if total in totals:
                    self.diffusion[name].labels(self.model_name, str(engine_idx)).inc(value)
            for name, (source, _) in _OWN.items():
                if total == source:
                    self.own[name].labels(self.model_name, str(engine_idx), policy).inc(value)
