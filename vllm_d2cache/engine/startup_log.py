"""What the engine's log says once, when memory has been laid out: ten lines an operator can read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm_d2cache.engine.memory_plan import Network, graph_rows, plan_memory
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.requests.resolve import resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_EXAMPLE = (512, 256)  # prompt and canvas of the request whose rows are given


def plan_lines(config: VllmConfig, options: ServerOptions, num_kv_blocks: int) -> list[str]:
    """Model, decoding, budget and memory plan of an engine.

    Args:
        num_kv_blocks: KV blocks of this engine, as vLLM has allocated them.
    """
    model, scheduler, parallel = config.model_config, config.scheduler_config, config.parallel_config
    length, slots = model.max_model_len, scheduler.max_num_seqs
    defaults = resolve(options, {})
    block = config.cache_config.block_size
    positions = num_kv_blocks * block
    per_position = _kv_bytes_per_position(config)
    plan = plan_memory(config, options)
    example = Network.of(config).request_bytes(defaults, *_EXAMPLE, options.refresh_budget)
    return [
        f"model: {model.model} ({', '.join(model.architectures)}), {_plain(model.dtype)}, {length} positions a request",
        f"decoding unless a request says otherwise: {_decoding(defaults)}",
        f"budget: {_budget(defaults, options)}",
        f"batch: {slots} requests and {_rows(config, options)}{_pieces(config, options)}",
        f"KV cache: {num_kv_blocks} blocks of {block}, {positions} positions: {positions // length} requests of the "
        f"longest kind; {_mib(num_kv_blocks * block * per_position)} on each of {parallel.tensor_parallel_size} ranks",
        f"memory of running requests: {_mib(plan.requests)} for maps and stored outputs, of which one of "
        f"{_EXAMPLE[0]} + {_EXAMPLE[1]} positions takes {_mib(example)}; canvases {_mib(plan.canvases)}, "
        f"policies {_mib(plan.policies)}, CUDA graphs {_mib(plan.graphs)}",
        f"memory of a step, beside the forward pass: queries {_mib(plan.queries)}, parts of attention "
        f"{_mib(plan.parts)}, copies of rows {_mib(plan.partial)}, then statistics {_mib(plan.statistics)} or rollout "
        f"{_mib(plan.rollout)}",
        f"execution: {_execution(config, options)}",
        "scheduling: " + ("asynchronous" if scheduler.async_scheduling else "synchronous"),
        f"traces: {options.trace_dir} (they hold the prompts' token ids)" if options.trace_dir else "traces: off",
    ]


def _rows(config: VllmConfig, options: ServerOptions) -> str:
    most = config.scheduler_config.max_num_batched_tokens
    part = options.part_rows or most
    return f"{most} rows a step at most" + (f", of which a layer computes {part} at a time" if part < most else "")


def _pieces(config: VllmConfig, options: ServerOptions) -> str:
    """What is done with prompts where a text is cut into blocks."""
    if not options.block_length:
        return ""
    pieces = f"in pieces of {options.prefill_piece} positions" if options.prefill_piece else "at once"
    found = "are found again" if config.cache_config.enable_prefix_caching else "are computed again (no prefix caching)"
    return f"; prompts are computed {pieces}, equal prefixes {found}"


def _decoding(options: RequestOptions) -> str:
    """The policy, and what differs from the published defaults."""
    plain, own = asdict(resolve(ServerOptions({}), {"policy": options.policy})), ("policy_options", "decoder_options")
    said = {k: v for k, v in asdict(options).items() if k not in own and v != plain[k]}
    for name in own:
        said |= {k: v for k, v in getattr(options, name).items() if v != plain[name].get(k)}
    return ", ".join([f"policy {options.policy}", *(f"{k}={v}" for k, v in said.items())])


def _budget(defaults: RequestOptions, options: ServerOptions) -> str:
    prompt, canvas = _EXAMPLE
    rows = row_budget(defaults, prompt, canvas, options.refresh_budget)
    text = f"at most {rows} rows a step for {prompt} + {canvas} positions"
    if options.refresh_budget is None:
        return f"{text}; results are exact"
    return f"{text}; refresh_budget={options.refresh_budget} makes results approximate"


def _execution(config: VllmConfig, options: ServerOptions) -> str:
    rows = graph_rows(config, options)
    if not rows:
        return "eager"
    return f"CUDA graphs for refresh steps of up to {rows} rows, eager for first steps and larger ones"


def _kv_bytes_per_position(config: VllmConfig) -> int:
    """K and V of one position in all layers of a rank."""
    model, parallel = config.model_config, config.parallel_config
    heads, size = model.get_num_kv_heads(parallel), model.get_head_size()
    return 2 * model.get_num_layers(parallel) * heads * size * model.dtype.itemsize


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
