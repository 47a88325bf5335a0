"""The one table of model families: what each architecture's checkpoints need. Names and paths; loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"
_CHATML = _CHAT_TEMPLATES / "chatml.jinja"
_NO_BLOCKS = "block-causal attention (a row sees its own block of positions and all earlier ones) is not built yet"


@dataclass(frozen=True)
class Family:
    """Where to find what belongs to an architecture; classes are named as ``module:class``.

    Attributes:
        model: the class of the network.
        config: the class that reads config.json.
        model_type: the name of that class in the registries of vLLM and transformers.
        other_types: what config.json may have as ``model_type`` instead. The class of another family with that name
            hands over by the architecture.
        chat_template: for checkpoints that bring none; None = such a checkpoint has no chat.
        tokenizer: the class that tokenizer_config.json names and transformers lacks; None = transformers has it.
        unserved: why no checkpoint of the family can be served yet; None = they are.
    """

    model: str
    config: str
    model_type: str
    other_types: tuple[str, ...] = ()
    chat_template: Path | None = None
    tokenizer: str | None = None
    unserved: str | None = None

    def config_class(self) -> Any:
        """The class that reads config.json: imports torch and transformers."""
        return _load(self.config)

    def tokenizer_class(self) -> Any:
        """The tokenizer's own class, or None: imports torch and transformers."""
        return None if self.tokenizer is None else _load(self.tokenizer)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


FAMILIES = {
    "LLaDAModelLM": Family(
        model="vllm_d2cache.models.llada:LLaDAModelLM",
        config="vllm_d2cache.models.configs:LLaDAConfig",
        model_type="llada",
        chat_template=_CHAT_TEMPLATES / "llada.jinja",
    ),
    "LLaDAMoEModelLM": Family(
        model="vllm_d2cache.models.llada_moe:LLaDAMoEModelLM",
        config="vllm_d2cache.models.configs:LLaDAMoEConfig",
        model_type="lladamoe",
        other_types=("llada",),
    ),
    "DreamModel": Family(
        model="vllm_d2cache.models.dream:DreamModel",
        config="vllm_d2cache.models.configs:DreamConfig",
        model_type="Dream",
        chat_template=_CHATML,
        tokenizer="vllm_d2cache.models.tokenizer:DreamTokenizer",
    ),
    "SDARForCausalLM": Family(
        model="vllm_d2cache.models.sdar:SDARForCausalLM",
        config="vllm_d2cache.models.block_configs:SDARConfig",
        model_type="sdar",
        chat_template=_CHATML,
        unserved=_NO_BLOCKS,
    ),
    "SDARMoeForCausalLM": Family(
        model="vllm_d2cache.models.sdar:SDARMoeForCausalLM",
        config="vllm_d2cache.models.block_configs:SDARMoeConfig",
        model_type="sdar_moe",
        chat_template=_CHATML,
        unserved=_NO_BLOCKS,
    ),
    "LLaDA2MoeModelLM": Family(
        model="vllm_d2cache.models.llada2:LLaDA2MoeModelLM",
        config="vllm_d2cache.models.block_configs:LLaDA2Config",
        model_type="llada2_moe",
        other_types=("llada21_moe", "llada2_moe_veomni"),
        chat_template=_CHAT_TEMPLATES / "llada2.jinja",
        unserved=_NO_BLOCKS,
    ),
    "Fast_dLLM_QwenForCausalLM": Family(
        model="vllm_d2cache.models.fast_dllm_v2:Fast_dLLM_QwenForCausalLM",
        config="vllm_d2cache.models.block_configs:FastDLLMv2Config",
        model_type="Fast_dLLM_Qwen",
        chat_template=_CHATML,
        unserved=_NO_BLOCKS,
    ),
}
"""By the name that config.json has under ``architectures``."""
