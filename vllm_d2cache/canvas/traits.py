"""What the decoding loop must know of a model family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyTraits:
    """Facts of a family that no tensor shows (docs/methods/d2cache.md, section 9).

    Attributes:
        mask_token_id: the token a canvas starts from.
        logit_shift: canvas slot g reads the logits of position P + g - logit_shift.
        step_schedule: what the option ``steps`` means (decoders/schedule.py): ``even`` as LLaDA's code has it,
            ``timestep`` as Dream's.
        num_layers: of the network, for policies that treat its layers differently.
        family: its name, for policies with published settings for each.
        block_length: a row sees its own block of so many positions and all earlier ones; None = it sees all positions.
    """

    mask_token_id: int
    logit_shift: int = 0
    step_schedule: str = "even"
    num_layers: int = 1
    family: str = "llada"
    block_length: int | None = None
