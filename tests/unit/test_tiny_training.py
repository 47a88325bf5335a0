"""What the tiny checkpoints are trained on: the problems, the batches, and which slots are masked."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
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
def tasks(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tiny_tasks")


def counted(question: str) -> str:
    first, last, step = re.fullmatch(r"Count from (\d+) to (\d+)(?: by (\d+))?\.", question).groups()  # type: ignore[union-attr]
    return ",".join(map(str, range(int(first), int(last) + 1, int(step or 1)))) + "."


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
    "ends": lambda q: q.split(": ")[1][0 if q.startswith("First") else -1],
    "fewshot": ruled,
}


def test_every_answer_is_right_and_fits(tasks: ModuleType) -> None:
    problems = tasks.held_out(40 * len(tasks.KINDS))
    assert {p.kind for p in problems} == set(ANSWERS)
    for problem in problems:
        assert problem.answer == ANSWERS[problem.kind](problem.prompt), problem
        assert len(problem.answer) < problem.canvas in tasks.CANVASES


def test_the_suite_has_long_answers_and_early_ends(tasks: ModuleType) -> None:
    long, short = tasks.held_out(200, kinds=("copy", "range")), tasks.held_out(200, kinds=("ends",))
    assert sum(len(p.answer) >= 128 for p in long) >= 8
    assert sum(len(p.answer) <= p.canvas // 8 for p in short) >= 150


def test_the_prompts_file_has_held_out_problems(tasks: ModuleType) -> None:
    lines = (TOOLS.parent / "examples" / "tiny_prompts.jsonl").read_text().splitlines()
    assert lines == tasks.prompt_lines(len(lines))


def test_the_demo_asks_long_questions_first(load: Callable[[str], ModuleType]) -> None:
    demo = load("demo")
    found = demo.questions(0)
    assert [p.kind for p in found] == [kind for kind, _ in demo.QUESTIONS]
    assert all(p.canvas >= canvas for p, (_, canvas) in zip(found, demo.QUESTIONS, strict=True))


def test_training_never_asks_what_is_held_out(tasks: ModuleType) -> None:
    rng = random.Random(0)
    for kind in tasks.GENERATORS:
        sides = [{tasks.is_held_out(tasks.make_problem(rng, kind, held).prompt) for _ in range(50)} for held in (0, 1)]
        assert sides == [{False}, {True}]


@pytest.fixture(scope="module")
def blocks(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tiny_blocks")


def test_every_block_is_denoised_as_decoding_sees_it(load: Callable[[str], ModuleType], blocks: ModuleType) -> None:
    """The rows of the masked copy have the states of a plain pass over the text up to their block."""
    model_module, block, mask = load("tiny_model"), 4, 15
    config = model_module.Config(16, 8, 2, 2, 8, qk_norm=True, block=block)
    torch.manual_seed(0)
    model = model_module.TinyLM(config)
    batch = blocks.collate([([7, 8, 9, 5, 6], [1, 2, 3]), ([7, 8], [4, 1, 1, 1, 1, 1, 1])], 8, 0, block)
    assert batch.lengths.tolist() == [12, 12], "the end token is in the text, whose last block is whole"
    seen = []
    inner = model.hidden
    model.hidden = lambda *given: seen.append(given) or inner(*given)
    blocks.masked_loss(model, batch, 0, mask, torch.Generator().manual_seed(1), block).backward()
    ids, keys, masked, positions = seen[0]
    assert torch.equal(ids == mask, masked)
    doubled = inner(ids, keys, positions=positions)
    width = 12
    order = torch.arange(width) // block
    causal = (order[None, :] <= order[:, None])[None, None]
    for row in range(2):
        start = int(batch.prompts[row]) // block * block
        assert not masked[row, : width + int(batch.prompts[row]) - start].any(), "the prompt is known"
        for first in range(start, width, block):
            copy = slice(width + first - start, width + first - start + block)
            assert masked[row, copy].any()
            alone = ids[row : row + 1, :width].clone()
            alone[0, first : first + block] = ids[row, copy]
            plain = inner(alone, causal)[0, first : first + block]
            torch.testing.assert_close(doubled[row, copy], plain)


def test_decoding_in_blocks_keeps_the_prompt_and_leaves_no_mask(
    load: Callable[[str], ModuleType], blocks: ModuleType
) -> None:
    model_module, block, mask = load("tiny_model"), 4, 15
    model = model_module.TinyLM(model_module.Config(16, 8, 1, 2, 8, qk_norm=True, block=block))
    model.transformer["ff_out"].weight.data[mask] = (
        0  # this network could predict the mask token; a trained one does not
    )
    prompts = ([7, 8, 9, 5, 6, 4, 3, 2, 8], [7, 8])  # of which the longer one reaches two blocks further
    pair = blocks.collate([(prompt, []) for prompt in prompts], 20, 0, block)
    out = blocks.decode(model, pair, mask, 0.0, block)
    assert out.shape == (2, 20)
    assert pair.ids.shape[1] >= 9 + 20
    for row, prompt in enumerate(prompts):
        alone = blocks.decode(model, blocks.collate([(prompt, [])], 20, 0, block), mask, 0.0, block)
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("name", ["tiny_dream", "tiny_sdar"])
def test_a_family_takes_over_the_weights_of_another(load: Callable[[str], ModuleType], name: str) -> None:
    """Every parameter is taken over or has a reason of its own, and q and k keep their size behind the new norms."""
    module, model_module, llada_module = load(name), load("tiny_model"), load("tiny_llada")
    family = module.SDAR if name == "tiny_sdar" else module.DREAM
    torch.manual_seed(0)
    llada, model = model_module.TinyLM(llada_module.LLADA.config), model_module.TinyLM(family.config)
    module.start_from_llada(model, llada, llada_module.build_tokenizer(), family.build_tokenizer())
    ours, theirs = model.state_dict(), llada.state_dict()
    same = [name for name in theirs if torch.equal(ours[name], theirs[name])]
    assert len(same) == len(theirs) - 2 - (4 if family.config.shift else 0), "all but embeddings and turned queries"
    if family.config.qk_norm:
        x = torch.nn.functional.normalize(torch.randn(500, 192), dim=-1) * 192**0.5
        block = model.transformer["blocks"][0]
        before = block.q_proj(x).unflatten(-1, (6, -1))
        after = block.q_norm(before)
        size = before.detach().square().mean().sqrt().item()
        assert after.detach().square().mean().sqrt().item() == pytest.approx(size, rel=0.05)


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


@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
def test_a_wider_network_says_the_same(load: Callable[[str], ModuleType], name: str) -> None:
    family, model_module, widen = load("train_tiny").FAMILIES[name], load("tiny_model"), load("widen")
    torch.manual_seed(0)
    config = family.config
    model = model_module.TinyLM(config)
    for weight in model.parameters():
        if weight.ndim == 1:  # norms and biases begin as ones and zeros, which would hide a mistake
            weight.data += 0.3 * torch.randn_like(weight)
    sizes = {key: 2 * getattr(config, key) for key in ("d_model", "n_heads", "mlp_hidden_size")}
    wide = model_module.TinyLM(replace(config, **sizes))
    weights = {key: widen.widened(family.tensor_name(key), value, 2) for key, value in model.state_dict().items()}
    wide.load_state_dict(weights)
    ids = torch.randint(config.vocab_size, (2, 24))
    torch.testing.assert_close(wide.logits(wide.hidden(ids)), model.logits(model.hidden(ids)), atol=1e-4, rtol=1e-4)


def test_a_width_that_rounds_is_refused(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="times=3: a power of two"):
        load("widen").widen(tmp_path, tmp_path / "wide", 3)
