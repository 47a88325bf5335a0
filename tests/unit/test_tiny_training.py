"""What the tiny checkpoints are trained on: the second suite's problems, the batches, and which slots are masked."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """The scripts import each other by name, as they are run from their own directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def skills(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tiny_skills")


def counted(question: str) -> str:
    first, last, step = re.fullmatch(r"Count from (\d+) to (\d+)(?: by (\d+))?\.", question).groups()  # type: ignore[union-attr]
    return ",".join(map(str, range(int(first), int(last) + 1, int(step or 1)))) + "."


def looked_up(question: str) -> str:
    table, key = re.fullmatch(r"(.*)\. Find (.)\.", question).groups()  # type: ignore[union-attr]
    return dict(pair.split("=") for pair in table.split()).get(key, "none")


def added(question: str) -> str:
    first, second = re.fullmatch(r"Add (\d+)\+(\d+)\.", question).groups()  # type: ignore[union-attr]
    return str(int(first[::-1]) + int(second[::-1]))[::-1]


def ruled(question: str) -> str:
    """The rule that fits every example, found by trying them all."""
    *shots, last = (line.split(" >") for line in question.split("\n"))
    rules: list[Callable[[str], str]] = [str, lambda t: t[::-1], str.upper, lambda t: t[1:] + t[0]]
    for letter in "abcdefghijklmnopqrstuvwxyz":
        rules += [lambda t, c=letter: t + c, lambda t, c=letter: c + t]  # type: ignore[misc]
    answers = {rule(last[0]) for rule in rules if all(rule(a) == b.strip() for a, b in shots)}
    assert len(answers) == 1, f"the examples do not decide: {question}"
    return answers.pop()


ANSWERS: dict[str, Callable[[str], str]] = {
    "copy": lambda q: q.removeprefix("Copy: "),
    "reverse": lambda q: q.removeprefix("Reverse: ")[::-1],
    "upper": lambda q: q.removeprefix("Uppercase: ").upper(),
    "replace": lambda q: q.split(": ")[1].translate({ord(q[8]): q[15]}),
    "sort": lambda q: "".join(sorted(q.split(": ")[1])),
    "sums": lambda q: "".join(str(sum(map(int, q[6 : 6 + n])) % 10) for n in range(1, len(q) - 5)),
    "add": added,
    "range": counted,
    "lookup": looked_up,
    "member": lambda q: "yes" if q[3] in q.split(" in ")[1] else "no",
    "next": lambda q: q.split(" in ")[1].partition(q[6])[2][0],
    "ends": lambda q: q.split(": ")[1][0 if q.startswith("First") else -1],
    "fewshot": ruled,
}


def test_every_answer_is_right_and_fits(skills: ModuleType) -> None:
    problems = skills.held_out(40 * len(skills.KINDS))
    assert {p.kind for p in problems} == set(ANSWERS)
    for problem in problems:
        assert problem.answer == ANSWERS[problem.kind](problem.prompt), problem
        assert len(problem.answer) < problem.canvas in skills.CANVASES


def test_the_suite_has_long_answers_and_early_ends(skills: ModuleType) -> None:
    long, short = skills.held_out(200, kinds=("copy", "range")), skills.held_out(200, kinds=("member", "ends"))
    assert sum(len(p.answer) >= 128 for p in long) >= 8
    assert sum(len(p.answer) <= p.canvas // 8 for p in short) >= 100


def test_training_never_asks_what_is_held_out(skills: ModuleType) -> None:
    rng = random.Random(0)
    for kind in skills.GENERATORS:
        sides = [
            {skills.is_held_out(skills.make_problem(rng, kind, held).prompt) for _ in range(50)} for held in (0, 1)
        ]
        assert sides == [{False}, {True}]


@pytest.fixture(scope="module")
def data(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tiny_data")


def test_half_of_the_rows_are_masked_as_decoding_meets_them(data: ModuleType) -> None:
    response, ends = torch.zeros(400, 24), torch.full((400,), 10)
    masked = data.masked_slots(response, ends, torch.Generator().manual_seed(0))
    assert masked.any(1).all(), "every row has something to learn"
    first = masked.int().argmax(1)
    assert first[1::2].max() == 10, "the first end token is the last place"
    right = [masked[row, first[row] :].float().mean() for row in range(1, 400, 2)]
    assert sum(right) / len(right) > 0.85
    anywhere = masked[::2].float().mean(1)
    assert anywhere.min() < 0.1
    assert anywhere.max() > 0.9
    assert anywhere.mean() == pytest.approx(0.52, abs=0.02)


def test_loss_reads_every_masked_slot_where_the_family_predicts_it(
    load: Callable[[str], ModuleType], data: ModuleType
) -> None:
    """Of two families with one network, the shifted one is asked one position further left."""
    model_module = load("tiny_model")
    rows = [([7, 8, 9], [1, 2, 3]), ([7, 8], [4])]
    batch = model_module.collate(rows, 6, 0)
    read = []
    for shift in (0, 1):
        config = model_module.Config(vocab_size=16, d_model=8, n_layers=1, n_heads=2, mlp_hidden_size=8, shift=shift)
        model = model_module.TinyLM(config)
        inner = model.hidden
        model.hidden = lambda ids, keys, wanted, inner=inner: read.append(wanted) or inner(ids, keys, wanted)
        loss = data.masked_loss(model, batch, 0, 15, torch.Generator().manual_seed(3))
        assert loss.item() == pytest.approx(2.8, abs=0.5), "an untrained network knows nothing: log 16"
    assert torch.equal(read[0][:, 1:], read[1][:, :-1])
    assert not read[0][:, :3].any()
    assert not read[1][:, :2].any()


def test_wanted_rows_are_those_of_the_whole(load: Callable[[str], ModuleType]) -> None:
    model_module = load("tiny_model")
    torch.manual_seed(0)
    model = model_module.TinyLM(model_module.Config(n_layers=2))
    batch = model_module.collate([([5, 6, 7, 8], [1, 2]), ([9], [3])], 4, 0)
    wanted = torch.rand(batch.ids.shape) < 0.5
    whole = model.hidden(batch.ids, batch.keys)
    torch.testing.assert_close(model.hidden(batch.ids, batch.keys, wanted), whole[wanted])


def test_orthogonalised_matrices_have_singular_values_near_one(load: Callable[[str], ModuleType]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(load("tiny_optim").orthogonalise(torch.randn(3, 24, 40)))
    assert 0.6 < values.min() <= values.max() < 1.3
