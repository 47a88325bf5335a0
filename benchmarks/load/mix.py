"""The distinct requests that the load is drawn from, good and bad."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from vllm_d2cache.requests.resolve import POLICIES

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

# Beside the policy and decoder; each belongs to the d2Cache policy and the decoder "confidence".
_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"d2cache_threshold": 0.7},
    {"d2cache_window": 8, "d2cache_tokens_per_step": 2},
    {"d2cache_factor": 1.0},
    {"d2cache_current_k": 4, "d2cache_score": "entropy"},
    {"d2cache_confidence_memory": "latest", "d2cache_rollout_p": 0.3, "d2cache_score": "margin"},
)


@dataclass(frozen=True)
class Kind:
    """A distinct request.

    Attributes:
        path: where it is sent.
        body: the JSON, or bytes that are none.
        traits: what it exercises, for the table.
        refused: what the 400 must say; None for a request that is answered.
    """

    path: str
    body: dict[str, Any] | bytes
    traits: tuple[str, ...]
    refused: str | None = None

    @property
    def choices(self) -> int:
        """How many answers it asks for."""
        return self.body.get("n", 1) if isinstance(self.body, dict) else 1


def kinds(rng: random.Random, count: int, decoders: tuple[str, ...]) -> list[Kind]:
    """``count`` good requests, in which policies and decoders take turns, and the bad ones.

    Greedy and sampled, chat and completions, prompts of 1 to some 200 tokens, canvases of 1 to 96 slots; stop strings,
    stop tokens, end-of-text ignored, log-probabilities, penalties, biases, given canvases, several answers.
    """
    return [_good(rng, i, decoders[i % len(decoders)]) for i in range(count)] + _bad()


def _good(rng: random.Random, i: int, decoder: str) -> Kind:
    policy = "full" if decoder == "wino" else POLICIES[i % len(POLICIES)]
    options: dict[str, Any] = {"d2cache_policy": policy, "d2cache_decoder": decoder}
    if policy == "d2cache" and decoder == "confidence":
        options |= rng.choice(_SETTINGS)
    fields: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 16, 32, 48, 96]), "vllm_xargs": options}
    traits = [f"policy {policy}", f"decoder {decoder}"]

    def sometimes(trait: str, share: float, **more: Any) -> None:
        if rng.random() < share:
            fields.update(more)
            traits.append(trait)

    sometimes("sampled", 0.3, temperature=0.9, top_p=0.9, seed=i)
    sometimes("several answers", 0.15, n=2, temperature=1.2, seed=i)
    sometimes("stop string", 0.2, stop=["e"])
    sometimes("stop tokens", 0.1, stop_token_ids=[20, 30, 40])
    sometimes("end of text ignored", 0.2, ignore_eos=True)
    sometimes("penalties", 0.1, presence_penalty=0.5, repetition_penalty=1.2)
    sometimes("biases", 0.1, logit_bias={"15": 4.0, "25": -100.0}, min_tokens=1)
    if decoder != "wino" and rng.random() < 0.15:
        length = rng.choice([4, 20, 60])
        holes = [-1] + [rng.choice([-1, rng.randrange(10, 200)]) for _ in range(length - 1)]
        fields |= {"max_tokens": length, "vllm_xargs": {**options, "d2cache_canvas": holes}}
        traits.append("given canvas")
    if rng.random() < 0.3:
        sometimes("log-probabilities", 0.4, logprobs=2)
        prompt = [rng.randrange(10, 200) for _ in range(rng.choice([1, 7, 60, 200]))]
        return Kind(COMPLETIONS, {"prompt": prompt, **fields}, (*traits, "completions"))
    sometimes("log-probabilities", 0.25, logprobs=True, top_logprobs=2)
    letters = "".join(rng.choices("abcdefghij", k=rng.choice([1, 5, 12, 40, 200])))
    messages = [{"role": "user", "content": f"{rng.choice(['Reverse', 'Uppercase', 'Sort'])}: {letters}"}]
    return Kind(CHAT, {"messages": messages, **fields}, (*traits, "chat"))


def _bad() -> list[Kind]:
    text = {"messages": [{"role": "user", "content": "Reverse: abc"}], "max_tokens": 8}

    def kind(refused: str, **fields: Any) -> Kind:
        return Kind(CHAT, {**text, **fields}, ("bad",), refused)

    def option(refused: str, **options: Any) -> Kind:
        return kind(refused, vllm_xargs=options)

    return [
        kind("max_tokens", max_tokens=0),
        kind("max_tokens", max_tokens=99999),
        kind("prompt_logprobs", prompt_logprobs=1),
        kind("max_tokns: no such field", max_tokns=8),
        option("d2cache_nonsense", d2cache_nonsense=1),
        option("d2cache_window", d2cache_window=-1),
        option("d2cache_policy", d2cache_policy="none"),
        option("wino", d2cache_policy="d2cache", d2cache_decoder="wino"),
        option("gamma", d2cache_decoder="confidence", d2cache_gamma=0.1),
        option("d2cache_canvas", d2cache_canvas=[-1, 5]),
        Kind(COMPLETIONS, {"prompt": "x" * 20000, "max_tokens": 8}, ("bad",), "context length"),
        Kind(COMPLETIONS, {"prompt": [5, 10**6], "max_tokens": 8}, ("bad",), "vocab"),
        Kind(COMPLETIONS, b'{"prompt": "\xff", "max_tokens": 8}', ("bad",), "error"),
    ]
