"""Train the tiny checkpoints of this repository on the tasks of tiny_tasks.py, on CPU, in about an hour each.

    python tools/train_tiny.py --out models/tiny-llada --steps 6000     # train, export, report
    python tools/train_tiny.py --out models/tiny-llada --eval-only      # reprint the held-out table
    python tools/train_tiny.py --family dream --from models/tiny-llada --mix --out models/tiny-dream --steps 1500

The model is a bidirectional llama-type transformer with the config keys and tensor names of its family. The
objective is that of LLaDA's supervised finetuning: the prompt is never masked, the response (answer, then
<|endoftext|> up to the canvas length) is. Of G response slots k ~ U{1..G} are masked, stratified over the
batch, and the loss is the mean cross entropy over the k slots: the lower-variance form of masking at ratio
t ~ U(0,1) with weight 1/t. Dream's logits are shifted: a slot is predicted at the position on its left.

A run by --steps depends on its seed only. With --minutes the schedule follows whichever of the two budgets
is further spent, so that the run ends in time on a slow machine; training.json says whether that happened.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import tiny_dream
import tiny_llada
from tiny_model import Batch, Family, TinyLM, collate, evaluate
from tiny_tasks import CANVASES, KINDS, Problem, held_out, train_problem

FAMILIES: dict[str, Family] = {"llada": tiny_llada.LLADA, "dream": tiny_dream.DREAM}
# With --mix, a canvas length's problems are cut into this many parts by prompt length, and each is shuffled.
MIXED_PARTS = 5
Report = dict[str, dict[str, float]]


def training_canvas(problem: Problem, progress: float, rng: random.Random) -> int:
    """The problem's own canvas; one problem in six gets a longer one, late in training up to 256."""
    sizes = (*CANVASES, 256)
    index, roll = sizes.index(problem.canvas), rng.random()
    if progress > 0.45 and roll < 0.012:
        return sizes[-1]
    if progress > 0.3 and roll < 0.05:
        return rng.choice(sizes[index:-1])
    return sizes[min(index + 1, len(sizes) - 2)] if roll < 0.17 else problem.canvas


def pool(
    tokenizer: Tokenizer,
    family: Family,
    seed: str,
    progress: float,
    tokens: int,
    mix: bool,
    curriculum: bool,
    size: int = 6000,
) -> list[Batch]:
    """A shuffled pool of batches of about `tokens` positions each, similar shapes together.

    The curriculum: no canvas above 48 and no few-shot prompt in the first tenth of training. `mix`: questions of
    several kinds in each batch, as only coarsely similar prompt lengths stand together; costs padding.
    """
    rng = random.Random(seed)
    early = curriculum and progress < 0.1
    problems = [train_problem(rng, 0.0 if early else 0.08) for _ in range(size)]
    problems = [p for p in problems if not early or p.canvas <= 48]
    prompts = tokenizer.encode_batch([family.chat(p.prompt) for p in problems], add_special_tokens=False)
    answers = tokenizer.encode_batch([p.answer for p in problems], add_special_tokens=False)
    groups = collections.defaultdict(list)
    for problem, prompt, answer in zip(problems, prompts, answers, strict=True):
        groups[training_canvas(problem, progress, rng)].append((prompt.ids, answer.ids))
    batches = []
    for canvas, rows in groups.items():
        rows.sort(key=lambda row: len(row[0]))
        if mix:
            size = -(-len(rows) // MIXED_PARTS)
            parts = [rows[i : i + size] for i in range(0, len(rows), size)]
            rows = [row for part in parts for row in rng.sample(part, len(part))]
        while rows:
            longest = max(len(prompt) for prompt, _ in rows[:16])
            count = max(4, tokens // (longest + canvas))
            batches.append(collate(rows[:count], canvas, tokenizer.token_to_id(family.eos)))
            rows = rows[count:]
    rng.shuffle(batches)
    return batches


def masked_loss(model: TinyLM, batch: Batch, mask_id: int, generator: torch.Generator) -> Tensor:
    """Mean over the rows of the mean cross entropy over the row's masked response slots."""
    rows, canvas = len(batch.ids), batch.canvas
    ratio = (torch.arange(rows) + torch.rand(1, generator=generator)) / rows
    count = (ratio * canvas).long() + 1
    rank = torch.rand(rows, canvas, generator=generator).argsort(1).argsort(1)
    masked = torch.zeros_like(batch.ids, dtype=torch.bool)
    masked[:, -canvas:] = rank < count[:, None]
    hidden = model.hidden(batch.ids.masked_fill(masked, mask_id), batch.keys)
    read = masked.roll(-model.config.shift, 1)
    loss = F.cross_entropy(model.logits(hidden[read]), batch.ids[masked], reduction="none")
    weight = (1.0 / (count * rows))[:, None].expand_as(masked)[masked]
    return (loss * weight).sum()


def report(model: TinyLM, tokenizer: Tokenizer, family: Family, count: int, canvas: int = 0) -> Report:
    """Print and return the held-out table for plain confidence and for the certainty prior (sigma 10).

    `canvas` replaces the problems' own canvas where it is larger.
    """
    problems = [replace(p, canvas=max(p.canvas, canvas)) for p in held_out(count, seed=1)]
    table = {f"sigma={s:g}": evaluate(model, tokenizer, family, problems, s) for s in (0.0, 10.0)}
    print(f"held-out exact match in %, {count} problems, full recompute")
    print("| kind | sigma=0 | sigma=10 |\n|---|---|---|")
    for kind in (*KINDS, "all"):
        print(f"| {kind} | " + " | ".join(f"{100 * scores[kind]:.1f}" for scores in table.values()) + " |")
    return table


class Muon:
    """Momentum with orthogonalised updates for the blocks' matrices, AdamW for everything else."""

    def __init__(self, model: TinyLM, lr: float, decay: float) -> None:
        named = list(model.named_parameters())
        self.matrices = [w for name, w in named if "blocks" in name and w.ndim == 2]
        rest = [w for name, w in named if not ("blocks" in name and w.ndim == 2)]
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.momentum = [torch.zeros_like(w) for w in self.matrices]
        self.decay = decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update; an orthogonal update is scaled to AdamW's typical size, so one lr serves both."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        groups = collections.defaultdict(list)
        for weight, momentum in zip(self.matrices, self.momentum, strict=True):
            momentum.lerp_(weight.grad, 0.05)
            update = weight.grad.lerp(momentum, 0.95)
            groups[(min(weight.shape), max(weight.shape))].append((weight, update))
        for shape, pairs in groups.items():
            flat = torch.stack([u if u.shape[0] <= u.shape[1] else u.T for _, u in pairs])
            for (weight, _), update in zip(pairs, orthogonalise(flat), strict=True):
                update = update if weight.shape[0] <= weight.shape[1] else update.T
                weight.mul_(1 - lr * self.decay).add_(update, alpha=-lr * 0.2 * shape[1] ** 0.5)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration (Muon's quintic) on a stack of matrices (n, a, b) with a <= b."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Run:
    """Everything that changes during training, so that it can be saved and resumed."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.family = FAMILIES[args.family]
        self.tokenizer = self.family.build_tokenizer()
        self.mask_id = self.tokenizer.token_to_id(self.family.mask)
        self.model, self.ema = TinyLM(self.family.config), TinyLM(self.family.config)
        if args.start:
            tiny_dream.start_from_llada(self.model, *load_checkpoint(args.start, tiny_llada.LLADA), self.tokenizer)
        self.ema.load_state_dict(self.model.state_dict())
        self.optimizer = Muon(self.model, args.lr, 0.1)
        self.step, self.pools, self.minutes, self.accelerated = 0, 0, 0.0, False
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float, dict[str, float]]] = []

    STATE = ("step", "pools", "minutes", "accelerated", "losses", "scores")

    def save(self, path: Path) -> None:
        """Write the whole state; only called between pools, so a resumed run sees the same batches."""
        state = {name: getattr(self, name) for name in self.STATE}
        state |= {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        state |= {"adam": self.optimizer.adam.state_dict(), "momentum": self.optimizer.momentum}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a file written by `save`."""
        state = torch.load(path, weights_only=True)
        for name in self.STATE:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.adam.load_state_dict(state["adam"])
        self.optimizer.momentum = state["momentum"]

    def progress(self, minutes: float) -> float:
        """The spent share of the budget, 0..1."""
        by_steps = self.step / self.args.steps if self.args.steps else 0.0
        by_time = minutes / self.args.minutes if self.args.minutes else 0.0
        self.accelerated |= by_time > by_steps
        return min(1.0, max(by_steps, by_time))

    def rate(self, progress: float) -> float:
        """Learning rate: linear warmup over 150 steps, then a cosine to one fiftieth."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        return self.args.lr * min(1.0, (self.step + 1) / 150) * cosine

    def update(self, batch: Batch, progress: float) -> float:
        """One optimiser step and the moving average of the weights; returns the loss."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
        loss = masked_loss(self.model, batch, self.mask_id, generator)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(self.rate(progress))
        keep = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - keep)
        self.step += 1
        return loss.item()


def train(run: Run, out: Path) -> None:
    """Train until the budget is spent, saving the state and the scores every --every steps."""
    args, begin, last = run.args, time.monotonic() - 60 * run.minutes, run.step
    sample = held_out(126, seed=7)
    bar = tqdm(total=args.steps, initial=run.step, mininterval=10)
    progress = run.progress(run.minutes)
    while progress < 1:
        seed, curriculum = f"{args.seed}-{run.pools}", not args.start
        for batch in pool(run.tokenizer, run.family, seed, progress, args.tokens, args.mix, curriculum):
            if progress >= 1:
                break
            run.losses.append((run.step, run.update(batch, progress)))
            run.minutes = (time.monotonic() - begin) / 60
            progress = run.progress(run.minutes)
            bar.update()
            bar.set_postfix(loss=f"{run.losses[-1][1]:.3f}", minutes=f"{run.minutes:.1f}", refresh=False)
        run.pools += 1
        if run.step - last >= args.every and progress < 1:
            last = run.step
            scores = evaluate(run.ema, run.tokenizer, run.family, sample, 10.0)
            run.scores.append((run.step, run.minutes, scores))
            recent = [loss for _, loss in run.losses[-200:]]
            cells = " ".join(f"{kind} {100 * value:.0f}" for kind, value in scores.items())
            tqdm.write(f"step {run.step} loss {sum(recent) / len(recent):.4f} | {cells}")
            run.save(Path(args.state))
            if scores["all"] > 0.3:
                export(run, out, {"sigma=10, 126 problems": scores})
    run.save(Path(args.state))


def export(run: Run, out: Path, scores: Report) -> None:
    """Write the averaged weights as a checkpoint directory, with training.json and loss.png."""
    out.mkdir(parents=True, exist_ok=True)
    files = run.family.files(run.model.config, run.tokenizer) | {"training.json": record(run, scores)}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
    run.family.save_tokenizer(run.tokenizer, out)
    weights = {run.family.tensor_name(name): value.contiguous() for name, value in run.ema.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    plot(run, out / "loss.png")


def smoothed(run: Run, points: int = 200) -> list[tuple[int, float]]:
    """The loss curve as about `points` means over equal spans of steps."""
    size = max(1, len(run.losses) // points)
    spans = [run.losses[i : i + size] for i in range(0, len(run.losses), size)]
    return [(span[-1][0] + 1, round(sum(loss for _, loss in span) / len(span), 5)) for span in spans]


def record(run: Run, scores: Report) -> dict[str, Any]:
    """The facts of the run for training.json."""
    args = run.args
    return {
        "family": args.family, "started_from": str(args.start) if args.start else None, "mixed_batches": args.mix,
        "seed": args.seed, "steps": run.step, "planned_steps": args.steps,
        "schedule_cut_by_time": run.accelerated,
        "positions_per_batch": args.tokens, "optimizer": "Muon for the blocks' matrices, AdamW for the rest",
        "lr": args.lr, "ema": 0.998, "model": asdict(run.model.config),
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        "torch": torch.__version__, "cpu_threads": args.threads, "minutes": round(run.minutes, 1),
        "held_out": scores,
        "held_out_during_training": [
            {"step": step, "minutes": round(minutes, 1), **kinds} for step, minutes, kinds in run.scores
        ],
        "loss_curve": smoothed(run),
    }  # fmt: skip


def plot(run: Run, path: Path) -> None:
    """Loss and held-out accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    left.semilogy(*zip(*smoothed(run), strict=True))
    left.set(xlabel="step", ylabel="loss (mean over the masked slots)", title="training loss")
    for kind in (*KINDS, "all"):
        values = [100 * scores.get(kind, 0.0) for _, _, scores in run.scores]
        style = {"color": "black", "linewidth": 2.5} if kind == "all" else {"linewidth": 1}
        right.plot([step for step, _, _ in run.scores], values, label=kind, **style)
    right.set(xlabel="step", ylabel="exact match (%)", title="held-out problems, sigma 10", ylim=(0, 101))
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def load_checkpoint(path: Path, family: Family) -> tuple[TinyLM, Tokenizer]:
    """Read an exported directory back; its sizes are the family's."""
    model = TinyLM(family.config)
    weights = load_file(path / "model.safetensors")
    model.load_state_dict({name: weights[family.tensor_name(name)].float() for name in model.state_dict()})
    return model, family.load_tokenizer(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--family", choices=FAMILIES, default="llada")
    parser.add_argument("--from", dest="start", type=Path, help="a tiny LLaDA whose weights a Dream starts from")
    parser.add_argument("--mix", action="store_true", help="questions of all kinds in each batch")
    parser.add_argument("--steps", type=int, default=0, help="budget in steps (reproducible)")
    parser.add_argument("--minutes", type=float, default=0.0, help="budget in minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tokens", type=int, default=4096, help="positions in a batch")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--problems", type=int, default=540, help="held-out problems of the final table")
    parser.add_argument("--state", default="tiny-llada-state.pt", help="where the resumable state goes")
    parser.add_argument("--resume", type=Path, help="a state file to go on from")
    parser.add_argument("--canvas", type=int, default=0, help="with --eval-only: at least this response length")
    parser.add_argument("--eval-only", action="store_true", help="print the table of the checkpoint in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.eval_only:
        family = FAMILIES[args.family]
        report(*load_checkpoint(args.out, family), family, args.problems, args.canvas)
        return
    if args.start and args.family != "dream":
        parser.error("--from: only a Dream starts from another checkpoint")
    if not (args.steps or args.minutes):
        parser.error("give --steps or --minutes")
    run = Run(args)
    if args.resume:
        run.load(args.resume)
    train(run, args.out)
    export(run, args.out, report(run.ema, run.tokenizer, run.family, args.problems))


if __name__ == "__main__":
    main()
