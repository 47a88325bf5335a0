"""Both halves of every assumption about vLLM that compat/internals.py and the config hook rest on."""

from __future__ import annotations

import inspect
import logging
import logging.handlers
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_d2cache.compat import internals
from vllm_d2cache.engine.model_state import D2CacheModelState
from vllm_d2cache.engine.scheduler import D2CacheScheduler
from vllm_d2cache.models.families import FAMILIES
from vllm_d2cache.registration import register_all
from vllm_d2cache.requests.check import _UNSUPPORTED, check_sampling_params

pytestmark = pytest.mark.vllm


def make_request(prompt: list[int], max_tokens: int) -> Request:
    return Request("r", prompt, SamplingParams(max_tokens=max_tokens), None)


def test_canvas_is_appended_behind_the_scheduler_s_back() -> None:
    request = make_request([1, 2, 3], 4)
    internals.append_canvas(request, 9, 4)
    assert request.num_tokens == 7
    assert request.num_prompt_tokens == 3
    assert request.num_output_tokens == 0
    assert list(request.all_token_ids) == [1, 2, 3, 9, 9, 9, 9]
    assert request.prompt_token_ids == [1, 2, 3]


def test_output_replaces_masks_from_the_left() -> None:
    request = make_request([1, 2, 3], 4)
    internals.append_canvas(request, 9, 4)
    for token in (5, 6):
        internals.place_output_token(request, token)
    assert list(request.all_token_ids) == [1, 2, 3, 5, 6, 9, 9]
    assert list(request.output_token_ids) == [5, 6]
    assert request.num_tokens == 7


def hashing_request(tokens: list[int]) -> Any:
    """A request whose blocks of four tokens are hashed."""
    init_none_hash(sha256)
    request = make_request(tokens, 8)
    request._block_hasher = get_request_block_hasher(4, sha256)
    request.update_block_hashes()
    return request


def test_only_what_is_stored_gets_into_the_prefix_cache() -> None:
    request, told = hashing_request(list(range(6))), []
    manager = SimpleNamespace(
        allocate_slots=lambda *args, **kwargs: kwargs, cache_blocks=lambda _, length: told.append(length)
    )
    internals.cache_when_told(manager)
    assert manager.allocate_slots(request, 4, delay_cache_blocks=False) == {"delay_cache_blocks": True}
    internals.append_canvas(request, 9, 10)
    assert len(request.block_hashes) == 1
    for length in (3, 4, 9):
        internals.cache_stored(manager, request, length, 4)
    # No block beyond what is stored is hashed: the masks of the last one are there already.
    assert told == [0, 4, 8]
    assert request.block_hashes == hashing_request([*range(6), 9, 9]).block_hashes
    internals.forget_hashes(request, 1)
    assert request.block_hashes == hashing_request(list(range(6))).block_hashes


def test_vllm_lets_a_scheduler_say_when_blocks_are_cached_and_how_much_is_computed() -> None:
    allocate = inspect.signature(KVCacheManager.allocate_slots).parameters
    assert allocate["delay_cache_blocks"].default is False
    assert [*inspect.signature(KVCacheManager.cache_blocks).parameters][1:3] == ["request", "num_computed_tokens"]
    split = [*inspect.signature(Scheduler._mamba_block_aligned_split).parameters]
    assert split[1:3] == ["request", "num_new_tokens"]
    source = inspect.getsource(Scheduler.schedule)
    assert source.count("if self.need_mamba_block_aligned_split:") == 2
    assert source.count("self._preempt_request(") >= 1
    assert "num_computed_tokens_np" in InputBatch.__annotations__


def test_registering_twice_is_registering_once() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    register_all()
    before = (dict(MODELS_CONFIG_MAP), len(_CONFIG_REGISTRY), ModelRegistry.get_supported_archs())
    register_all()
    assert (dict(MODELS_CONFIG_MAP), len(_CONFIG_REGISTRY), ModelRegistry.get_supported_archs()) == before
    assert set(FAMILIES) <= set(ModelRegistry.get_supported_archs())
    assert {"llada", "Dream"} <= set(_CONFIG_REGISTRY)


def test_installed_vllm_is_inside_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    assert internals.unsupported_version() is None
    for version, refused in {"0.30.9": True, "0.31.0": False, "0.33.2+cpu": False, "0.34.0": True}.items():
        monkeypatch.setattr(vllm, "__version__", version)
        assert (internals.unsupported_version() is not None) == refused, version


def test_scheduler_overrides_what_vllm_has() -> None:
    own = [name for name, value in vars(D2CacheScheduler).items() if inspect.isfunction(value)]
    private = {"_admissible", "_later", "_snapshots", "_stops"}
    for name in set(own) - private:
        assert hasattr(AsyncScheduler, name), name
    assert "num_computed_tokens" in inspect.getsource(Scheduler._update_after_schedule)
    assert "self.max_num_active_reqs" in inspect.getsource(Scheduler.schedule)


def test_model_state_has_every_hook_with_vllm_s_parameters() -> None:
    for name in ("add_request", "remove_request", "preprocess_state", "prepare_attn", "prepare_inputs"):
        ours = inspect.signature(getattr(D2CacheModelState, name))
        theirs = inspect.signature(getattr(ModelState, name))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_request_state_is_settled_in_vllm_s_own_class() -> None:
    from vllm.v1.worker.gpu.states import RequestState

    source = inspect.getsource(RequestState)
    assert all(f"self.{name} = " in source for name in ("total_len", "prefill_len", "num_computed_tokens_np"))
    prefill = SimpleNamespace(np=torch.tensor([40, 40]).numpy(), copies=0)
    prefill.copy_to_uva = lambda: setattr(prefill, "copies", prefill.copies + 1)
    states = SimpleNamespace(total_len=SimpleNamespace(gpu=torch.tensor([40, 40])), prefill_len=prefill)
    internals.settle_request_state(states, 1, 12, 30)
    assert states.total_len.gpu.tolist() == [40, 12]
    assert prefill.np.tolist() == [40, 30]
    assert prefill.copies == 1


def test_vllm_s_warning_of_skipped_graphs_is_kept_back_and_nothing_else() -> None:
    from vllm.v1.worker.gpu import model_runner

    assert internals.SKIPPED_GRAPHS in inspect.getsource(model_runner.GPUModelRunner.capture_model)
    name = model_runner.logger.name
    logger = logging.getLogger(name)
    assert name == "vllm.v1.worker.gpu.model_runner"
    seen = logging.handlers.BufferingHandler(100)
    logger.addHandler(seen)
    before = list(logger.filters)
    try:
        internals.say_nothing_of_skipped_graphs()
        internals.say_nothing_of_skipped_graphs()
        logger.warning(f"{internals.SKIPPED_GRAPHS}. To enable %s", "it")
        logger.warning("Skipping dinner")
        assert [record.msg for record in seen.buffer] == ["Skipping dinner"]
        assert len(logger.filters) == len(before) + 1
    finally:
        logger.removeHandler(seen)
        logger.filters[:] = before


@pytest.mark.parametrize("field", sorted(_UNSUPPORTED))
def test_unsupported_fields_exist_and_default_to_unused(field: str) -> None:
    """A field that vLLM renames would be accepted and ignored."""
    assert hasattr(SamplingParams(), field), field
    check_sampling_params(SamplingParams(max_tokens=4), False)


def test_no_sampling_field_is_unknown_to_us() -> None:
    """Fails when vLLM adds a sampling parameter: decide whether it is honoured, harmless or refused."""
    honoured = {"n", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens"}
    honoured |= {"logprobs", "min_tokens", "logit_bias", "allowed_token_ids", "bad_words"}
    honoured |= {"presence_penalty", "frequency_penalty", "repetition_penalty", "structured_outputs"}
    of_the_front_end = {
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        "flat_logprobs",
        "extra_args",
    }
    without_meaning_here = {
        "watermarking",  # refused by vLLM itself: a custom sampler cannot be watermarked
        "skip_reading_prefix_cache",  # there is none
        "prompt_logprob_start",  # only with prompt_logprob_token_ids, which is refused
        "routed_experts_prompt_start",  # mixture-of-experts introspection
    }
    known = honoured | of_the_front_end | without_meaning_here | set(_UNSUPPORTED)
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields <= known, fields - known
