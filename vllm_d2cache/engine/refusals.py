"""Who refuses a request, and in which order.

1. The front end's request classes, before there are sampling parameters: fields that vLLM would drop
   (requests/dropped_fields.py), a canvas that does not fit behind the prompt (``check_room``), log-probabilities of a
   prompt that comes back (``check_echo``). LLM.beam_search stands here, too.
2. vLLM's own checks of sampling parameters, ours among them (engine/request_check.py): whatever no server could do.
3. ``check_request``, when the prompt has been tokenised: what depends on this server, its model and its options.
4. Snapshots that no stream would send (compat/snapshot_stream.py): only the front end's task knows.

The scheduler admits what has passed when its rows and its memory are free; the worker checks nothing.
"""

from __future__ import annotations

from typing import Any

from vllm_d2cache.engine.memory_plan import check_memory
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.asked import Asked
from vllm_d2cache.requests.fit import check_adapters_fit, check_fit, check_options_fit, check_room
from vllm_d2cache.requests.grammar_regex import check_regex
from vllm_d2cache.requests.grammar_schema import check_schema, check_structural_tag, without_spare_whitespace
from vllm_d2cache.requests.resolve import server_options
from vllm_d2cache.requests.satisfiable import check_satisfiable


def check_request(request: Any, config: Any) -> None:
    """Refuse what this server cannot do.

    Args:
        request: vLLM's EngineCoreRequest, of one of our models, with sampling parameters.
        config: the engine's VllmConfig.

    Raises:
        OptionError: names the field and its valid values.
    """
    params, model = request.sampling_params, config.model_config
    _check_vllm_fields(request, config)
    asked, server = Asked.of(params), server_options(config)
    if asked.constrained:
        _check_grammar(params.structured_outputs, config.structured_outputs_config)
    room = model.max_model_len - len(request.prompt_token_ids)
    check_room("max_tokens", params.max_tokens, room)
    server.check_canvas_length(params.max_tokens)
    options = asked.options(server)
    canvas_len = options.canvas_length(len(request.prompt_token_ids), params.max_tokens)
    if config.lora_config is not None:
        check_adapters_fit(options)
    check_options_fit(options, canvas_len, room, bool(asked.canvas))
    check_fit(params, asked.canvas, model.get_vocab_size(), model.hf_config.mask_token_id)
    check_memory(options, server, config, len(request.prompt_token_ids), canvas_len)


def _check_vllm_fields(request: Any, config: Any) -> None:
    if request.prompt_token_ids is None:
        raise OptionError("prompt_embeds: not supported for diffusion language models; give text or token ids")
    if request.priority != 0 and config.scheduler_config.policy != "priority":
        raise OptionError(
            f"priority: has no effect without --scheduling-policy priority, got {request.priority}; leave it out (0)"
        )


def _check_grammar(wanted: Any, config: Any) -> None:
    """Refuse a grammar that its backend would read otherwise; takes spare whitespace out of structural tags."""
    if wanted.json is not None:
        check_schema(wanted.json, config.backend)
    if wanted.regex is not None and config.backend == "xgrammar":
        check_regex(wanted.regex, "regex")
    if wanted.structural_tag is not None:
        check_structural_tag(wanted.structural_tag, config.backend)
    check_satisfiable(wanted, config.backend)
    if wanted.structural_tag is not None and config.backend == "xgrammar":
        # disable_any_whitespace, which the config hook sets, does not reach it.
        wanted.structural_tag = without_spare_whitespace(wanted.structural_tag)
    if config.reasoning_parser and not config.enable_in_reasoning:
        raise OptionError(
            "structured_outputs: a grammar holds from the first token on, and this server expects reasoning before it "
            f"(--reasoning-parser {config.reasoning_parser}) unless it is started with --structured-outputs-config "
            "'{\"enable_in_reasoning\": true}'"
        )
