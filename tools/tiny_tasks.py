"""Small text tasks for the tiny LLaDA checkpoint: a seeded generator with a train / held-out split.

Every problem is one user message and its one correct answer. The kinds:

    reverse  write a string of letters backwards          sort     sort the digits of a number
    replace  replace one letter by another in a string    upper    write a string in capitals
    add      column addition with the carries written     word     one- and two-step word problems
    count    count a letter, with the running count       range    count from a to b by a step
    fewshot  two to four solved questions of one kind, then a question of the same kind

The split is by question: a question is held out iff a hash of its text says so (one in eight). Training
problems never hold a held-out question, neither as the question asked nor as a solved example, and the solved
examples in held-out few-shot prompts are training questions. `held_out(n, seed)` gives the test set,
`train_problem(rng)` one training problem. Standard library only.

    >>> from tiny_tasks import held_out
    >>> problem = held_out(9, seed=0)[0]
    >>> problem.kind, problem.prompt, problem.answer, problem.canvas  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

CANVASES = (16, 32, 48, 64, 96, 128)
"""Response lengths (max_tokens) that the problems ask for; the answer and one end token always fit."""

NAMES = ("Ann", "Ben", "Cem", "Dora", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")


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


def _reverse(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 8, 15)
    return f"Reverse: {text}", text[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 8, 15, string.digits)
    return f"Sort the digits: {text}", "".join(sorted(text))


def _replace(rng: random.Random) -> tuple[str, str]:
    alphabet = "".join(rng.sample(string.ascii_lowercase, 6))
    text = _letters(rng, 8, 20, alphabet[:5])
    old, new = rng.choice(text), alphabet[5]
    return f"Replace {old} with {new}: {text}", text.replace(old, new)


def _upper(rng: random.Random) -> tuple[str, str]:
    text = _letters(rng, 8, 20)
    return f"Uppercase: {text}", text.upper()


def _number(rng: random.Random, low_digits: int, high_digits: int) -> int:
    """A number whose count of digits is uniform in low_digits..high_digits."""
    digits = rng.randint(low_digits, high_digits)
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _add(rng: random.Random) -> tuple[str, str]:
    first, second = _number(rng, 2, 4), _number(rng, 2, 4)
    steps, carry, x, y = [], 0, first, second
    while x or y:
        terms = [str(x % 10), str(y % 10)] + (["1"] if carry else [])
        total = x % 10 + y % 10 + carry
        steps.append(f"{'+'.join(terms)}={total}")
        carry, x, y = total // 10, x // 10, y // 10
    return f"Add {first} and {second}.", f"{';'.join(steps)}. Answer: {first + second}"


def _word(rng: random.Random) -> tuple[str, str]:
    """A word problem of one or two steps; all numbers stay in 1..99."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.3:
        boxes, each = rng.randint(2, 9), rng.randint(2, 9)
        total = boxes * each
        text, steps = f"{name} has {boxes} boxes with {each} {thing} each", [f"{boxes}*{each}={total}"]
    else:
        total = rng.randint(5, 70)
        text, steps = f"{name} has {total} {thing}", []
    for _ in range(max(1, rng.randint(1, 2) - len(steps))):
        if total > 40 or (total > 10 and rng.random() < 0.5):
            change = rng.randint(2, total - 2)
            ways = (f" and loses {change}", f" and gives away {change}", f" and sells {change}")
            text += rng.choice(ways)
            steps.append(f"{total}-{change}={total - change}")
            total -= change
        else:
            change = rng.randint(2, 50)
            ways = (f" and buys {change} more", f" and finds {change} more", f" and gets {change}")
            text += rng.choice(ways)
            steps.append(f"{total}+{change}={total + change}")
            total += change
    return f"{text}. How many {thing} now?", f"{', '.join(steps)}. Answer: {total}"


def _count(rng: random.Random) -> tuple[str, str]:
    alphabet = "".join(rng.sample(string.ascii_lowercase, 4))
    text = _letters(rng, 6, 14, alphabet)
    wanted, seen, steps = rng.choice(text), 0, []
    for letter in text:
        seen += letter == wanted
        steps.append(f"{letter}{seen}")
    return f"How many {wanted} in {text}?", f"{''.join(steps)}. Answer: {seen}"


def _range(rng: random.Random) -> tuple[str, str]:
    """Count up by 1 to 5; one in five is long (up to 36 numbers, three tokens each)."""
    step = rng.choice((1, 1, 2, 3, 5))
    count = rng.randint(13, 36) if rng.random() < 0.2 else rng.randint(4, 12)
    count = min(count, 89 // step)
    start = rng.randint(10, 99 - step * (count - 1))
    numbers = [start + step * index for index in range(count)]
    by = "" if step == 1 else f" by {step}"
    return f"Count from {start} to {numbers[-1]}{by}.", ",".join(map(str, numbers)) + "."


GENERATORS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": _reverse,
    "sort": _sort,
    "replace": _replace,
    "upper": _upper,
    "add": _add,
    "word": _word,
    "count": _count,
    "range": _range,
}
KINDS = (*GENERATORS, "fewshot")
TRAIN_WEIGHTS = {
    "reverse": 14, "sort": 13, "replace": 9, "upper": 5, "add": 16, "word": 18, "count": 11, "range": 14,
}  # fmt: skip
FEWSHOT_KINDS = ("reverse", "sort", "replace", "upper", "add", "word", "count")
FEWSHOT_SHARE = 0.08


def is_held_out(question: str) -> bool:
    """Whether a bare question (without solved examples) belongs to the held-out split."""
    return hashlib.sha256(question.encode()).digest()[0] < 32


def _canvas(answer: str) -> int:
    """The smallest canvas for an answer: its length in characters bounds its length in tokens."""
    tokens = len(answer) - (5 if "Answer" in answer else 0)
    return next(size for size in CANVASES if size >= tokens + 2)


def _question(rng: random.Random, kind: str, held: bool) -> tuple[str, str]:
    """Draw a (question, answer) of one kind from one side of the split."""
    while True:
        question, answer = GENERATORS[kind](rng)
        if is_held_out(question) == held:
            return question, answer


def make_problem(rng: random.Random, kind: str, held: bool) -> Problem:
    """Draw a problem of `kind` (any of KINDS) from the held-out or the training split."""
    if kind != "fewshot":
        question, answer = _question(rng, kind, held)
        return Problem(kind, question, answer, _canvas(answer))
    base = rng.choice(FEWSHOT_KINDS)
    shots = [_question(rng, base, False) for _ in range(rng.randint(2, 4))]
    question, answer = _question(rng, base, held)
    lines = [f"Q: {shot}\nA: {reply}" for shot, reply in shots]
    return Problem(kind, "\n".join([*lines, f"Q: {question}"]), answer, _canvas(answer))


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
