"""The cells of a comparison: which settings are run, on which prompts, and what is counted of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_d2cache.cli import UsageError
from vllm_d2cache.cli.paired import Difference, difference
from vllm_d2cache.options.request import PREFIX
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.resolve import parse_request_options, resolve

if TYPE_CHECKING:
    from vllm_d2cache.observe.counters import StepCounters

# Asked where no file of prompts is given.
QUESTIONS = (
    "Name the four seasons of the year in order.",
    "Write a haiku about a river.",
    "What is 17 times 23? Show each step.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
    "List five countries whose names begin with the letter B.",
)
_QUESTION_CANVAS = 64


@dataclass(frozen=True, eq=False)
class Setting:
    """A policy or a decoder, with options of its own: ``NAME`` or ``NAME:KEY=VALUE,...``."""

    label: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, kind: str, text: str) -> Setting:
        """Read ``text``; ``kind`` is ``policy`` or ``decoder``."""
        name, _, rest = text.partition(":")
        options: dict[str, Any] = {kind: name}
        for pair in rest.split(",") if rest else []:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"{text!r}: options are KEY=VALUE, separated by commas, got {pair!r}")
            options[key] = _number(value)
        return cls(text, options)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def pairs_of(
    policies: list[Setting], decoders: list[Setting], server: ServerOptions, asked: tuple[bool, bool] = (True, True)
) -> tuple[list[tuple[Setting, Setting]], list[str]]:
    """Pairs the engine will take, decoder by decoder, and why it will not take the others.

    Args:
        asked: whether somebody has named the policies, and the decoders; otherwise they are all that there are.

    Raises:
        UsageError: a policy or decoder that was asked for is in no pair, or there is no pair.
    """
    pairs, refused = [], {}
    for decoder in decoders:
        for policy in policies:
            options = {**policy.options, **decoder.options}
            try:
                resolve(server, parse_request_options({PREFIX + key: value for key, value in options.items()}))
            except OptionError as error:
                refused[policy, decoder] = str(error)
            else:
                pairs.append((policy, decoder))
    for setting in [*policies * asked[0], *decoders * asked[1]] if pairs else [*policies, *decoders]:
        if not any(setting in pair for pair in pairs):
            raise UsageError(next(reason for pair, reason in refused.items() if setting in pair))
    return pairs, [f"{policy.label}, {decoder.label}: {reason}" for (policy, decoder), reason in refused.items()]


@dataclass(frozen=True)
class Prompt:
    """One request: ``text`` as it is, or ``messages`` of a chat."""

    max_tokens: int
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    answer: str | None = None


def general_questions(chat: bool) -> list[Prompt]:
    """A few general questions; ``chat`` says that the model has a chat template to ask them in."""
    if chat:
        return [Prompt(_QUESTION_CANVAS, messages=[{"role": "user", "content": q}]) for q in QUESTIONS]
    return [Prompt(_QUESTION_CANVAS, text=q) for q in QUESTIONS]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSON-lines file.

    Raises:
        UsageError: the file is not what ``vllm-d2cache compare --help`` says.
    """
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            prompts.append(_prompt(line, f"{path}, line {number}"))
    if not prompts:
        raise UsageError(f"{path} has no prompts")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error})") from error
    known = {"prompt", "messages", "max_tokens", "answer"}
    if not isinstance(fields, dict) or not set(fields) <= known or ("prompt" in fields) == ("messages" in fields):
        raise UsageError(f"{where}: must be an object with prompt or messages, max_tokens, and maybe answer")
    length = fields.get("max_tokens")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UsageError(f"{where}: max_tokens must be an integer >= 1 (the length of the canvas), got {length!r}")
    return Prompt(length, fields.get("prompt"), fields.get("messages"), fields.get("answer"))


@dataclass
class Cell:
    """What one policy with one decoder gave on all prompts, and took.

    Attributes:
        outputs: token ids of each response, up to its end-of-text token (which is counted, as vLLM's usage does).
        agreement: mean share of a response's tokens that are those of full recompute, position by position.
        identical: share of the responses that are those of full recompute.
        right: share of the responses that are the answer of the prompts file; None where it has none.
        marks: of each prompt with an answer, whether it is.
        difference: right answers against those of full recompute under the same decoder; full recompute itself against
            full recompute under the first decoder. None without answers, and in the first cell.
        canvas_tokens: positions that were there to be written, max_tokens summed.
        committed_tokens: masks turned into tokens, those behind an end-of-text token included.
        forwards, steps, rows, keys: see counters.StepCounters.
        seconds: wall clock of all requests.
        peak_bytes: most memory meanwhile (cli/machine.py).
    """

    policy: str
    decoder: str
    options: dict[str, Any]
    outputs: list[list[int]] = field(repr=False)
    texts: list[str] = field(repr=False)
    canvas_tokens: int
    committed_tokens: int
    forwards: int
    steps: int
    rows: int
    keys: int
    seconds: float
    peak_bytes: int | None
    agreement: float = 0.0
    identical: float = 0.0
    right: float | None = None
    marks: list[bool] = field(default_factory=list, repr=False)
    difference: Difference | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(map(len, self.outputs))

    def compare(self, full: Cell, prompts: list[Prompt]) -> None:
        """Fill in what needs full recompute or the answers."""
        pairs = list(zip(self.outputs, full.outputs, strict=True))
        self.agreement = sum(agreement(a, b) for a, b in pairs) / len(pairs)
        self.identical = sum(a == b for a, b in pairs) / len(pairs)
        answers = [(p.answer, t) for p, t in zip(prompts, self.texts, strict=True) if p.answer is not None]
        self.marks = [a.strip() == t.strip() for a, t in answers]
        self.right = sum(self.marks) / len(self.marks) if self.marks else None

    def set_against(self, other: Cell) -> None:
        """Fill in the difference, once both have been compared."""
        self.difference = difference(self.marks, other.marks) if self.marks and other is not self else None


def agreement(a: list[int], b: list[int]) -> float:
    """Share of equal tokens, position by position, of the longer of the two."""
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b), 1)


def measure(
    llm: Any,
    counters: StepCounters,
    prompts: list[Prompt],
    policy: Setting,
    decoder: Setting,
    one_by_one: bool,
    done: Callable[[int], None],
) -> Cell:
    """Run all prompts under one setting.

    Args:
        llm: an in-process engine.
        counters: the engine's own.
        one_by_one: the next request begins when the last has ended; else the engine gets all of them at once.
        done: told how many requests have ended.
    """
    from vllm_d2cache.cli.machine import peak_bytes, reset_peak

    options = {**policy.options, **decoder.options}
    extra = {PREFIX + key: value for key, value in options.items()}
    _generate(llm, prompts[:1], extra)  # the first use of a setting allocates
    llm.reset_prefix_cache()  # what other settings have stored of the same prompts
    counters.reset()
    reset_peak()
    outputs = []
    start = time.perf_counter()
    for part in [[p] for p in prompts] if one_by_one else [prompts]:
        outputs += _generate(llm, part, extra)
        done(len(part))
    seconds = time.perf_counter() - start
    return Cell(
        policy.label,
        decoder.label,
        options,
        [list(o.outputs[0].token_ids) for o in outputs],
        [o.outputs[0].text for o in outputs],
        sum(p.max_tokens for p in prompts),
        counters.committed,
        counters.forwards,
        counters.steps,
        counters.rows,
        counters.keys,
        seconds,
        peak_bytes(),
    )


def _generate(llm: Any, prompts: list[Prompt], extra: dict[str, Any]) -> list[Any]:
    """Responses in the order of the prompts."""
    from vllm import SamplingParams

    outputs: list[Any] = [None] * len(prompts)
    for is_chat in (True, False):
        chosen = [i for i, p in enumerate(prompts) if (p.messages is not None) == is_chat]
        if not chosen:
            continue
        params = [SamplingParams(temperature=0, max_tokens=prompts[i].max_tokens, extra_args=extra) for i in chosen]
        if is_chat:
            found = llm.chat([prompts[i].messages for i in chosen], params, use_tqdm=False)
        else:
            found = llm.generate([prompts[i].text for i in chosen], params, use_tqdm=False)
        for i, output in zip(chosen, found, strict=True):
            outputs[i] = output
    return outputs
