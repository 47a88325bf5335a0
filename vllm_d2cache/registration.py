"""What the plugin tells vLLM: names and paths, nothing that loads a model. Safe to call twice."""

from __future__ import annotations

from pathlib import Path

# Architecture name -> where vLLM finds the class when a checkpoint asks for it.
ARCHITECTURES = {
    "LLaDAModelLM": "vllm_d2cache.models.llada:LLaDAModelLM",
    "LLaDAMoEModelLM": "vllm_d2cache.models.llada_moe:LLaDAMoEModelLM",
    "DreamModel": "vllm_d2cache.models.dream:DreamModel",
}

# For checkpoints that bring no chat template of their own.
CHAT_TEMPLATES = Path(__file__).parent / "models" / "chat_templates"


def register_all() -> None:
    """Register configurations, tokenizers, models, the config hook and the patches of patches/README.md."""
    from vllm import ModelRegistry

    from vllm_d2cache.compat import cpu_runner, front_end
    from vllm_d2cache.compat.internals import register_chat_template, register_config_class, register_config_hook
    from vllm_d2cache.engine.config_hook import DiffusionConfigHook
    from vllm_d2cache.models.configs import DreamConfig, LLaDAConfig, LLaDAMoEConfig
    from vllm_d2cache.models.tokenizer import register_tokenizers
    from vllm_d2cache.requests.fields import check_fields
    from vllm_d2cache.requests.fit import check_room

    for config in (LLaDAConfig, LLaDAMoEConfig, DreamConfig):
        register_config_class(config.model_type, config)
    for config in (LLaDAConfig, DreamConfig):
        register_chat_template(config.model_type, CHAT_TEMPLATES / f"{config.model_type.lower()}.jinja")
    register_tokenizers()
    for architecture, path in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, path)
        register_config_hook(architecture, DiffusionConfigHook)
    cpu_runner.install(frozenset(ARCHITECTURES))
    front_end.install(frozenset(ARCHITECTURES), front_end.FieldChecks(check_fields, check_room))
