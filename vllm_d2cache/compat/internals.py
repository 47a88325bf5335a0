"""The private vLLM names the plugin reads or writes, one small function each.

tests/vllm/test_contract.py checks both halves: that these functions do what they say, and that vLLM still has what
they touch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from vllm_d2cache.options.json_files import object_in
from vllm_d2cache.options.request import SNAPSHOTS
from vllm_d2cache.options.types import OptionError

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

OLDEST = Version("0.31")
NEWEST = Version("0.34")  # exclusive
# How the warning begins that vLLM gives where it captures no CUDA graphs.
SKIPPED_GRAPHS = "Skipping encoder and decoder CUDA graph capture"


def unsupported_version() -> str | None:
    """Why the installed vLLM is outside the tested window, or None."""
    import vllm

    found = Version(vllm.__version__.split("+")[0])
    if OLDEST <= Version(found.base_version) < NEWEST:
        return None
    return f"vllm-d2cache works with vLLM >= {OLDEST} and < {NEWEST}; this is {vllm.__version__}"


def say_nothing_of_skipped_graphs() -> None:
    """Keep vLLM from warning, in this process, that it captures no CUDA graphs and how to have some.

    Those are its own, which stay off for our models (engine/cuda_graphs.py has ours, and the start-up log says which).
    """
    logging.getLogger("vllm.v1.worker.gpu.model_runner").addFilter(_is_no_word_of_skipped_graphs)


def _is_no_word_of_skipped_graphs(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(SKIPPED_GRAPHS)


def register_config_class(model_type: str, cls: type) -> None:
    """Let vLLM read a config.json of this type without remote code, also when it carries an auto_map."""
    from transformers import AutoConfig
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    AutoConfig.register(model_type, cls, exist_ok=True)
    # Membership here is what makes vLLM ignore the checkpoint's auto_map.
    _CONFIG_REGISTRY[model_type] = cls


def register_config_check(model_type: str, check: Callable[[Any], None], longest: Callable[[Any], int | None]) -> None:
    """Have vLLM call ``check`` with a configuration of this type before it computes anything from it.

    By then it is what the operator makes of config.json: ``--hf-overrides`` have been applied. ``longest`` is asked how
    many positions a checked one has by its RoPE's scaling, of which vLLM's releases make different things; None: none.
    """
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    class Checked(ModelArchConfigConvertorBase):
        def convert(self, *args: Any, **kwargs: Any) -> Any:
            check(self.hf_config)
            return super().convert(*args, **kwargs)

        def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
            found, key = super().derive_max_model_len_and_key()
            scaled = longest(self.hf_config)
            return (found, key) if scaled is None else (scaled, key)

    MODEL_ARCH_CONFIG_CONVERTORS[model_type] = Checked


def register_config_hook(architecture: str, hook: type) -> None:
    """Have vLLM call ``hook`` while it builds the configuration for this architecture."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = hook


def register_chat_template(model_type: str, path: Path) -> None:
    """The template for checkpoints of this type that bring none of their own."""
    from vllm.transformers_utils.chat_templates.registry import (
        get_chat_template_fallback_path,
        register_chat_template_fallback_path,
    )

    # Registering twice warns.
    if get_chat_template_fallback_path(model_type, "") is None:
        register_chat_template_fallback_path(model_type, path)


def model_file(model: str, name: str, revision: str | None) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint, from its directory or the hub; empty if it has none.

    Raises:
        ValueError: the file holds something else; names it.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_bytes

    content = get_hf_file_bytes(name, model, revision)
    found = {} if content is None else object_in(content, name)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def loaded(path: str) -> Any:
    """The class of that dotted name, None while its module is not loaded."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def as_validation_error(check: Callable[..., None], *args: Any) -> None:
    """Let vLLM answer with HTTP 400 what ``check`` refuses."""
    from vllm.exceptions import VLLMValidationError

    try:
        check(*args)
    except OptionError as error:
        raise VLLMValidationError(str(error), parameter=str(error).partition(":")[0]) from error


def stop_at_pad(params: SamplingParams, hf_config: Any, tokenizer: Any) -> None:
    """End a text at the tokenizer's pad token, as at another end-of-text token, where the family's models write it.

    Nothing is changed where that is the end-of-text token itself, or where a request ignores it.
    """
    pad = getattr(hf_config if tokenizer is None else tokenizer, "pad_token_id", None)
    if not getattr(hf_config, "pads_behind_text", False) or params.ignore_eos or pad in (None, hf_config.mask_token_id):
        return
    if pad not in params._all_stop_token_ids:
        params._all_stop_token_ids.add(pad)
        params.stop_token_ids = [*(params.stop_token_ids or ()), pad]


def append_canvas(request: Request, mask_token_id: int, length: int) -> None:
    """Make the scheduler see prompt + canvas as the tokens to compute; the output stays empty."""
    request._all_token_ids.extend([mask_token_id] * length)


def place_output_token(request: Request, token_id: int) -> None:
    """Put the next output token where its mask stands."""
    request._all_token_ids[request.num_prompt_tokens + len(request._output_token_ids)] = token_id
    request._output_token_ids.append(token_id)


def cache_when_told(manager: Any) -> None:
    """Have vLLM's KVCacheManager put blocks into the prefix cache by :func:`cache_stored` alone.

    It would do so when it allocates them, masks included.
    """
    original = manager.allocate_slots

    def allocate_slots(*args: Any, **kwargs: Any) -> Any:
        kwargs["delay_cache_blocks"] = True
        return original(*args, **kwargs)

    manager.allocate_slots = allocate_slots


def cache_stored(manager: Any, request: Request, length: int, block_size: int) -> None:
    """Put the blocks of the first ``length`` positions into the prefix cache: their K and V are final."""
    blocks = length // block_size
    hashes = request.block_hashes
    if blocks > len(hashes) and request._block_hasher is not None:
        # It goes on behind the hashes that are there, to the last token, which may be a mask.
        hashes.extend(request._block_hasher(request)[: blocks - len(hashes)])
    manager.cache_blocks(request, min(blocks, len(hashes)) * block_size)


def forget_hashes(request: Request, blocks: int) -> None:
    """Let ``request`` find no more than its first ``blocks`` blocks in the prefix cache."""
    del request.block_hashes[blocks:]


def settle_request_state(req_states: RequestState, slot: int, num_written: int, num_computed: int) -> None:
    """After a request's first step: where output goes, and that later rows are no longer a prefill.

    vLLM appends output tokens at ``total_len`` and takes rows below ``prefill_len`` for prefill; both start at T.

    Args:
        num_written: prompt tokens plus tokens emitted before a preemption.
        num_computed: the count the scheduler rolls back to.
    """
    req_states.total_len.gpu[slot] = num_written
    req_states.prefill_len.np[slot] = num_computed
    req_states.prefill_len.copy_to_uva()


def in_process_runner(llm: LLM) -> Any:
    """The model runner of an engine that runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), on one rank."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def in_process_model_state(llm: LLM) -> Any:
    """Likewise its model state."""
    return in_process_runner(llm).model_state


def set_logits_rows(input_batch: InputBatch, rows: Any) -> None:
    """Which hidden rows the runner hands to the sampler."""
    input_batch.logits_indices = rows


def take_step_report(output: ModelRunnerOutput) -> dict[str, Any]:
    """What D2CacheSampler says of each request of a step, by request id.

    It travels from worker to scheduler where vLLM's sampler puts the number of NaNs in a request's logits: the one
    field of the step's output that a sampler fills and vLLM hands on by request. It is taken out before the scheduler
    looks at it; the config hook refuses to count NaNs.
    """
    report = output.num_nans_in_logits or {}
    output.num_nans_in_logits = None
    return report


def snapshot_output(request_id: str, steps: int, canvas: list[int]) -> EngineCoreOutput:
    """What the engine sends a front end in a step that may have emitted nothing: a canvas after ``steps`` steps.

    It is no output of vLLM's, and must be taken out by :func:`take_snapshot` before vLLM looks at it. It travels where
    vLLM puts the parameters of a KV transfer: the config hook refuses those.
    """
    from vllm.v1.engine import EngineCoreOutput

    snapshot = {"step": steps, "canvas": canvas}
    return EngineCoreOutput(request_id=request_id, new_token_ids=[], kv_transfer_params={SNAPSHOTS: snapshot})


def take_snapshot(output: EngineCoreOutput) -> dict[str, Any] | None:
    """The snapshot that ``output`` is; None if it is one of vLLM's own outputs."""
    params = output.kv_transfer_params
    return None if params is None else params.get(SNAPSHOTS)


# Before what are no names of adapters; none of those can begin so.
_OURS = "\0d2cache/"


def attach_totals(stats: SchedulerStats, totals: Mapping[tuple[str, str], int]) -> None:
    """Send totals by (policy, name) to the front ends.

    They travel in the counts of running LoRA adapters, which the front end fills in behind us and :func:`take_totals`
    leaves to vLLM. No field of the statistics is free, and one more would not survive the way between the processes.
    """
    stats.running_lora_adapters.update({f"{_OURS}{policy}/{name}": value for (policy, name), value in totals.items()})


def take_totals(stats: SchedulerStats) -> dict[tuple[str, str], int]:
    """What :func:`attach_totals` sent, taken out: vLLM's own logger, which comes later, sees adapters alone."""
    carried = stats.running_lora_adapters
    found = {key: carried.pop(key) for key in list(carried) if key.startswith(_OURS)}
    return {
        (policy, name): value
        for key, value in found.items()
        for policy, _, name in [key.removeprefix(_OURS).partition("/")]
    }
