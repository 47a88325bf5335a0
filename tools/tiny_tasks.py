"""Problems for the tiny checkpoints, of the kinds that tell cache policies apart: long, exact, stateful.

Every problem is one user message and its one correct answer. The kinds, and what of a cache each one leans on:

    copy     write a string again                      long answers, up to 150 letters
    reverse  write a string backwards                  the last of the prompt comes first
    upper    write a string in capitals                one change a token
    replace  replace one letter by another             a choice for each token
    sort     sort the digits of a number               every token depends on all of the prompt and of the answer
    sums     running sums of digits, modulo 10         a state carried from token to token
    add      column addition, lowest digit first       two places of the prompt and a carry
    range    count from a to b by a step               carried state, long answers, where to stop
    ends     the first or the last letter               one letter in a canvas of any length: an early end
    fewshot  do with a string what the examples do     the answer depends on the examples

The split is by question: a question is held out iff a hash of its text says so (one in eight). Training problems never
ask a held-out question; in a few-shot prompt the examples are training strings, and the string asked is of its side.
`held_out(n, seed)` gives the test set, `train_problem(rng)` one training problem. Standard library only.

Left out are kinds that the networks (four layers, two million parameters) had not begun to learn after an hour or two:
whether a letter is in a string, which letter follows another one, and the values of keys in a table of the prompt.

    python tools/tiny_tasks.py 220 > examples/tiny_prompts.jsonl    # held-out problems for `vllm-d2cache compare`

    >>> from tiny_tasks import held_out
    >>> problem = held_out(9, seed=0)[0]
    >>> problem.kind, problem.prompt, problem.answer, problem.canvas  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import random
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass

CANVASES = (16, 32, 48, 64, 96, 128, 160)
"""Response lengths (max_tokens) that the problems ask for; the answer and one end token always fit."""


@dataclass(frozen=True)
class Problem:
    """One task: `prompt` is the user's message, `answer` the exact reply, `canvas` a suitable max_tokens."""

    kind: str
    prompt: str
    answer: str
    canvas: int


def _letters(rng: random.Random, low: int, high: int, alphabet: str = string.ascii_lowercase) -> str:
    """A random string of low..high letters of `alphabet`."""
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def _copy(rng: random.Random) -> tuple[str, str]:
    """One in six is long."""
    text = _letters(rng, *((100, 150) if rng.random() < 1 / 6 else (10, 40)))
    return f"Copy: {text}", text


def _reverse(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 8, 15)
    return f"Reverse: {text}", text[::-1]


def _upper(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 8, 30)
    return f"Uppercase: {text}", text.upper()


def _replace(rng: random.Random) -> tuple[str, str]:
    alphabet = "".join(rng.sample(string.ascii_lowercase, 6))
    text = _letters(rng, 8, 30, alphabet[:5])
    old, new = rng.choice(text), alphabet[5]
    return f"Replace {old} with {new}: {text}", text.replace(old, new)


def _sort(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 8, 15, string.digits)
    return f"Sort the digits: {text}", "".join(sorted(text))


def _sums(rng: random.Random) -> tuple[str, str]:
    text, total, answer = _letters(rng, 5, 14, string.digits), 0, ""
    for digit in text:
        total = (total + int(digit)) % 10
        answer += str(total)
    return f"Sums: {text}", answer


def _add(rng: random.Random) -> tuple[str, str]:
    """Both numbers have as many digits; they and their sum stand lowest digit first."""
    size = rng.randint(3, 8)
    first, second = (rng.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    return f"Add {str(first)[::-1]}+{str(second)[::-1]}.", str(first + second)[::-1]


def _range(rng: random.Random) -> tuple[str, str]:
    """Count up by 1, 2 or 5; one in six is long (up to 50 numbers, three tokens each)."""
    long = rng.random() < 1 / 6
    step = rng.choice((1, 1, 2) if long else (1, 1, 2, 5))
    count = rng.randint(36, 50) if long else rng.randint(4, 15)
    count = min(count, 89 // step)
    start = rng.randint(10, 99 - step * (count - 1))
    numbers = [start + step * index for index in range(count)]
    by = "" if step == 1 else f" by {step}"
    return f"Count from {start} to {numbers[-1]}{by}.", ",".join(map(str, numbers)) + "."


def _ends(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 6, 24)
    return rng.choice(((f"First: {text}", text[0]), (f"Last: {text}", text[-1])))


GENERATORS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _copy, "reverse": _reverse, "upper": _upper, "replace": _replace, "sort": _sort, "sums": _sums,
    "add": _add, "range": _range, "ends": _ends,
}  # fmt: skip
KINDS = (*GENERATORS, "fewshot")
TRAIN_WEIGHTS = {
    "copy": 6, "reverse": 5, "upper": 4, "replace": 5, "sort": 6, "sums": 8, "add": 22, "range": 9, "ends": 3,
}  # fmt: skip
FEWSHOT_SHARE = 0.2
_SHORT = {"ends"}
"""Kinds whose canvas is drawn at random: their answers end early in it."""


def _rules(rng: random.Random) -> dict[str, Callable[[str], str]]:
    """What few-shot examples may show; one letter is drawn anew for each prompt."""
    letter = rng.choice(string.ascii_lowercase)
    return {
        "same": lambda text: text,
        "reverse": lambda text: text[::-1],
        "upper": str.upper,
        f"end {letter}": lambda text: text + letter,
        f"start {letter}": lambda text: letter + text,
        "turn": lambda text: text[1:] + text[0],
    }


def is_held_out(question: str) -> bool:
    """Whether a bare question (without solved examples) belongs to the held-out split."""
    return hashlib.sha256(question.encode()).digest()[0] < 32


def _canvas(rng: random.Random, kind: str, answer: str) -> int:
    """The smallest canvas for an answer: its length in characters bounds its length in tokens."""
    return rng.choice((16, 16, 32, 64)) if kind in _SHORT else next(c for c in CANVASES if c >= len(answer) + 2)


def _question(rng: random.Random, kind: str, held: bool) -> tuple[str, str]:
    """Draw a (question, answer) of one kind from one side of the split."""
    while True:
        question, answer = GENERATORS[kind](rng)
        if is_held_out(question) == held:
            return question, answer


def _fewshot(rng: random.Random, held: bool) -> tuple[str, str]:
    """Two to four examples of a rule that is not named, then a string to apply it to."""
    name, rule = rng.choice(list(_rules(rng).items()))

    def text(side: bool) -> str:
        while True:
            found = _letters(rng, 4, 8)
            if is_held_out(f"{name}: {found}") == side:
                return found

    shots = [text(False) for _ in range(rng.randint(2, 4))]
    asked = text(held)
    lines = [f"{shot} > {rule(shot)}" for shot in shots]
    return "\n".join([*lines, f"{asked} >"]), rule(asked)


def make_problem(rng: random.Random, kind: str, held: bool) -> Problem:
    """Draw a problem of `kind` (any of KINDS) from the held-out or the training split."""
    question, answer = _fewshot(rng, held) if kind == "fewshot" else _question(rng, kind, held)
    return Problem(kind, question, answer, _canvas(rng, kind, answer))


def train_problem(rng: random.Random, fewshot_share: float = FEWSHOT_SHARE) -> Problem:
    """Draw one training problem from the training mix."""
    if rng.random() < fewshot_share:
        return make_problem(rng, "fewshot", False)
    kind = rng.choices(tuple(TRAIN_WEIGHTS), weights=tuple(TRAIN_WEIGHTS.values()))[0]
    return make_problem(rng, kind, False)


def held_out(n: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> list[Problem]:
    """`n` distinct held-out problems, the kinds in turn; the same n, seed and kinds give the same list."""
    rng = random.Random(f"held-out-{seed}")
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < n:
        problem = make_problem(rng, kinds[len(problems) % len(kinds)], True)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            problems.append(problem)
    return problems


def prompt_lines(n: int) -> list[str]:
    """`n` held-out problems as the lines of a prompts file."""
    return [
        json.dumps({"messages": [{"role": "user", "content": p.prompt}], "max_tokens": p.canvas, "answer": p.answer})
        for p in held_out(n, seed=2)
    ]


if __name__ == "__main__":
    print(*prompt_lines(int(sys.argv[1])), sep="\n")
