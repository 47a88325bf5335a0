"""LoRA adapters in vLLM's layers: whose rows a forward pass has, and rows without an adapter on CPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.output import NewRequestData


def adapter_of(new_request: NewRequestData) -> int:
    """The number of a new request's adapter, 0 for none."""
    return 0 if new_request.lora_request is None else int(new_request.lora_request.lora_int_id)


def set_row_adapters(model: Any, requests: Sequence[int], rows: Sequence[int]) -> None:
    """Tell vLLM's LoRA layers whose rows the next forward pass has.

    vLLM's runner has told them of the rows that it reserved; the adapters themselves are in place by then.

    Args:
        requests: the adapter of each request of the batch, 0 for none.
        rows: the same of each row.
    """
    from vllm.lora.layers import LoRAMapping

    # is_prefill as the runner sets it: requests have any number of rows.
    model.lora_manager.set_adapter_mapping(LoRAMapping(tuple(rows), tuple(requests), is_prefill=True))


def leave_base_rows_alone(model: Any) -> None:
    """Patch the LoRA layers of ``model`` where they are those for CPUs; idempotent."""
    # Without it: rows without an adapter, in a batch with some that have one, get that of the last place: their place
    # is -1, and the layers for CPUs take it for an index. No hook: the wrapper's class is the platform's. Remove when:
    # these layers leave such rows alone, as those for GPUs do.
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for wrapper in model.lora_manager.punica_wrapper_mapping.values():
        if isinstance(wrapper, PunicaWrapperCPU) and "_shrink_prefill" not in vars(wrapper):
            wrapper._shrink_prefill = _plain_where_none(wrapper, wrapper._shrink_prefill)


def _plain_where_none(wrapper: Any, shrink: Callable[..., None]) -> Callable[..., None]:
    """``shrink``, whose result is zero for rows without an adapter: what is made of it then adds nothing."""

    @functools.wraps(shrink)
    def shrunk(y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        shrink(y, x, w_t_all, scale)
        if not wrapper.no_lora:
            y[wrapper.token_lora_indices < 0] = 0

    return shrunk
