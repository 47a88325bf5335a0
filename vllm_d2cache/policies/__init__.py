"""Cache policies: which positions to recompute. One class a policy, found by name (policies/registry.py).

What the author of a policy needs, in one place; decoders and mechanisms have the same (docs/policies.md).
"""

from vllm_d2cache.canvas.view import CanvasView, canvas_to_positions, positions_to_canvas
from vllm_d2cache.options.request import RequestOptions
from vllm_d2cache.options.types import Choice, Number
from vllm_d2cache.policies.base import CachePolicy, StepOutcome, StepPlan
from vllm_d2cache.policies.registry import POLICY_CLASSES

__all__ = [
    "POLICY_CLASSES",
    "CachePolicy",
    "CanvasView",
    "Choice",
    "Number",
    "RequestOptions",
    "StepOutcome",
    "StepPlan",
    "canvas_to_positions",
    "positions_to_canvas",
]
