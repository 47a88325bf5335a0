"""Decoders: what to commit in a step. One class a decoder, found by name (decoders/registry.py)."""

from vllm_d2cache.decoders.base import Commits, Decoder, DecoderStep, PredictedRows, rank_candidates, take_best
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.options.types import Choice, Number

__all__ = [
    "DECODER_CLASSES",
    "Choice",
    "Commits",
    "Decoder",
    "DecoderStep",
    "Number",
    "PredictedRows",
    "rank_candidates",
    "take_best",
]
