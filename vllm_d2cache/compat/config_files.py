"""A patch of vLLM's reading of config.json: one sentence where a checkpoint is of nobody's family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_d2cache.compat.internals import model_file

_MARK = "_vllm_d2cache"
Problem = Callable[[object, object], str | None]
Quantised = Callable[[Callable[[str], dict[str, Any]]], dict[str, Any] | None]


def install(
    ours: frozenset[str], problem: Problem, quantised: Quantised, judge: Callable[[dict[str, Any]], str | None]
) -> None:
    """Wrap ``HFConfigParser.parse``; idempotent. Called in every process.

    Args:
        ours: the architectures of this package.
        judge: what in the content of a config.json of ours is not supported, or None.
        quantised: given what reads a JSON file of the checkpoint by its name, the quantization_config that another file
            than config.json stands for, or None.
        problem: why a checkpoint with these ``architectures`` and this ``model_type`` is none of ours, or None.
    """
    # Without it: a checkpoint whose family neither vLLM nor this package has ends in pages of tracebacks, the last of
    # which advises to trust its code. No hook: a parser of our own would have to be named by --config-format. Remove
    # when: vLLM asks somebody before it gives up on a config.json.
    from vllm.transformers_utils.config import HFConfigParser

    original = HFConfigParser.parse
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def parse(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            content, config = original(self, model, *args, **kwargs)
        except Exception:
            content = _content(model, kwargs.get("revision"))
            reason = _whose(content, ours, problem)
            if reason is None and _named(content) & ours:
                reason = judge(content)  # what transformers stumbles over may have a name
            if reason is None:
                raise
        else:
            if not _named(content) & ours:
                return content, config
            reason = problem(content["architectures"], content.get("model_type"))
            if content.get("quantization_config") is None:
                # vLLM looks there only where the operator names the method.
                found = quantised(lambda name: model_file(str(model), name, kwargs.get("revision")))
                if found is not None:
                    content["quantization_config"] = config.quantization_config = found
            if reason is None and not isinstance(content.get("quantization_config"), dict | None):
                config.check()  # vLLM takes it for an object before it asks anybody
            if reason is None or kwargs.get("hf_overrides"):
                return content, config
        raise ValueError(f"this checkpoint is not supported by vllm-d2cache: {reason}")

    setattr(parse, _MARK, True)
    HFConfigParser.parse = parse


def _content(model: Any, revision: str | None) -> dict[str, Any]:
    """config.json; empty where it cannot be read: then the reader's own error says more."""
    try:
        return model_file(str(model), "config.json", revision)
    except Exception:
        return {}


def _whose(content: dict[str, Any], ours: frozenset[str], problem: Problem) -> str | None:
    """Why a config.json that could not be read is nobody's; None if it may be somebody's."""
    from vllm import ModelRegistry

    names = _named(content)
    if not names or names & (set(ModelRegistry.get_supported_archs()) - ours):
        return None
    return problem(content["architectures"], content.get("model_type"))


def _named(content: Any) -> set[str]:
    names = content.get("architectures") if isinstance(content, dict) else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
