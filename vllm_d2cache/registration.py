"""What the plugin tells vLLM: names and paths, nothing that loads a model. Safe to call twice."""

from __future__ import annotations

from typing import Any

from vllm_d2cache.models.config_rules import architecture_problem, family_of
from vllm_d2cache.models.families import FAMILIES, Family


def register_all() -> None:
    """Register all families (models/families.py) and the patches of patches/README.md."""
    from vllm_d2cache.compat import config_files, cpu_runner, front_end
    from vllm_d2cache.models.quantisation import of_separate_file
    from vllm_d2cache.requests.dropped_fields import check_echo, check_fields, check_nested
    from vllm_d2cache.requests.fit import check_room

    for architecture, family in FAMILIES.items():
        _register(architecture, family)
    config_files.install(frozenset(FAMILIES), architecture_problem, of_separate_file, _judge)
    cpu_runner.install(frozenset(FAMILIES))
    front_end.install(frozenset(FAMILIES), front_end.FieldChecks(check_fields, check_nested, check_room, check_echo))


def _judge(content: dict[str, Any]) -> str | None:
    """What a config.json of one of the families says that is not supported; None if there is nothing."""
    found = family_of(content)
    return None if found is None else "; ".join(found[1].config_class().from_dict(content).unsupported()) or None


def _register(architecture: str, family: Family) -> None:
    """A family's configuration, model, config hook, chat template and tokenizer."""
    from transformers import AutoTokenizer
    from vllm import ModelRegistry

    from vllm_d2cache.compat.internals import (
        register_chat_template,
        register_config_check,
        register_config_class,
        register_config_hook,
    )
    from vllm_d2cache.engine.config_hook import DiffusionConfigHook

    config = family.config_class()
    others = [name for name in family.other_types if name not in {f.model_type for f in FAMILIES.values()}]
    for model_type in (family.model_type, *others):
        register_config_class(model_type, config.under(model_type))
        register_config_check(model_type, config.check, config.scaled_positions)
        if family.chat_template is not None:
            register_chat_template(model_type, family.chat_template)
    ModelRegistry.register_model(architecture, family.model)
    register_config_hook(architecture, DiffusionConfigHook)
    if family.tokenizer is not None:
        # AutoTokenizer finds the class here, although the checkpoint's auto_map points to remote code.
        AutoTokenizer.register(config, tokenizer_class=family.tokenizer_class(), exist_ok=True)
