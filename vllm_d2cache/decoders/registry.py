"""Decoders by name (options/plugins.py). Loading the table loads no decoder, and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_d2cache.options.plugins import Plugins, discover

if TYPE_CHECKING:
    from vllm_d2cache.decoders.base import Decoder

GROUP = "vllm_d2cache.decoders"

BUILT_IN = {
    "confidence": "vllm_d2cache.decoders.confidence:ConfidenceDecoder",
    "eb": "vllm_d2cache.decoders.eb:EbDecoder",
    "klass": "vllm_d2cache.decoders.klass:KlassDecoder",
    "pc": "vllm_d2cache.decoders.pc:PcDecoder",
    "credit": "vllm_d2cache.decoders.credit:CreditDecoder",
    "hierarchical": "vllm_d2cache.decoders.spread:HierarchicalDecoder",
    "localleap": "vllm_d2cache.decoders.spread:LocalLeapDecoder",
    "wino": "vllm_d2cache.decoders.wino:WinoDecoder",
}


def _problem(cls: Any) -> str | None:
    from vllm_d2cache.decoders.base import Decoder
    from vllm_d2cache.mechanisms.base import conflict

    if not (isinstance(cls, type) and issubclass(cls, Decoder)):
        return "is not a subclass of vllm_d2cache.decoders.Decoder"
    return conflict(cls.uses)


DECODER_CLASSES: Plugins[Decoder] = Plugins("decoder", discover(GROUP, BUILT_IN), _problem)
