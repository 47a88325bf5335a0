"""The one table of model families: what each architecture's checkpoints need. Names and paths; loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """Where to find what belongs to an architecture; classes are named as ``module:class``.

    Attributes:
        model: the class of the network.
        config: the class that reads config.json.
        model_type: the name of that class in the registries of vLLM and transformers.
        other_types: what config.json may have as ``model_type`` instead. A class of another family that is registered
            under such a name hands over by the architecture.
        chat_template: for checkpoints that bring none; None = such a checkpoint has no chat.
        tokenizer: the class that tokenizer_config.json names and transformers lacks; None = transformers has it.
    """

    model: str
    config: str
    model_type: str
    other_types: tuple[str, ...] = ()
    chat_template: Path | None = None
    tokenizer: str | None = None

    def config_class(self) -> Any:
        """The class that reads config.json: imports torch and transformers."""
        return _load(self.config)

    def model_class(self) -> Any:
        """The class of the network: imports vLLM."""
        return _load(self.model)

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
        chat_template=_CHAT_TEMPLATES / "dream.jinja",
        tokenizer="vllm_d2cache.models.tokenizer:DreamTokenizer",
    ),
}
"""By the name that config.json has under ``architectures``."""
