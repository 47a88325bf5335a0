"""Run cache policies and decoders on the same prompts, in one engine, and compare what they give and what they take.

Every pair of a policy and a decoder is run. A policy or decoder may carry options: eb:gamma=0.1 or
d2cache:current_k=16,rollout_p=0.2. Full recompute is always run, as the others are compared with it.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_d2cache.cli import UsageError
from vllm_d2cache.config import SECTION, parse_server_options

_PROMPTS_HELP = (
    'JSON lines: {"prompt": TEXT} or {"messages": [...]}, "max_tokens": N, and maybe "answer": TEXT, which a response '
    "must equal to be right; absent: a few general questions"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory or name")
    parser.add_argument("--policies", nargs="+", metavar="NAME[:KEY=VALUE,...]", help="default: all there are")
    parser.add_argument(
        "--decoders", nargs="+", metavar="NAME[:KEY=VALUE,...]", help="default: all that can run (pc needs a table)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=_PROMPTS_HELP)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="requests at a time (default 1)")
    parser.add_argument("--token-frequencies", metavar="FILE.npy", help="corpus table for decoder pc")
    parser.add_argument("--dtype", default="auto", help="as vLLM's (default auto)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="as vLLM's")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures, and a table beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .svg or .pdf; needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Run the grid, print the table."""
    from vllm_d2cache.cli import grid, report

    _check_outputs(args)
    policies, decoders = _settings(args)
    # The figures are the engine's own counters, so it has to run in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    llm = _engine(args)
    prompts = grid.read_prompts(args.prompts, llm.get_tokenizer().chat_template is not None)
    cells = _run_cells(llm, prompts, policies, decoders, args.batch == 1)

    from vllm_d2cache.cli.machine import machine

    facts = machine()
    notes = report.notes_of(cells, facts, args.model, len(prompts), args.batch)
    print(report.text_table(cells))
    print(*notes, sep="\n")
    if args.out:
        about = {"model": args.model, "prompts": str(args.prompts or "built in"), "batch": args.batch}
        report.write_json(args.out, cells, facts, about)
        args.out.with_suffix(".md").write_text(report.markdown_table(cells, notes))
    if args.plot:
        report.plot(cells, args.plot, f"{args.model}, {len(prompts)} prompts, {facts['device']}")
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse now what would fail after an hour."""
    if args.batch < 1:
        raise UsageError(f"--batch must be >= 1, got {args.batch}")
    if args.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'vllm-d2cache[plot]'")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot must end in .png, .svg or .pdf, got {args.plot}")
    if args.out and args.out.suffix != ".json":
        raise UsageError(f"--out must end in .json, got {args.out}")
    for path in (args.out, args.plot):
        if path and not path.parent.is_dir():
            raise UsageError(f"no such directory: {path.parent}")
    if args.prompts and not args.prompts.is_file():
        raise UsageError(f"no such file: {args.prompts}")


def _settings(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Policies, full recompute first, and decoders."""
    from vllm_d2cache.cli.grid import Setting, check
    from vllm_d2cache.policies import POLICY_CLASSES
    from vllm_d2cache.samplers import DECODER_CLASSES

    decoders = args.decoders or [d for d in DECODER_CLASSES if d != "pc" or args.token_frequencies]
    policies = [p for p in args.policies or POLICY_CLASSES if p != "full"]
    made = (
        [Setting.parse("policy", text) for text in dict.fromkeys(["full", *policies])],
        [Setting.parse("decoder", text) for text in dict.fromkeys(decoders)],
    )
    server = parse_server_options({"token_frequencies": args.token_frequencies})
    check([{**policy.options, **decoder.options} for policy in made[0] for decoder in made[1]], server)
    return made


def _engine(args: argparse.Namespace) -> Any:
    from vllm import LLM

    options = {"token_frequencies": args.token_frequencies}
    return LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.batch,
        additional_config={SECTION: options},
    )


def _run_cells(llm: Any, prompts: list[Any], policies: list[Any], decoders: list[Any], one_by_one: bool) -> list[Any]:
    """The cells, compared with full recompute under the same decoder."""
    from tqdm import tqdm

    from vllm_d2cache.cli.grid import Cell, measure
    from vllm_d2cache.compat.internals import in_process_model_state

    counters = in_process_model_state(llm).denoiser.counters
    cells: list[Cell] = []
    with tqdm(total=len(policies) * len(decoders) * len(prompts), unit="request", disable=None) as bar:
        for decoder in decoders:
            for policy in policies:
                bar.set_description(f"{policy.label}, {decoder.label}")
                cells.append(measure(llm, counters, prompts, policy, decoder, one_by_one, bar.update))
                cells[-1].compare(cells[-1] if policy is policies[0] else _full(cells, decoder.label), prompts)
    return cells


def _full(cells: list[Any], decoder: str) -> Any:
    return next(cell for cell in cells if (cell.policy, cell.decoder) == ("full", decoder))
