"""What the plugin tells vLLM: names and paths, nothing that loads a model. Safe to call twice."""

from __future__ import annotations

from vllm_d2cache.models.families import FAMILIES, Family


def register_all() -> None:
    """Register all families (models/families.py) and the patches of patches/README.md."""
    from vllm_d2cache.compat import cpu_runner, front_end
    from vllm_d2cache.requests.dropped_fields import check_fields
    from vllm_d2cache.requests.fit import check_room

    for architecture, family in FAMILIES.items():
        _register(architecture, family)
    cpu_runner.install(frozenset(FAMILIES))
    front_end.install(frozenset(FAMILIES), front_end.FieldChecks(check_fields, check_room))


def _register(architecture: str, family: Family) -> None:
    """A family's configuration, model, config hook, chat template and tokenizer."""
    from transformers import AutoTokenizer
    from vllm import ModelRegistry

    from vllm_d2cache.compat.internals import register_chat_template, register_config_class, register_config_hook
    from vllm_d2cache.engine.config_hook import DiffusionConfigHook

    config = family.config_class()
    others = [name for name in family.other_types if name not in {f.model_type for f in FAMILIES.values()}]
    for model_type in (family.model_type, *others):
        register_config_class(model_type, config.under(model_type))
        if family.chat_template is not None:
            register_chat_template(model_type, family.chat_template)
    ModelRegistry.register_model(architecture, family.model)
    register_config_hook(architecture, DiffusionConfigHook)
    if family.tokenizer is not None:
        # AutoTokenizer finds the class here, although the checkpoint's auto_map points to remote code.
        AutoTokenizer.register(config, tokenizer_class=family.tokenizer_class(), exist_ok=True)
