"""Fits vLLM's configuration to diffusion models, and refuses what cannot work, before anything is loaded.

vLLM calls this while it builds its configuration, for our architectures only: other models in the same environment
never meet any of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_d2cache.compat import cpu_runner, front_end
from vllm_d2cache.compat.internals import unsupported_version
from vllm_d2cache.config import SECTION, parse_server_options

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

REQUEST_CHECK = "vllm_d2cache.request_check:RequestCheck"
SCHEDULER = "vllm_d2cache.scheduler.D2CacheScheduler"


class DiffusionConfigHook:
    """Registered in vLLM's MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the architecture and have every request checked."""
        problem = unsupported_version()
        if problem:
            raise RuntimeError(problem)
        cpu_runner.check()
        unsupported = model_config.hf_config.unsupported()
        if unsupported:
            raise ValueError("this checkpoint is not supported by vllm-d2cache: " + "; ".join(unsupported))
        front_end.install_length_check(frozenset(model_config.architectures))
        front_end.install_beam_search_check(frozenset(model_config.architectures))
        processors = list(model_config.logits_processors or [])
        if REQUEST_CHECK not in processors:
            model_config.logits_processors = [*processors, REQUEST_CHECK]

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse features that cannot work, then set what stock flags would have to."""
        reasons = _refusals(vllm_config)
        if reasons:
            raise ValueError("vllm-d2cache cannot serve this model with: " + "; ".join(reasons))
        additional = vllm_config.additional_config
        parse_server_options(additional.get(SECTION) if isinstance(additional, dict) else None)
        _configure(vllm_config)


def _refusals(config: VllmConfig) -> list[str]:
    """Every reason at once, so that nobody has to find them one start at a time."""
    import vllm.envs as envs

    parallel = config.parallel_config
    checks = {
        "--pipeline-parallel-size > 1 (the refresh set is only known on the last stage)": (
            parallel.pipeline_parallel_size > 1
        ),
        "--decode-context-parallel-size > 1 (scattered rows need whole block tables)": (
            parallel.decode_context_parallel_size > 1
        ),
        "--prefill-context-parallel-size > 1 (scattered rows need whole block tables)": (
            parallel.prefill_context_parallel_size > 1
        ),
        "--enable-dbo (a step is not split)": parallel.enable_dbo,
        "--kv-transfer-config (keys depend on the whole canvas, they cannot be handed over)": (
            config.kv_transfer_config is not None
        ),
        "--speculative-config (every step decodes anywhere already)": config.speculative_config is not None,
        "--enable-lora (not supported yet)": config.lora_config is not None,
        f"--kv-cache-dtype {config.cache_config.cache_dtype} (only the model's own dtype yet)": (
            config.cache_config.cache_dtype not in ("auto", str(config.model_config.dtype).removeprefix("torch."))
        ),
        f"--logprobs-mode {config.model_config.logprobs_mode} (only raw_logprobs)": (
            config.model_config.logprobs_mode != "raw_logprobs"
        ),
        "VLLM_COMPUTE_NANS_IN_LOGITS, VLLM_RAISE_ON_LOGIT_NANS (the sampler is not vLLM's)": (
            envs.VLLM_COMPUTE_NANS_IN_LOGITS or envs.VLLM_RAISE_ON_LOGIT_NANS
        ),
        "VLLM_USE_V2_MODEL_RUNNER=0 (the plugin lives in Model Runner V2)": envs.VLLM_USE_V2_MODEL_RUNNER is False,
    }
    return [reason for reason, present in checks.items() if present]


def _configure(config: VllmConfig) -> None:
    scheduler, cache = config.scheduler_config, config.cache_config
    max_len = config.model_config.max_model_len
    if cache.enable_prefix_caching:
        # A prompt's keys depend on the canvas behind it.
        logger.info("Prefix caching is off: with bidirectional attention a prefix has no keys of its own.")
    cache.enable_prefix_caching = False
    # A first step computes a whole request at once.
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0
    if scheduler.max_num_batched_tokens < max_len:
        logger.info(
            "max_num_batched_tokens raised from %d to max_model_len=%d.",
            scheduler.max_num_batched_tokens,
            max_len,
        )
        scheduler.max_num_batched_tokens = max_len
    scheduler.scheduler_cls = SCHEDULER
    # CUDA graphs of refresh steps are not supported yet (docs/architecture.md).
    config.model_config.enforce_eager = True
