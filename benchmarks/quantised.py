"""What quantised weights cost in right answers: the small checkpoints' held-out problems, form by form.

    python -m benchmarks.quantised [--models DIR ...] [--problems N] [--out benchmarks/results/quantised]

Each form of a checkpoint is written to a temporary directory, by plain rounding to the nearest, without calibration. It
answers the same problems in an engine of its own, under full recompute with a threshold. Right is what equals the
answer. The difference is paired: it and its interval come from problems that one form gets right and the other wrong.

INT8 has activations in 8 bits too, and weights in 7 of the 8 (tests/reference/int8.py says why). INT4 has a scale for
every 32 weights of a row. FP8 stands for layers that need a GPU: weights are the numbers that e4m3 with a scale for
each row can hold, computed with in bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import caption, machine
from vllm_d2cache.cli.paired import Difference, difference

MODELS = ("models/tiny-llada", "models/tiny-dream")
OPTIONS = {"d2cache_policy": "full", "d2cache_threshold": 0.9}
FORMS = ("float32", "bf16", "INT8", "FP8", "INT4")
BASE = "bf16"
# The most points that a form may lose.
ALLOWED = {"INT8": 1.0, "FP8": 1.0, "INT4": 3.0}
_E4M3 = 448.0  # its largest number


def main() -> None:
    """Run every form of every checkpoint, print the table, write it and the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--problems", type=int, default=504)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantised"))
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    right = {model: _all_forms(Path(model), args.problems) for model in args.models}
    note = f"{args.problems} problems, {' '.join(f'{k} {v}' for k, v in OPTIONS.items())}; {caption(machine())}"
    text = markdown(right) + f"\n{note}\n"
    print(text)
    marks = {m: {f: "".join("01"[r] for r in marks) for f, marks in forms.items()} for m, forms in right.items()}
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".json").write_text(json.dumps({"right": marks, "machine": machine()}, indent=1) + "\n")


def markdown(right: dict[str, dict[str, list[bool]]]) -> str:
    """The table: a row for each form of each checkpoint.

    Args:
        right: checkpoint -> form -> whether each problem was answered right.
    """
    lines = [
        "| checkpoint | weights | right, % | from bf16, points [95 %] | gained, lost | McNemar's p | allowed loss |"
    ]
    lines.append("|---" * 7 + "|")
    for model, forms in right.items():
        for form, marks in forms.items():
            d: Difference = difference(marks, forms[BASE])
            cells = [Path(model).name, form, f"{100 * sum(marks) / len(marks):.1f}"]
            cells += ["", "", ""] if form == BASE else [str(d), f"{d.gained}, {d.lost}", f"{d.p_value:.2g}"]
            lines.append(f"| {' | '.join([*cells, _verdict(form, d)])} |")
    return "\n".join(lines) + "\n"


def _verdict(form: str, d: Difference) -> str:
    if form not in ALLOWED:
        return ""
    return f"{ALLOWED[form]:g}: {'kept' if d.points >= -ALLOWED[form] else 'not kept'}"


def _all_forms(model: Path, problems: int) -> dict[str, list[bool]]:
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for form in FORMS:
            found[form] = _answers(*_write(model, Path(scratch) / form, form), problems)
            print(f"{model.name}, {form}: {sum(found[form])} of {problems}", file=sys.stderr, flush=True)
    return found


def _write(model: Path, directory: Path, form: str) -> tuple[Path, str]:
    """The checkpoint in that form, and the dtype of what is not quantised."""
    from tests.reference.int4 import write_int4
    from tests.reference.int8 import write_int8

    if form == "float32":
        return model, "float32"
    shutil.copytree(model, directory)
    if form == "INT8":
        write_int8(model, directory)
    elif form == "INT4":
        write_int4(model, directory, "compressed-tensors")
    elif form == "FP8":
        _rewrite(directory, _in_fp8)
    return directory, "bfloat16"


def _rewrite(directory: Path, change: Callable[[Any], Any]) -> None:
    """Replace the matrices of the layers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    changed = {
        name: change(t) if t.ndim == 2 and (".layers." in name or ".blocks." in name) else t
        for name, t in tensors.items()
    }
    save_file(changed, directory / "model.safetensors", {"format": "pt"})


def _in_fp8(weight: Any) -> Any:
    """[n, d]: the nearest numbers that FP8 (e4m3) with a scale for each row can hold."""
    import torch

    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / _E4M3
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


def _answers(model: Path, dtype: str, problems: int) -> list[bool]:
    """Whether each problem is answered right."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from tools.tiny_tasks import held_out

    asked = held_out(problems)
    llm = LLM(model=str(model), dtype=dtype, max_model_len=512, max_num_batched_tokens=4096, max_num_seqs=32)
    chats: list[Any] = [[{"role": "user", "content": problem.prompt}] for problem in asked]
    params = [SamplingParams(temperature=0, max_tokens=problem.canvas, extra_args=dict(OPTIONS)) for problem in asked]
    outputs = llm.chat(chats, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [o.outputs[0].text.strip() == p.answer.strip() for o, p in zip(outputs, asked, strict=True)]


if __name__ == "__main__":
    main()
