"""A patch of vLLM's reading of config.json: one sentence where a checkpoint is of nobody's family."""

from __future__ import annotations

import functools
from typing import Any

from vllm_d2cache.compat.internals import model_file
from vllm_d2cache.models.config_rules import architecture_problem, names_of
from vllm_d2cache.models.families import FAMILIES

_MARK = "_vllm_d2cache"


def install() -> None:
    """Wrap ``HFConfigParser.parse``; idempotent. Called in every process."""
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
            found = original(self, model, *args, **kwargs)
        except Exception:
            reason = _whose(model, kwargs.get("revision"))
            if reason is None:
                raise
        else:
            content, config = found
            if hasattr(config, "check") and not isinstance(content.get("quantization_config"), dict | None):
                config.check()  # vLLM takes it for an object before it asks anybody
            return found
        raise ValueError(f"this checkpoint cannot be served: {reason}")

    setattr(parse, _MARK, True)
    HFConfigParser.parse = parse


def _whose(model: Any, revision: str | None) -> str | None:
    """Why a config.json that could not be read is nobody's; None if it may be somebody's."""
    from vllm import ModelRegistry

    try:
        config = model_file(str(model), "config.json", revision)
    except Exception:  # then the reader's own error says more
        return None
    names = set(names_of(config.get("architectures")))
    if not names or names & (set(ModelRegistry.get_supported_archs()) - set(FAMILIES)):
        return None
    return architecture_problem(config["architectures"], config.get("model_type"))
