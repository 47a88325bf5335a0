"""What the plugin tells vLLM: names and paths, nothing that loads a model. Safe to call twice."""

from __future__ import annotations

# Architecture name -> where vLLM finds the class when a checkpoint asks for it.
ARCHITECTURES = {"LLaDAModelLM": "vllm_d2cache.models.llada:LLaDAModelLM"}


def register_all() -> None:
    """Register configurations, models, the config hook and the patches of patches/README.md."""
    from vllm import ModelRegistry

    from vllm_d2cache.compat import cpu_runner, front_end
    from vllm_d2cache.compat.internals import register_config_class, register_config_hook
    from vllm_d2cache.config_hook import DiffusionConfigHook
    from vllm_d2cache.models.configs import LLaDAConfig

    register_config_class(LLaDAConfig.model_type, LLaDAConfig)
    for architecture, path in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, path)
        register_config_hook(architecture, DiffusionConfigHook)
    cpu_runner.install(frozenset(ARCHITECTURES))
    front_end.install(frozenset(ARCHITECTURES))
