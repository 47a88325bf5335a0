"""A second suite for the tiny checkpoints, of the kinds that tell cache policies apart: long, exact, stateful.

Every problem is one user message and its one correct answer. The kinds, and what of a cache each one leans on:

    copy     write a string again                      long answers, up to 150 letters
    reverse  write a string backwards                  the last of the prompt comes first
    upper    write a string in capitals                one change a token
    replace  replace one letter by another             a choice for each token
    sort     sort the digits of a number               every token depends on all of the prompt and of the answer
    sums     running sums of digits, modulo 10         a state carried from token to token
    add      column addition, lowest digit first       two places of the prompt and a carry
    range    count from a to b by a step               carried state, long answers, where to stop
    lookup   the value of a key in a long table        one place of a long prompt, or none of it
    member   whether a letter is in a string           one word in a canvas of any length: an early end
    next     which letter follows another              one letter in a canvas of any length: an early end
    ends     the first or the last letter               the same, of a place that is known
    fewshot  do with a string what the examples do     the answer depends on the examples

The split and the functions are those of tiny_tasks.py, whose problems today's checkpoints were trained on. No
checkpoint has learnt these yet: `train_tiny.py --suite skills` trains on them. Standard library only.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from tiny_tasks import CANVASES as SHORT_CANVASES
from tiny_tasks import Problem, is_held_out

CANVASES = (*SHORT_CANVASES, 160)
"""Response lengths (max_tokens) that the problems ask for; the answer and one end token always fit."""


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


def _lookup(rng: random.Random) -> tuple[str, str]:
    """Three letters for a key; one key in six is not in the table."""
    keys = rng.sample(string.ascii_uppercase, rng.randint(4, 20))
    values = [_letters(rng, 3, 3) for _ in keys]
    asked = rng.randrange(len(keys))
    answer = values[asked]
    if rng.random() < 1 / 6 and len(keys) > 4:
        key, answer = keys.pop(asked), "none"
        del values[asked]
    else:
        key = keys[asked]
    table = " ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True))
    return f"{table}. Find {key}.", answer


def _member(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 6, 24)
    inside = rng.random() < 0.5
    letter = rng.choice([c for c in string.ascii_lowercase if (c in text) == inside])
    return f"Is {letter} in {text}?", "yes" if inside else "no"


def _next(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.sample(string.ascii_lowercase, rng.randint(6, 24)))
    place = rng.randrange(len(text) - 1)
    return f"After {text[place]} in {text}?", text[place + 1]


def _ends(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 6, 24)
    return rng.choice(((f"First: {text}", text[0]), (f"Last: {text}", text[-1])))


GENERATORS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _copy, "reverse": _reverse, "upper": _upper, "replace": _replace, "sort": _sort, "sums": _sums,
    "add": _add, "range": _range, "lookup": _lookup, "member": _member, "next": _next,
    "ends": _ends,
}  # fmt: skip
KINDS = (*GENERATORS, "fewshot")
TRAIN_WEIGHTS = {
    "copy": 8, "reverse": 8, "upper": 5, "replace": 8, "sort": 10, "sums": 12, "add": 14, "range": 14, "lookup": 10,
    "member": 5, "next": 5, "ends": 3,
}  # fmt: skip
FEWSHOT_SHARE = 0.1
_SHORT = {"member", "next", "ends", "lookup"}
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
