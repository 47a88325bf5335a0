"""The CPU patches touch nobody else's models, fit this vLLM, and are still needed. No engine is started."""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
import vllm.config.vllm as config_module
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON, dispatcher

from vllm_d2cache.compat import cpu_runner
from vllm_d2cache.compat.cpu_kernels import IGNORED, TWINS, any_logits_rows, unread

OURS = frozenset({"OurModel"})
STOCK_VALIDATION = inspect.unwrap(VllmConfig._validate_v2_model_runner)
STOCK_VALIDATION_ASKS = "HAS_TRITON" in STOCK_VALIDATION.__code__.co_names  # vLLM 0.33 no longer does
HOOK = "register_triton_kernel_overrides"
PATCHED = ("use_v2_model_runner", "_validate_v2_model_runner")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="patches for CPU without Triton"),
]


def attributes(owner: type, names: tuple[str, ...]) -> list[Any]:
    return [inspect.getattr_static(owner, name) for name in names]


@pytest.fixture
def pristine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """vLLM without the patches, even if another test had the plugin registered; restored at the end."""
    platform = type(current_platform)
    hook = inspect.getattr_static(platform, HOOK).__func__
    monkeypatch.setattr(cpu_runner, "_state", cpu_runner._State())
    monkeypatch.setattr(VllmConfig, PATCHED[0], property(inspect.unwrap(VllmConfig.use_v2_model_runner.fget)))
    monkeypatch.setattr(VllmConfig, PATCHED[1], STOCK_VALIDATION)
    monkeypatch.setattr(platform, HOOK, classmethod(inspect.unwrap(hook)))
    monkeypatch.setattr(VllmConfig, "_get_v2_model_runner_unsupported_features", lambda self: [])
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    return monkeypatch


def config_for(*architectures: str) -> VllmConfig:
    """A configuration with only the fields that the two patched functions read."""
    config: Any = object.__new__(VllmConfig)
    config.model_config = SimpleNamespace(architectures=list(architectures)) if architectures else None
    config.attention_config = SimpleNamespace(hisparse_config=None)
    return config


# --- the patches --------------------------------------------------------------------------------------------


def test_ours_get_the_second_runner_and_pass_validation(pristine: pytest.MonkeyPatch) -> None:
    cpu_runner.install(OURS)
    assert config_for("OurModel").use_v2_model_runner
    config_for("OurModel")._validate_v2_model_runner()


@pytest.mark.parametrize("architectures", [(), ("LlamaForCausalLM",), ("OurModelButOther",)])
def test_others_are_answered_by_vllm(pristine: pytest.MonkeyPatch, architectures: tuple[str, ...]) -> None:
    cpu_runner.install(OURS)
    other = config_for(*architectures)
    assert not other.use_v2_model_runner
    validate = VllmConfig._validate_v2_model_runner
    if STOCK_VALIDATION_ASKS:
        with pytest.raises(ValueError, match="requires Triton"):
            validate(other)
    else:
        assert validate is STOCK_VALIDATION


def test_other_conditions_of_vllm_still_hold_for_ours(pristine: pytest.MonkeyPatch) -> None:
    cpu_runner.install(OURS)
    pristine.setattr(VllmConfig, "_get_v2_model_runner_unsupported_features", lambda self: ["a feature"])
    assert not config_for("OurModel").use_v2_model_runner
    with pytest.raises(ValueError, match="a feature"):
        config_for("OurModel")._validate_v2_model_runner()


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_users_choice_of_runner_wins(pristine: pytest.MonkeyPatch, value: str) -> None:
    cpu_runner.install(OURS)
    pristine.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
    assert config_for("OurModel").use_v2_model_runner is (value == "1")


def test_install_twice_is_install_once(pristine: pytest.MonkeyPatch) -> None:
    cpu_runner.install(OURS)
    once = attributes(VllmConfig, PATCHED)
    cpu_runner.install(OURS)
    cpu_runner.install(frozenset({"AnotherOfOurs"}))
    assert attributes(VllmConfig, PATCHED) == once
    assert config_for("OurModel").use_v2_model_runner
    assert config_for("AnotherOfOurs").use_v2_model_runner


@pytest.mark.parametrize("elsewhere", ["with Triton", "not a CPU"])
def test_nothing_is_patched_elsewhere(pristine: pytest.MonkeyPatch, elsewhere: str) -> None:
    before = attributes(VllmConfig, PATCHED)
    if elsewhere == "with Triton":
        pristine.setattr("vllm.triton_utils.HAS_TRITON", True)
    else:
        pristine.setattr(type(current_platform), "is_cpu", lambda self: False)
    cpu_runner.install(OURS)
    assert attributes(VllmConfig, PATCHED) == before
    assert not cpu_runner._state.installed


def test_an_unknown_vllm_is_an_error_for_ours_only(pristine: pytest.MonkeyPatch) -> None:
    pristine.setattr(VllmConfig, "_validate_v2_model_runner", lambda self, more: None)
    cpu_runner.install(OURS)
    assert not config_for("LlamaForCausalLM").use_v2_model_runner
    with pytest.raises(RuntimeError, match="not a release the plugin was written for"):
        _ = config_for("OurModel").use_v2_model_runner
    with pytest.raises(RuntimeError, match="_validate_v2_model_runner"):
        cpu_runner.check()


def test_a_worker_is_prepared_for_ours_only(pristine: pytest.MonkeyPatch) -> None:
    prepared: list[bool] = []
    pristine.setattr(cpu_runner, "_prepare_worker", lambda: prepared.append(True))
    cpu_runner.install(OURS)
    assert config_for("OurModel").use_v2_model_runner and not prepared  # the front-end
    cpu_runner._state.in_worker = True
    assert not config_for("LlamaForCausalLM").use_v2_model_runner and not prepared
    assert config_for("OurModel").use_v2_model_runner and prepared


# --- the contract with vLLM ---------------------------------------------------------------------------------


def kernel(name: str) -> Any:
    """vLLM's own, even if another test of this process prepared a worker."""
    module, _, attribute = name.rpartition(".")
    found = getattr(import_module(module), attribute)
    return dispatcher._registry[name][0] if isinstance(found, dispatcher.KernelOverride) else found


def test_this_vllm_can_be_patched(pristine: pytest.MonkeyPatch) -> None:
    assert cpu_runner.find_problem(VllmConfig, type(current_platform)) is None


@pytest.mark.parametrize("name", TWINS)
def test_every_twin_binds_to_its_kernel(name: str) -> None:
    launch = cpu_runner.bind(kernel(name), TWINS[name])
    assert tuple(inspect.signature(launch).parameters) == tuple(inspect.signature(kernel(name)).parameters)


def test_ignored_parameters_are_no_twins_parameters() -> None:
    assert not any(IGNORED & inspect.signature(twin).parameters.keys() for twin in TWINS.values())


def test_an_unknown_kernel_parameter_is_refused() -> None:
    def changed(idx_mapping_ptr: Any, num_computed_tokens_ptr: Any, query_start_loc_ptr: Any, more: Any) -> None: ...

    with pytest.raises(RuntimeError, match=r"unknown parameters \['more'\]"):
        cpu_runner.bind(changed, TWINS["vllm.v1.worker.gpu.input_batch._post_update_num_computed_tokens_kernel"])


def test_a_kernel_of_which_nothing_is_read_may_have_any_parameters() -> None:
    def changed(x: Any, logits_indices_ptr: Any, more: Any) -> None: ...

    rows = torch.ones(3, dtype=torch.int64)
    cpu_runner.bind(changed, any_logits_rows)(1, rows, more=2)
    assert not rows.any()
    cpu_runner.bind(changed, unread)(1, rows, more=2)

    def without(x: Any) -> None: ...

    with pytest.raises(RuntimeError, match=r"missing parameters \['logits_indices_ptr'\]"):
        cpu_runner.bind(without, any_logits_rows)


WORKER = """
import json, types, torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm_d2cache.compat import cpu_runner
from vllm_d2cache.compat.cpu_kernels import TWINS
cpu_runner.install(frozenset({"OurModel"}))
current_platform.register_triton_kernel_overrides()
VllmConfig._get_v2_model_runner_unsupported_features = lambda self: []
config = object.__new__(VllmConfig)
config.model_config = types.SimpleNamespace(architectures=["OurModel"])
config.attention_config = types.SimpleNamespace(hisparse_config=None)
before = cpu_runner._state.worker_ready
assert config.use_v2_model_runner
from vllm.triton_utils import dispatcher, triton
import vllm.v1.worker.gpu_worker as gpu_worker
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu import input_batch
tokens = StagedWriteTensor((3, 8), dtype=torch.int32, device=torch.device("cpu"))
tokens.stage_write(2, 1, [7, 8, 9])
tokens.apply_write()
rows = torch.tensor([2, 0])
starts, computed = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([4, 0, 1], dtype=torch.int32)
pos, seq_lens = torch.zeros(6, dtype=torch.int64), torch.ones(3, dtype=torch.int32)
input_batch.prepare_pos_seq_lens(rows, starts, computed, pos, seq_lens)
expanded = input_batch.expand_idx_mapping(rows, 5, starts, 3)
print(json.dumps({
    "ready": [before, cpu_runner._state.worker_ready],
    "missing": sorted(set(TWINS) - set(dispatcher._registry)),
    "next_power_of_2": [triton.next_power_of_2(n) for n in (1, 3, 8)],
    "gate": getattr(gpu_worker, "HAS_TRITON", True),
    "tokens": tokens.gpu.tolist(), "seq_lens": seq_lens.tolist(),
    "expanded": [x.tolist() for x in expanded],
}))
"""


def test_a_prepared_worker_runs_vllms_launchers() -> None:
    """In a process of its own, since vLLM's preparation for CPUs replaces parts of torch."""
    root = str(Path(cpu_runner.__file__).parents[2])
    script = f"import sys; sys.path.insert(0, {root!r})\n{WORKER}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["ready"] == [False, True]
    assert seen["missing"] == []
    assert seen["next_power_of_2"] == [1, 4, 8]
    assert seen["gate"] is True
    assert seen["tokens"] == [[0] * 8, [0] * 8, [0, 7, 8, 9, 0, 0, 0, 0]]
    assert seen["seq_lens"] == [3, 7, 0]
    assert seen["expanded"] == [[2, 2, 0, 0, 0], [0, 1, 0, 1, 2]]


# --- still needed? When one of these fails, delete the patch it names (patches/README.md) -------------------


def test_this_vllm_has_no_triton_on_cpu() -> None:
    assert not HAS_TRITON, "Triton works on this CPU: all of compat/cpu_runner.py is idle here"


def test_vllm_ships_no_twins_of_its_own() -> None:
    stock = inspect.getsource(import_module("vllm.platforms.cpu").CpuPlatform.register_triton_kernel_overrides)
    assert "vllm.v1.worker.gpu." not in stock, "vLLM replaces the kernels itself: drop compat/cpu_kernels.py"
    for name in TWINS:
        assert inspect.isfunction(kernel(name)), f"{name} is no bare Triton kernel any more: drop its twin"


def test_vllms_stand_in_for_triton_lacks_next_power_of_2() -> None:
    from vllm.triton_utils.importing import TritonPlaceholder

    assert not hasattr(TritonPlaceholder(), "next_power_of_2"), "drop the patch of triton.next_power_of_2"


def test_vllm_still_refuses_the_second_runner_without_triton() -> None:
    assert "HAS_TRITON" in inspect.getsource(config_module), "drop the VllmConfig patches"
