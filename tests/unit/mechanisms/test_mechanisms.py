"""The seam: mechanisms are there for those who use them, and for as long as they do."""

from __future__ import annotations

import pytest
import torch

from tests.unit.batches import Batch, FakeJob
from vllm_d2cache.canvas.states import tensor_bytes
from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.mechanisms.base import FRESH, KEYS, ROWS, Mechanism, conflict
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.policies.budget import uses_of
from vllm_d2cache.requests.resolve import resolve

USING = [name for name, cls in POLICY_CLASSES.items() if cls.uses]


def made(batch: Batch) -> dict[type, Mechanism]:
    return batch.runner.mechanisms._made  # type: ignore[return-value]


@pytest.mark.parametrize("policy", USING)
def test_slot_memory_is_there_while_a_running_request_uses_it(policy: str) -> None:
    batch = Batch(
        [FakeJob([1] * 9, 8, {"policy": policy}) for _ in range(2)] + [FakeJob([1] * 9, 8, {"policy": "full"})]
    )
    batch.add(2)
    assert made(batch) == {}, "nobody uses any"
    batch.add(0)
    batch.add(1)
    (use,) = POLICY_CLASSES[policy].uses
    mechanism = made(batch)[type(use)]
    taken = tensor_bytes(mechanism)
    batch.step([0, 1, 2])
    batch.runner.remove(batch.slot(0))
    assert tensor_bytes(mechanism) == taken
    batch.runner.remove(batch.slot(1))
    assert tensor_bytes(mechanism) == 0
    batch.add(1)
    assert tensor_bytes(mechanism) == taken, "the next one finds it again"
    assert made(batch) == {type(use): mechanism}


@pytest.mark.parametrize("policy", POLICY_CLASSES)
def test_a_step_has_hooks_of_the_mechanisms_that_its_requests_use(policy: str) -> None:
    batch = Batch([FakeJob([1] * 9, 8, {"policy": name}) for name in (policy, "full")])
    batch.add(0)
    batch.add(1)
    slots = [batch.slot(0), batch.slot(1)]
    assert len(batch.runner.open(torch.tensor(slots), slots).hooks) == len(POLICY_CLASSES[policy].uses)
    assert batch.runner.open(torch.tensor(slots[1:]), slots[1:]).hooks == ()


@pytest.mark.parametrize("policy", POLICY_CLASSES)
@pytest.mark.parametrize("decoder", DECODER_CLASSES)
def test_what_goes_together_follows_from_needs_and_takes(policy: str, decoder: str) -> None:
    """A decoder that needs more than a policy leaves is refused, and the message names what would do."""
    policy_class, decoder_class = POLICY_CLASSES[policy], DECODER_CLASSES[decoder]
    taken = policy_class.takes().union(*(use.takes for use in policy_class.uses))
    goes = not any(use.needs & taken for use in decoder_class.uses)
    server = ServerOptions({}, token_frequencies="table.npy")
    if goes:
        options = resolve(server, {"policy": policy, "decoder": decoder})
        assert uses_of(options) == (*policy_class.uses, *decoder_class.uses)
    else:
        with pytest.raises(OptionError, match=f"d2cache_decoder: '{decoder}' .* d2cache_policy '{policy}' .*'full'"):
            resolve(server, {"policy": policy, "decoder": decoder})


def test_every_need_can_be_met_and_every_taking_hurts_somebody() -> None:
    """No word of the vocabulary is dead."""
    uses = [use for classes in (POLICY_CLASSES, DECODER_CLASSES) for cls in classes.values() for use in cls.uses]
    needed = frozenset().union(*(use.needs for use in uses))
    taken = frozenset().union(*(use.takes for use in uses), *(cls.takes() for cls in POLICY_CLASSES.values()))
    assert needed == taken == {KEYS, ROWS, FRESH}


def test_conflicts_name_both_sides() -> None:
    (reads,), (hides,) = POLICY_CLASSES["elastic"].uses, POLICY_CLASSES["streaming"].uses
    assert conflict([reads]) is conflict([hides]) is None
    assert conflict([reads, hides]) == conflict([hides, reads])
    assert conflict([reads, hides]) == "reads drift and hides keys: the one needs keys, which the other takes"
