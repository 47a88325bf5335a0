"""How often a step and an admission make the host wait for a GPU, and what they copy to it: counted without one.

Requests with every policy and decoder that is registered run on the pretended device, layers and hooks included, at
several batches. What is counted is the worst of some steps after the first, and the admission of one request beside
others.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.count.network import LAYERS, VOCAB, Network
from benchmarks.count.pretended import CUDA, Asked, pretended_device
from vllm_d2cache.canvas.grammar import GrammarState
from vllm_d2cache.canvas.request import Request
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.mechanisms.base import Worker
from vllm_d2cache.options.sampling import EditSpec, SamplingSpec
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.budget import row_budget
from vllm_d2cache.policies.registry import POLICY_CLASSES, policy_class
from vllm_d2cache.requests.resolve import resolve
from vllm_d2cache.step.pages import Pages
from vllm_d2cache.step.runner import StepRunner
from vllm_d2cache.step.step import Step

# At 64 requests their predicted rows are more than a tile of statistics.
PROMPT, CANVAS, PAGE, MASK = 20, 24, 16, 5
_BLOCK = 4
BATCHES = (1, 8, 64)
# Behind the first one. Some methods do something else in every second, fourth or fifth step.
STEPS = 5

ALL_EDITS = EditSpec(bias=((9, 2.0), (11, -1.0)), banned=(7,), min_tokens=3, stop_ids=(8,), penalties=(1.2, 0.1, 0.1))
LOGPROBS, EDITS = SamplingSpec(num_logprobs=3), SamplingSpec(edits=ALL_EDITS)
ALLOWED, SAMPLED = SamplingSpec(edits=EditSpec(allowed=(9, 10, 11, 12))), SamplingSpec(0.8, 0.9, 6, 3)


class Setting(NamedTuple):
    """What the requests of a batch ask; request i has entry i, round and round."""

    options: tuple[dict[str, Any], ...]
    sampling: tuple[SamplingSpec, ...] = (SamplingSpec(),)
    grammar: bool = False
    given: bool = False
    block: int = 0  # positions of a block where texts are cut into blocks; 0 = they are not


class Anything:
    """A grammar that allows everything."""

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        """See canvas.grammar.Matcher."""
        bitmask[idx] = -1

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """See canvas.grammar.Matcher."""
        return True


@cache
def _server() -> ServerOptions:
    """With what any decoder needs of a server."""
    path = Path(tempfile.mkdtemp()) / "frequencies.npy"
    np.save(path, np.full(VOCAB, 1 / VOCAB, dtype=np.float32))
    return ServerOptions({}, token_frequencies=str(path))


def settings() -> dict[str, Setting]:
    """Every policy, every decoder (with the policy that leaves it what it needs), and what else a request can ask."""
    found = {f"policy {name}": Setting(({"policy": name},)) for name in POLICY_CLASSES}
    for name in DECODER_CLASSES:
        found[f"decoder {name}"] = Setting(({"decoder": name, "policy": _policy_for(name)},))
    return found | {
        "log-probabilities": Setting(({},), (LOGPROBS,)),
        "logit edits": Setting(({},), (EDITS,)),
        "allowed tokens": Setting(({},), (ALLOWED,)),
        "sampled": Setting(({},), (SAMPLED,)),
        "grammar": Setting(({},), grammar=True),
        "given canvas": Setting(({},), given=True),
    }


def mixed() -> dict[str, Setting]:
    """Batches in which everything happens at once: waits add up, and are bounded all the same."""
    policies = tuple({"policy": name} for name in POLICY_CLASSES)
    return {
        "all decoders": Setting(tuple({"decoder": name, "policy": "full"} for name in DECODER_CLASSES)),
        "all policies": Setting(policies),
        "all of it": Setting(policies, (SamplingSpec(), LOGPROBS, EDITS, ALLOWED, SAMPLED)),
    }


def blocks() -> dict[str, Setting]:
    """Where texts are cut into blocks: every policy with a meaning there, and the decoder that writes over tokens."""
    names = [name for name in POLICY_CLASSES if policy_class(name, _BLOCK).keeps_blocks]
    found = {f"blocks, policy {name}": Setting(({"policy": name},), block=_BLOCK) for name in names}
    many = tuple({"policy": name, "threshold": 0.5} for name in names)
    return found | {
        "blocks, decoder edit": Setting(({"policy": "block", "decoder": "edit"},), block=_BLOCK),
        "blocks, all policies": Setting(many, block=_BLOCK),
    }


def _policy_for(decoder: str) -> str:
    for policy in ("d2cache", "full"):
        try:
            resolve(_server(), {"decoder": decoder, "policy": policy})
        except OptionError:
            continue
        return policy
    raise AssertionError(f"no policy for {decoder}")


class Batch:
    """Requests on a device, the pretended one unless another is named; ``texts`` are prompt and canvas, in turn."""

    def __init__(
        self,
        setting: Setting,
        n: int,
        device: torch.device = CUDA,
        texts: Sequence[tuple[int, int]] = ((PROMPT, CANVAS),),
        max_len: int = PROMPT + CANVAS,
    ) -> None:
        self.setting, self.n, self.texts = setting, n, texts
        traits = FamilyTraits(MASK, num_layers=LAYERS, block_length=setting.block or None)
        self.server = replace(_server(), block_length=setting.block)
        self.runner = StepRunner(Worker(n, max_len, device, traits, self.server))
        blocks = -(-max_len // PAGE)
        self.table = 1 + torch.arange(n * blocks, dtype=torch.int32, device=device).view(n, blocks)
        self.network = Network(1 + n * blocks, PAGE, max_len, device)
        self.slots, self.host = torch.arange(n, device=device), list(range(n))
        for slot in self.host:
            self.add(slot)

    def add(self, slot: int) -> None:
        """Admit a request."""
        setting, (prompt, canvas) = self.setting, self.texts[slot % len(self.texts)]
        sampling = setting.sampling[slot % len(setting.sampling)]
        chosen = resolve(self.server, setting.options[slot % len(setting.options)], ordered=setting.grammar)
        rows = row_budget(chosen, prompt, canvas, None)
        given = tuple(9 if i % 5 == 1 else -1 for i in range(canvas)) if setting.given else ()
        request = Request(f"r{slot}", prompt, canvas, chosen, sampling, rows, given)
        if setting.grammar:
            words = torch.zeros(1, VOCAB // 32, dtype=torch.int32)
            request.grammar = GrammarState(Anything(), words, np.array([1 << MASK], dtype=np.int32), (8,))
        self.runner.add(slot, request, np.arange(prompt) % 7 + 9)

    def step(self, padded: bool = False) -> None:
        """From the plans of the last step to those of the next."""
        step = self.runner.open(self.slots, self.host, padded)
        self.runner.place(step, Pages(self.table, PAGE))
        self.runner.close(step, self.layers(step)[step.rows.logits_rows], self.network.logits)

    def layers(self, step: Step) -> torch.Tensor:
        """[N, d] final hidden states of a step that has been placed."""
        assert step.layout is not None
        return self.network.hidden(step.rows.input_ids, step.rows.positions, step.layout, step.hooks)


def _asked(asked: Asked, work: Callable[[], None]) -> dict[str, Any]:
    for counter in (asked.waits, asked.pinned, asked.pageable):
        counter.clear()
    asked.kernels = 0
    work()
    where: Counter[str] = Counter()
    for kind in ("waits", "pageable", "pinned"):
        where.update({f"{kind} {place}": n for place, n in getattr(asked, kind).items()})
    return {
        "waits": asked.waits.total(),
        "pageable": asked.pageable.total(),
        "pinned": asked.pinned.total(),
        "kernels": asked.kernels,
        "where": dict(where),
    }


def measure(setting: Setting, batch: int) -> dict[str, dict[str, Any]]:
    """The worst of some steps of each form; padded ones where such steps can be padded."""
    with pretended_device() as asked:
        requests = Batch(setting, batch)
        requests.step()
        found = {"exact": [_asked(asked, requests.step) for _ in range(STEPS)]}
        if requests.runner.forms.can_pad(requests.host):
            found["padded"] = [_asked(asked, lambda: requests.step(padded=True)) for _ in range(2)]
    return {form: max(seen, key=_cost) for form, seen in found.items()}


def _cost(found: dict[str, Any]) -> tuple[int, ...]:
    return found["waits"] + found["pageable"], found["pinned"], found["kernels"]


def measure_admission(setting: Setting, running: int = 8) -> dict[str, Any]:
    """The admission of a request beside others, which have had some steps."""
    with pretended_device() as asked:
        requests = Batch(setting, running)
        requests.step()
        requests.runner.remove(1)
        return _asked(asked, lambda: requests.add(1))


def lines() -> list[dict[str, Any]]:
    """One for each setting, batch and form, and one for each admission."""
    found = []
    for name, setting in (settings() | mixed() | blocks()).items():
        for batch in BATCHES:
            forms = measure(setting, batch)
            found += [{"setting": name, "batch": batch, "form": form, **seen} for form, seen in forms.items()]
        found.append({"setting": name, "batch": 8, "form": "admission", **measure_admission(setting)})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| setting | batch | form | waits | pageable uploads | pinned uploads |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {x['setting']} | {x['batch']} | {x['form']} | {x['waits']} | {x['pageable']} | {x['pinned']} |"
        for x in found
    ]
    return "\n".join(rows)


def write(found: list[dict[str, Any]], out: Path) -> None:
    """The table, and where each wait and copy is."""
    out.with_suffix(".md").write_text(table(found) + "\n")
    out.with_suffix(".json").write_text(json.dumps({"lines": found}, indent=1) + "\n")
