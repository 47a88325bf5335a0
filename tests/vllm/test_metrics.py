"""Totals travel with vLLM's statistics and end up in counters that vLLM's tools read."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.metrics import loggers
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, LoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.gpu.async_utils import AsyncOutput

from vllm_d2cache.compat.internals import attach_totals, take_step_report, take_totals
from vllm_d2cache.metrics import _DIFFUSION, _OWN, D2CacheStatLogger
from vllm_d2cache.observe.figures import TOTALS as TOTAL_NAMES

pytestmark = pytest.mark.vllm

TOTALS = {
    ("d2cache", "steps"): 5,
    ("d2cache", "canvases"): 1,
    ("d2cache", "canvas_slots"): 40,
    ("d2cache", "first_canvas_slots"): 8,
    ("d2cache", "commits"): 8,
    ("d2cache", "rows_refreshed"): 60,
    ("d2cache", "rows_saved"): 40,
    ("d2cache", "rows_reserved"): 50,
    ("d2cache", "rows_used"): 41,
    ("full", "steps"): 2,
    ("full", "canvases"): 1,
    ("full", "canvas_slots"): 16,
    ("full", "first_canvas_slots"): 8,
    ("full", "commits"): 8,
}


def config(architecture: str) -> SimpleNamespace:
    return SimpleNamespace(model_config=SimpleNamespace(architectures=[architecture], served_model_name="tiny"))


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    yield
    while D2CacheStatLogger._registered:
        collector = D2CacheStatLogger._registered.pop()
        if collector in REGISTRY._collector_to_names:
            REGISTRY.unregister(collector)


def exposed(prefix: str) -> dict[str, float]:
    lines = generate_latest().decode().splitlines()
    samples = [line.rpartition(" ") for line in lines if line.startswith(prefix)]
    return {name: float(value) for name, _, value in samples if "_created" not in name}


def test_totals_survive_the_way_between_processes() -> None:
    stats = SchedulerStats()
    attach_totals(stats, TOTALS)
    sent = MsgpackEncoder().encode(stats)
    got = MsgpackDecoder(SchedulerStats).decode(sent)
    got.running_lora_adapters["an/adapter"] = 3  # vLLM's front end counts them there
    assert take_totals(got) == TOTALS
    assert got.running_lora_adapters == {"an/adapter": 3}, "what vLLM's own logger sees next"


def test_vllm_reads_the_carrier_for_lora_alone() -> None:
    source = inspect.getsource(PrometheusStatLogger.record)
    guard = "if self.gauge_lora_info is not None:"
    assert source.count("running_lora_adapters.keys()") == source.count(guard) == 1
    assert source.index(guard) < source.index("running_lora_adapters.keys()")
    assert "running_lora_adapters" not in inspect.getsource(LoggingStatLogger)


def test_step_report_rides_where_nans_are_counted() -> None:
    assert "num_nans_in_logits = dict(" in inspect.getsource(AsyncOutput.get_output)
    output = ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1}, num_nans_in_logits={"a": [3, 1], "b": [4, 0]})
    assert take_step_report(output) == {"a": [3, 1], "b": [4, 0]}
    assert output.num_nans_in_logits is None
    assert take_step_report(output) == {}


def test_counters_of_two_engines() -> None:
    logger = D2CacheStatLogger(config("LLaDAModelLM"), [0, 1])
    unregister_vllm_metrics()  # as vLLM's own logger does, which is made after this one
    logger.log_engine_initialized()
    assert exposed("vllm:diffusion") == {
        f'vllm:diffusion_{name}_total{{engine="{engine}",model_name="tiny"}}': 0.0
        for name in ("num_denoising_steps", "num_canvas_positions", "num_committed_tokens")
        for engine in (0, 1)
    }
    for _ in range(2):
        stats = SchedulerStats()
        attach_totals(stats, TOTALS)
        logger.record(stats, None, engine_idx=1)
    logger.record(None, None)
    shown = exposed("vllm")
    tail = '_total{engine="1",model_name="tiny"}'
    assert shown["vllm:diffusion_num_denoising_steps" + tail] == 2 * (5 + 2 + 2)
    assert shown["vllm:diffusion_num_canvas_positions" + tail] == 2 * (40 + 16 + 16)
    assert shown["vllm:diffusion_num_committed_tokens" + tail] == 2 * 16
    tail = '_total{engine="1",model_name="tiny",policy="d2cache"}'
    assert shown["vllm_d2cache:rows_refreshed" + tail] == 120
    assert shown["vllm_d2cache:rows_saved" + tail] == 80
    assert shown["vllm_d2cache:budget_rows" + tail] == 100
    assert shown["vllm_d2cache:budget_rows_used" + tail] == 82
    assert shown['vllm_d2cache:steps_total{engine="1",model_name="tiny",policy="full"}'] == 4


def test_a_second_server_in_the_process_starts_anew() -> None:
    for _ in range(2):
        logger = D2CacheStatLogger(config("LLaDAModelLM"), [0])
        logger.log_engine_initialized()
        stats = SchedulerStats()
        attach_totals(stats, TOTALS)
        logger.record(stats, None)
    name = 'vllm_d2cache:commits_total{engine="0",model_name="tiny",policy="full"}'
    assert exposed("vllm_d2cache")[name] == 8


def test_other_models_get_no_counters() -> None:
    assert issubclass(D2CacheStatLogger, AggregateStatLoggerBase)
    logger = D2CacheStatLogger(config("LlamaForCausalLM"), [0])
    logger.log_engine_initialized()
    logger.record(SchedulerStats(running_lora_adapters={"a": 1}), None)
    assert exposed("vllm_d2cache") == {}


def test_the_dashboard_asks_for_counters_that_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    dashboard = json.loads((root / "examples" / "grafana" / "vllm-d2cache.json").read_text())
    expressions = " ".join(t["expr"] for panel in dashboard["panels"] for t in panel["targets"])
    asked = set(re.findall(r"(?:vllm|vllm_d2cache):\w+", expressions))
    ours = {f"{name}_total" for name in (*_DIFFUSION, *_OWN)}
    source = inspect.getsource(loggers)
    for name in asked - ours:
        assert f'"{re.sub("_(total|bucket)$", "", name)}"' in source, name
    documented = set(re.findall(r"`((?:vllm|vllm_d2cache):\w+)`", (root / "docs" / "metrics.md").read_text()))
    assert documented == ours
    assert {name for name in asked if name.startswith("vllm_d2cache:")} <= ours


def test_every_counter_has_a_total() -> None:
    assert {total for totals, _ in _DIFFUSION.values() for total in totals} <= set(TOTAL_NAMES)
    assert {total for total, _ in _OWN.values()} <= set(TOTAL_NAMES)
