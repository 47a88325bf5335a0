"""Train the tiny checkpoints of this repository on the tasks of tiny_tasks.py, on CPU, in about an hour each.

    python tools/train_tiny.py --out models/tiny-llada --steps 6000     # train, export, report
    python tools/train_tiny.py --out models/tiny-llada --eval-only      # reprint the held-out table
    python tools/train_tiny.py --again models/tiny-llada --out out/llada --minutes 60                # train on
    python tools/train_tiny.py --family dream --from models/tiny-llada --out models/tiny-dream --steps 1500
    python tools/train_tiny.py --family sdar --from models/tiny-llada --out models/tiny-sdar --minutes 80

The model is a bidirectional llama-type transformer with the config keys and tensor names of its family; Dream's logits
are shifted: a slot is predicted at the position on its left; SDAR's text is block-causal. tiny_data.py has the
objective, tiny_blocks.py that of blocks. Matrix products are in bfloat16, weights and sums in float32. An interrupted
run goes on from its state file with --resume.

A run by --steps depends on its seed only. With --minutes the schedule follows whichever of the two budgets
is further spent, so that the run ends in time on a slow machine; training.json says whether that happened.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import tiny_dream
import tiny_llada
import tiny_sdar
import tiny_tasks
from tiny_data import Source, pool
from tiny_model import Family, TinyLM, evaluate
from tiny_optim import Muon

FAMILIES: dict[str, Family] = {"llada": tiny_llada.LLADA, "dream": tiny_dream.DREAM, "sdar": tiny_sdar.SDAR}
STARTS = {"dream": tiny_dream.start_from_llada, "sdar": tiny_sdar.start_from_llada}
"""Families that start from the tiny LLaDA's weights."""
# With, a canvas length's problems are cut into this many parts by prompt length, and each is shuffled.
MIXED_PARTS = 5
Report = dict[str, dict[str, float]]


def report(model: TinyLM, tokenizer: Tokenizer, family: Family, count: int, canvas: int = 0) -> Report:
    """Print and return the held-out table for plain confidence and for the certainty prior (sigma 10).

    `canvas` replaces the problems' own canvas where it is larger.
    """
    problems = [replace(p, canvas=max(p.canvas, canvas)) for p in tiny_tasks.held_out(count, seed=1)]
    table = {f"sigma={s:g}": evaluate(model, tokenizer, family, problems, s) for s in family.sigmas}
    print(f"held-out exact match in %, {count} problems, full recompute")
    print("| kind | " + " | ".join(table) + " |\n|---|" + "---|" * len(table))
    for kind in table["sigma=0"]:
        print(f"| {kind} | " + " | ".join(f"{100 * scores[kind]:.1f}" for scores in table.values()) + " |")
    return table


class Run:
    """Everything that changes during training, so that it can be saved and resumed."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.family = FAMILIES[args.family]
        self.tokenizer = self.family.load_tokenizer(args.again) if args.again else self.family.build_tokenizer()
        self.source = Source(self.tokenizer, self.family, args.tokens, curriculum=not (args.start or args.again))
        self.eos, self.mask_id = (self.tokenizer.token_to_id(t) for t in (self.family.eos, self.family.mask))
        self.model, self.ema = TinyLM(self.family.config), TinyLM(self.family.config)
        if args.again:
            self.model.load_state_dict(load_checkpoint(args.again, self.family)[0].state_dict())
        elif args.start:
            STARTS[args.family](self.model, *load_checkpoint(args.start, tiny_llada.LLADA), self.tokenizer)
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

    def update(self, batch: Any, progress: float) -> float:
        """One optimiser step and the moving average of the weights; returns the loss."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
        loss = self.family.loss(self.model, batch, self.eos, self.mask_id, generator)
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
    sample = [
        p for p in tiny_tasks.held_out(6 * len(tiny_tasks.KINDS), seed=7) if p.canvas <= 48
    ]  # long ones would take minutes
    bar = tqdm(total=args.steps, initial=run.step, mininterval=10)
    progress = run.progress(run.minutes)
    while progress < 1:
        for batch in pool(run.source, f"{args.seed}-{run.pools}", progress):
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
            with torch.autocast("cpu", torch.bfloat16):
                scores = evaluate(run.ema, run.tokenizer, run.family, sample, run.family.sigmas[-1])
            run.scores.append((run.step, run.minutes, scores))
            recent = [loss for _, loss in run.losses[-200:]]
            cells = " ".join(f"{kind} {100 * value:.0f}" for kind, value in scores.items())
            tqdm.write(f"step {run.step} loss {sum(recent) / len(recent):.4f} | {cells}")
            run.save(Path(args.state))
            if scores["all"] > 0.3:
                export(run, out, {f"sigma={run.family.sigmas[-1]:g}, {len(sample)} short problems": scores})
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
        "family": args.family, "started_from": str(args.start or args.again or "nothing"),
        "seed": args.seed, "steps": run.step, "planned_steps": args.steps,
        "schedule_cut_by_time": run.accelerated,
        "masking": "half of the rows anywhere, half right of a place" + (
            f", in every block of {run.model.config.block}" if run.model.config.block else ""
        ),
        "matrix_products": "bfloat16",
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
    for kind in (*tiny_tasks.KINDS, "all"):
        values = [100 * scores.get(kind, 0.0) for _, _, scores in run.scores]
        style = {"color": "black", "linewidth": 2.5} if kind == "all" else {"linewidth": 1}
        right.plot([step for step, _, _ in run.scores], values, label=kind, **style)
    title = f"held-out problems, sigma {run.family.sigmas[-1]:g}"
    right.set(xlabel="step", ylabel="exact match (%)", title=title, ylim=(0, 101))
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


def keep_memory() -> None:
    """Tell glibc to keep freed memory: a training step frees and takes hundreds of megabytes.

    By default its pages go back to the kernel and are faulted in again, in every step. Other C libraries have no such
    call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--family", choices=FAMILIES, default="llada")
    parser.add_argument("--from", dest="start", type=Path, help="a tiny LLaDA whose weights to start from")
    parser.add_argument("--again", type=Path, help="a checkpoint of the family to start from")
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
    keep_memory()
    if args.eval_only:
        family = FAMILIES[args.family]
        report(*load_checkpoint(args.out, family), family, args.problems, args.canvas)
        return
    if args.start and args.family not in STARTS:
        parser.error(f"--from: only {' and '.join(STARTS)} start from another checkpoint")
    if not (args.steps or args.minutes):
        parser.error("give --steps or --minutes")
    run = Run(args)
    if args.resume:
        run.load(args.resume)
    train(run, args.out)
    export(run, args.out, report(run.ema, run.tokenizer, run.family, args.problems))


if __name__ == "__main__":
    main()
