"""Fits vLLM's configuration to diffusion models, and refuses what cannot work, before anything is loaded.

vLLM calls this while it builds its configuration, for our architectures only: other models in the same environment
never meet any of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_d2cache.compat import broken_bodies, cpu_runner, front_end
from vllm_d2cache.compat.internals import model_file, unsupported_version
from vllm_d2cache.decoders.frequencies import load_frequencies
from vllm_d2cache.engine.changes import log_change
from vllm_d2cache.engine.part_rows import configure_parts
from vllm_d2cache.engine.prefill import configure_pieces
from vllm_d2cache.engine.refusals import check_request
from vllm_d2cache.options.request import SECTION
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.dropped_fields import check_echo, check_fields, check_nested
from vllm_d2cache.requests.fit import check_room
from vllm_d2cache.requests.generation_defaults import default_problems, read_generation_defaults
from vllm_d2cache.requests.resolve import parse_server_options

if TYPE_CHECKING:
    from vllm.config import ModelConfig, StructuredOutputsConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

REQUEST_CHECK = "vllm_d2cache.engine.request_check:RequestCheck"
SCHEDULER = "vllm_d2cache.engine.scheduler.D2CacheScheduler"
# Those that hand a checkpoint's tensors to the model class, which looks for NaN among them; the others fill vLLM's own
# layers past it.
LOAD_FORMATS = (
    *("auto", "bitsandbytes", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt"),
    "runai_streamer",
    "dummy",  # no checkpoint at all
)
# The engines of structured output that are tested.
GRAMMAR_BACKENDS = ("xgrammar", "guidance")
# Longest request, prompt and canvas, unless --max-model-len says otherwise: a first step computes all of it, and memory
# for its rows is set aside (docs/performance.md). Dream's config.json promises 131072 positions. Texts in blocks are
# computed in pieces, and have no such limit.
DEFAULT_MAX_MODEL_LEN = 8192


class DiffusionConfigHook:
    """Registered in vLLM's MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the architecture and have every request checked."""
        problem = unsupported_version()
        if problem:
            raise RuntimeError(problem)
        cpu_runner.check()
        _check_checkpoint(model_config)
        whole = model_config.hf_config.traits().block_length is None
        if whole and model_config.original_max_model_len is None and model_config.max_model_len > DEFAULT_MAX_MODEL_LEN:
            logger.info(
                "max_model_len is %d instead of the checkpoint's %d: memory is set aside for a first step of that many "
                "rows. --max-model-len sets another.",
                DEFAULT_MAX_MODEL_LEN,
                model_config.max_model_len,
            )
            model_config.max_model_len = DEFAULT_MAX_MODEL_LEN
        ours = frozenset(model_config.architectures)
        _whole_blocks(model_config)
        broken_bodies.install(ours)
        front_end.install_request_check(ours, check_request)
        front_end.install_beam_search_check(
            ours, front_end.FieldChecks(check_fields, check_nested, check_room, check_echo)
        )
        processors = list(model_config.logits_processors or [])
        if REQUEST_CHECK not in processors:
            model_config.logits_processors = [*processors, REQUEST_CHECK]

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse features that cannot work, then set what stock flags would have to."""
        reasons = _refusals(vllm_config)
        if reasons:
            raise ValueError("vllm-d2cache cannot serve this model with: " + "; ".join(reasons))
        model = vllm_config.model_config
        if note := model.hf_config.quantisation_note(model.quantization):
            logger.info("vllm-d2cache: %s", note)
        additional = vllm_config.additional_config
        section = additional.get(SECTION) if isinstance(additional, dict) else None
        family = _family_defaults(vllm_config.model_config, section)
        options = parse_server_options({**family, **section} if isinstance(section, dict) else section or family)
        chosen = vllm_config.scheduler_config.max_num_batched_tokens
        _configure_steps(vllm_config)
        if isinstance(additional, dict):
            # Where the scheduler and the workers read the options, too; what the operator set wins.
            defaults = {**family, **_generation_defaults(vllm_config.model_config)}
            graphs = _without_graphs(vllm_config, options)
            fitted = {**configure_pieces(vllm_config, options), **configure_parts(vllm_config, options, chosen)}
            vllm_config.additional_config = {**additional, SECTION: {**defaults, **(section or {}), **graphs, **fitted}}
            options = parse_server_options(vllm_config.additional_config[SECTION])
        front_end.note_longest(vllm_config.model_config, options.max_canvas)
        if options.token_frequencies is not None:
            load_frequencies(options.token_frequencies, vllm_config.model_config.hf_config.vocab_size)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        _configure_grammars(vllm_config.structured_outputs_config)
        _set_execution(vllm_config)


def _whole_blocks(model_config: ModelConfig) -> None:
    """The block in which a text ends is computed whole, and must have its place."""
    block = model_config.hf_config.traits().block_length
    if block is None or model_config.max_model_len % block == 0:
        return
    whole = model_config.max_model_len // block * block
    if not whole:
        raise ValueError(f"--max-model-len {model_config.max_model_len}: must be at least {block}, one block")
    log_change(f"max_model_len is {whole}, not {model_config.max_model_len}", f"whole blocks of {block} positions")
    model_config.max_model_len = whole


def _family_defaults(model_config: ModelConfig, section: Any) -> dict[str, Any]:
    """Options that a family brings. A block length in ``section`` is ours, where vLLM builds a configuration again."""
    traits = model_config.hf_config.traits()
    if traits.block_length is None:
        for name in ("block_length", "prefill_piece"):
            if isinstance(section, dict) and section.get(name):
                raise ValueError(
                    f'additional_config["{SECTION}"]["{name}"]: is for models whose text is cut into blocks; leave it '
                    f"out, got {section[name]!r}"
                )
        return {}
    said = section.get("block_length", traits.block_length) if isinstance(section, dict) else traits.block_length
    if said != traits.block_length:
        raise ValueError(
            f'additional_config["{SECTION}"]["block_length"]: is set by the plugin ({traits.block_length} with this '
            f"model); leave it out, got {said!r}"
        )
    return {**model_config.hf_config.decoding_defaults(), "block_length": traits.block_length}


def _check_checkpoint(model_config: ModelConfig) -> None:
    """Refuse what the network does not compute; vLLM asked before, where its type of configuration is one of ours."""
    config = model_config.hf_config
    if not hasattr(config, "supported_values"):  # another's: --hf-overrides may change the architecture alone
        raise ValueError(f"vllm-d2cache cannot read a config.json with model_type={config.model_type!r}")
    config.check()
    tokenizer = model_file(model_config.tokenizer, "tokenizer_config.json", model_config.tokenizer_revision)
    problem = config.mask_contradiction(tokenizer) or config.unserved_problem()
    if problem is not None:
        raise ValueError(problem)
    for note in config.notes():
        logger.info("config.json: %s", note)


def _refusals(config: VllmConfig) -> list[str]:
    """Every reason at once, so that nobody has to find them one start at a time."""
    import vllm.envs as envs
    from vllm.config.compilation import CompilationMode

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
        "--data-parallel-size > 1 with a mixture of experts (its ranks agree beforehand on how many rows each has, and "
        "what a step refreshes is known in the step; --tensor-parallel-size N, or N servers)": (
            parallel.data_parallel_size > 1 and config.model_config.hf_config.shape().mixture is not None
        ),
        "--kv-transfer-config (keys depend on the whole canvas, they cannot be handed over)": (
            config.kv_transfer_config is not None
        ),
        "--speculative-config (every step decodes anywhere already)": config.speculative_config is not None,
        "--enable-lora (adapters of mixtures of experts are not tried)": (
            config.lora_config is not None and config.model_config.hf_config.shape().mixture is not None
        ),
        "--enable-sleep-mode (K and V of running requests would be dropped while their canvases stay)": (
            config.model_config.enable_sleep_mode
        ),
        f"--load-format {config.load_config.load_format} (damaged weights would not be noticed; supported: "
        f"{', '.join(LOAD_FORMATS)})": config.load_config.load_format not in LOAD_FORMATS,
        f"--kv-cache-dtype {config.cache_config.cache_dtype} (attention reads pages of the model's own dtype)": (
            config.cache_config.cache_dtype not in ("auto", str(config.model_config.dtype).removeprefix("torch."))
        ),
        "--cudagraph-capture-sizes, --max-cudagraph-capture-size (refresh steps have graphs of their own sizes: set "
        '--additional-config \'{"d2cache": {"graph_rows": N}}\' instead)': bool(
            config.compilation_config.cudagraph_capture_sizes or config.compilation_config.max_cudagraph_capture_size
        ),
        "-cc.mode=stock_torch_compile (it compiles the whole model, whose steps differ; -cc.mode=vllm_compile compiles "
        "the layers)": config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE,
        f"--logprobs-mode {config.model_config.logprobs_mode} (only raw_logprobs)": (
            config.model_config.logprobs_mode != "raw_logprobs"
        ),
        f"structured output backend {config.structured_outputs_config.backend} (xgrammar or guidance)": (
            config.structured_outputs_config.backend not in ("auto", *GRAMMAR_BACKENDS)
        ),
        "VLLM_COMPUTE_NANS_IN_LOGITS, VLLM_RAISE_ON_LOGIT_NANS (the sampler is not vLLM's)": (
            envs.VLLM_COMPUTE_NANS_IN_LOGITS or envs.VLLM_RAISE_ON_LOGIT_NANS
        ),
        "VLLM_USE_V2_MODEL_RUNNER=0 (the plugin lives in Model Runner V2)": envs.VLLM_USE_V2_MODEL_RUNNER is False,
    }
    quantised = config.model_config.hf_config.quantisation_problem(config.model_config.quantization)
    return [*([quantised] if quantised else []), *(reason for reason, present in checks.items() if present)]


def _generation_defaults(model_config: ModelConfig) -> dict[str, Any]:
    """Options from the checkpoint's generation_config.json, as ``--generation-config`` and its override have it."""
    source = model_config.generation_config
    own = source in ("auto", "vllm")
    directory = (model_config.hf_config_path or model_config.model) if own else source
    content = model_file(directory, "generation_config.json", model_config.revision)
    # vLLM takes the end tokens from the file even where the operator wants none of its defaults.
    raw = {} if source == "vllm" else content
    unreadable = model_config.hf_config.generation_problems(content)
    problems = default_problems(raw, model_config.override_generation_config, unreadable)
    if problems:
        raise ValueError("vllm-d2cache cannot serve this model with: " + "; ".join(problems))
    found = read_generation_defaults({**raw, **model_config.override_generation_config})
    if model_config.hf_config.traits().block_length:
        # These take confidences from all of the distribution; vLLM gives every request the file's top_p.
        found.options.pop("confidence_top_p", None)
    if found.options:
        logger.info("Defaults from generation_config.json: %s", found.options)
    if found.ignored:
        ignored = "; ".join(f"{key}={value}" for key, value in found.ignored.items())
        logger.info("Ignored in generation_config.json: %s", ignored)
    return found.options


def _configure_steps(config: VllmConfig) -> None:
    """Have a first step computed whole where rows see all positions; every change of a default is logged."""
    scheduler, cache = config.scheduler_config, config.cache_config
    max_len = config.model_config.max_model_len
    if not config.model_config.hf_config.traits().block_length:
        if cache.enable_prefix_caching:
            log_change("prefix caching is off", "with bidirectional attention a prefix has no keys of its own")
        cache.enable_prefix_caching = False
        if scheduler.enable_chunked_prefill:
            log_change("chunked prefill is off", "a request's first step computes all of its positions")
        scheduler.enable_chunked_prefill = False
        scheduler.long_prefill_token_threshold = 0
    if not scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < max_len:
        change = f"max_num_batched_tokens is {max_len}, not {scheduler.max_num_batched_tokens}"
        log_change(change, "a request's first step computes all of its positions, up to max_model_len")
        scheduler.max_num_batched_tokens = max_len


def _set_execution(config: VllmConfig) -> None:
    """The network runs as written unless the operator chooses ``-cc.mode``; CUDA graphs are ours (cuda_graphs.py)."""
    from vllm.config.compilation import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform

    compiled = config.compilation_config.mode not in (None, CompilationMode.NONE)
    if current_platform.is_cuda_alike():
        mode = config.compilation_config.cudagraph_mode
        if mode not in (None, CUDAGraphMode.NONE):
            log_change(f"vLLM's CUDA graphs are off, not {mode.name}", "refresh steps have graphs of their own")
        config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        if not compiled:
            # vLLM would compile by default: seconds to minutes of a start, for a gain that nobody has measured here.
            config.compilation_config.mode = CompilationMode.NONE
        return
    if compiled:
        return
    if not config.model_config.enforce_eager:
        log_change("execution is eager", f"there are no CUDA graphs on {current_platform.device_type}")
    config.model_config.enforce_eager = True


def _configure_grammars(config: StructuredOutputsConfig) -> None:
    if config.backend == "auto":
        # With auto each request chooses its backend, but an engine has one, that of its first request: what another one
        # was chosen for would be ignored.
        config.backend = GRAMMAR_BACKENDS[0]
        log_change(f"structured output is by {GRAMMAR_BACKENDS[0]}, not auto", "an engine has one backend for all")
    if not config.disable_any_whitespace:
        config.disable_any_whitespace = True
        log_change("structured output is JSON without spare whitespace", "whitespace without end would fill a canvas")


def _without_graphs(config: VllmConfig, options: ServerOptions) -> dict[str, int]:
    """Options that switch CUDA graphs off where they cannot be, or where the operator has said so in vLLM's words."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.config.vllm import OptimizationLevel
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike() or config.model_config.enforce_eager or not options.graph_rows:
        return {}
    backend = options.attention_backend or "triton"
    # vLLM builds a configuration again from one that has been here: then it is our own word.
    ours = config.scheduler_config.scheduler_cls == SCHEDULER
    reasons = {
        "-cc.cudagraph_mode=none": config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE and not ours,
        "-O0: nothing is made faster at the cost of the start": config.optimization_level == OptimizationLevel.O0,
        f"attention_backend {backend} reads the batch on the host": backend != "triton",
        "--enable-lora: graphs know no adapters": config.lora_config is not None,
        "--data-parallel-size > 1: the ranks agree on every step": config.parallel_config.data_parallel_size > 1,
    }
    found = [reason for reason, present in reasons.items() if present]
    if not found:
        return {}
    log_change("there are no CUDA graphs", "; ".join(found))
    return {"graph_rows": 0}
