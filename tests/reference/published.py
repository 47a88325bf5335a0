"""One request, denoised in plain loops: an oracle for the StepRunner and for the engine.

Sections 2 to 4 of docs/methods/d2cache.md at batch size one, with the decisions of docs/architecture.md (window's
own length, only recomputed
positions are committed, ties to the lower position, no mask token). Nothing of the package's decoding rules is used.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from tests.reference.dense import DenseModel
from vllm_d2cache.options.request import RequestOptions

Steps = list[tuple[list[int] | None, list[tuple[int, int]]]]


@dataclass
class Prediction:
    """What the model says of one canvas slot."""

    token: int
    score: float


def denoise(model: DenseModel, prompt: list[int], canvas: int, options: RequestOptions) -> tuple[Steps, list[int]]:
    """The steps (refreshed positions, or None for all; committed slots with tokens) and the final canvas."""
    start, shift, mask = len(prompt), model.logit_shift, model.config["mask_token_id"]
    total = start + canvas
    tokens = prompt + [mask] * canvas
    masked, memory = set(range(canvas)), {}
    width = min(options.window or canvas, canvas)
    active, steps = list(range(total)), []
    model.reset(total)
    while masked:
        ids, rows = torch.tensor(tokens)[active], torch.tensor(active)
        hidden, maps = model.forward(ids, rows)
        row_of = {position: i for i, position in enumerate(active)}
        seen = {g: row_of[start + g - shift] for g in masked if start + g - shift in row_of}
        predictions = {g: predict(model.lm_head(hidden[i : i + 1])[0], mask, options) for g, i in seen.items()}

        window = range(min(masked) // width * width, min(masked) // width * width + width)
        known = [g not in masked for g in range(canvas)]
        prior = density(known, options.sigma)
        scores = {g: p.score * prior[g] for g, p in predictions.items() if g in window}
        chosen = commit(scores, options)
        if not memory:
            memory = dict.fromkeys(range(canvas), 0.0) | {g: p.score for g, p in predictions.items()}
        elif options.policy_options.get("confidence_memory") == "latest":
            memory |= {g: p.score for g, p in predictions.items()}
        for g in chosen:
            tokens[start + g] = predictions[g].token
        masked -= set(chosen)
        pairs = [(g, predictions[g].token) for g in sorted(chosen)]
        steps.append((None if len(active) == total else active, pairs))
        if options.policy == "d2cache":
            selected = select(memory, masked, window, canvas, options)
            active = refresh_set(selected, chosen, importance(maps, rows), start, shift, options)
    return steps, tokens[start:]


def predict(logits: torch.Tensor, mask: int, options: RequestOptions) -> Prediction:
    """Section 2, step 4, greedy."""
    if options.confidence_top_p < 1:
        order = logits.argsort(descending=True, stable=True)
        mass = logits[order].softmax(-1).cumsum(-1)
        kept = 1 + int((mass[:-1] <= options.confidence_top_p).sum())
        logits = torch.full_like(logits, torch.finfo(logits.dtype).min).index_copy(
            0, order[:kept], logits[order[:kept]]
        )
    probabilities = logits.softmax(-1)
    ranked = probabilities.sort(descending=True).values
    allowed = logits.clone()
    allowed[mask] = -torch.inf
    token = int(allowed.argmax())
    score = {
        "confidence": float(probabilities[token]),
        "margin": float(ranked[0] - ranked[1]),
        "entropy": math.exp(float((probabilities * (probabilities + 1e-10).log()).sum())),
    }[options.score]
    return Prediction(token, score)


def density(known: list[bool], sigma: float) -> list[float]:
    """Section 3.2, by direct summation."""
    n = len(known)
    if sigma == 0:
        return [1.0] * n
    extended = [True] * n + known + [known[-1]] * n
    phi = [math.exp(-((d / sigma) ** 2) / 2) for d in range(3 * n + 1)]
    norm = max(1e-8, sum(phi[abs(d)] for d in range(-3 * n, 3 * n)))
    return [sum(phi[abs(g + n - j)] for j, flag in enumerate(extended) if flag) / norm for g in range(n)]


def commit(scores: dict[int, float], options: RequestOptions) -> list[int]:
    """Section 4: fixed count, threshold, factor."""
    order = sorted(scores, key=lambda g: (-scores[g], g))
    count = min(options.tokens_per_step, len(order))
    if options.threshold:
        count = max(count, sum(scores[g] >= options.threshold for g in order))
    if options.factor:
        stops = [n for n, g in enumerate(order, 1) if (n + 1) * (1 - scores[g]) >= options.factor]
        count = max(count, (stops[0] if stops else len(order)) - 1)
    return order[:count]


def select(memory: dict[int, float], masked: set[int], window: range, canvas: int, options: RequestOptions) -> set[int]:
    """Section 3.3: the masked slots whose logits are wanted next."""
    prior = density([g not in masked for g in range(canvas)], options.value("selection_sigma"))
    score = [memory[g] * prior[g] for g in range(canvas)]
    bonus = max(score)
    score = [s + bonus if g in window else s for g, s in enumerate(score)]
    remaining = sorted(masked)
    last = remaining[options.value("current_k") - 1] if len(remaining) >= options.value("current_k") else canvas - 1
    end = (last // len(window) + 1) * len(window)
    eligible = [g for g in remaining if window.start <= g < end]
    return set(sorted(eligible, key=lambda g: (-score[g], g))[: options.value("current_k")])


def importance(maps: list[torch.Tensor], rows: torch.Tensor) -> list[float]:
    """Section 3.4, with the matrices written out."""
    total = maps[0].shape[1]
    product = torch.eye(total, dtype=torch.float64)
    for attention in maps:
        layer = torch.eye(total, dtype=torch.float64)
        layer[rows] += attention.double()
        product = layer / layer.sum(1, keepdim=True) @ product
    return product.sum(0).tolist()


def refresh_set(
    selected: set[int],
    committed: list[int],
    weight: list[float],
    start: int,
    shift: int,
    options: RequestOptions,
) -> list[int]:
    """Section 3.5, points 1 to 4."""
    certain = {start + g - shift for g in selected if g >= shift} | {start + g for g in committed}
    others = sorted((j for j in range(len(weight)) if j not in certain), key=lambda j: (-weight[j], j))
    mass, head = 0.0, 0
    whole = sum(weight[j] for j in others) + 1e-9
    for j in others:
        mass += weight[j] / whole
        head += mass <= options.value("rollout_p") or options.value("rollout_p") >= 1
    chosen = certain | set(others[: max(1, head)])
    if shift:
        chosen = chosen | {start - 1} if 0 in selected else chosen - {start - 1}
    ordered = sorted(chosen)
    for a, z in itertools.pairwise(ordered):
        if z - a <= options.value("inflate_w"):
            chosen |= set(range(a, z))
    return sorted(chosen)
