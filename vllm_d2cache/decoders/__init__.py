"""What to commit in a step. One class a decoder, found by name."""

from __future__ import annotations

from vllm_d2cache.decoders.base import Decoder, DecoderResources, DecoderStep, PredictedRows
from vllm_d2cache.decoders.confidence import ConfidenceDecoder, choose_commits
from vllm_d2cache.decoders.credit import CreditDecoder
from vllm_d2cache.decoders.eb import EbDecoder
from vllm_d2cache.decoders.klass import KlassDecoder
from vllm_d2cache.decoders.pc import PcDecoder
from vllm_d2cache.decoders.scores import ranking_score
from vllm_d2cache.decoders.spread import HierarchicalDecoder, LocalLeapDecoder
from vllm_d2cache.decoders.wino import WinoDecoder

DECODER_CLASSES: dict[str, type[Decoder]] = {
    cls.name: cls
    for cls in (
        ConfidenceDecoder,
        EbDecoder,
        KlassDecoder,
        PcDecoder,
        CreditDecoder,
        HierarchicalDecoder,
        LocalLeapDecoder,
        WinoDecoder,
    )
}

__all__ = [
    "DECODER_CLASSES",
    "Decoder",
    "DecoderResources",
    "DecoderStep",
    "PredictedRows",
    "choose_commits",
    "ranking_score",
]
