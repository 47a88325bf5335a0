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
from vllm_d2cache.cli.grid import Cell, Prompt, Setting, general_questions, measure, pairs_of, read_prompts
from vllm_d2cache.compat.internals import model_file
from vllm_d2cache.decoders.frequencies import load_frequencies
from vllm_d2cache.doctor.model_directory import read_config, read_object
from vllm_d2cache.options.request import SECTION
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.resolve import parse_server_options

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
    parser.add_argument("--note", metavar="TEXT", help="a line to write under the table")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures, and a table beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .svg or .pdf; needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Run the grid, print the table."""
    from vllm_d2cache.cli import report

    _check_outputs(args)
    pairs, skipped = _pairs(args)
    for line in skipped:
        print(f"left out: {line}")
    prompts = read_prompts(args.prompts) if args.prompts else None
    # The figures are the engine's own counters, so it has to run in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    llm = _engine(args)
    prompts = prompts or general_questions(llm.get_tokenizer().chat_template is not None)
    cells = _run_cells(llm, prompts, pairs, args.batch == 1)

    from vllm_d2cache.cli.machine import machine

    facts = machine()
    notes = report.notes_of(cells, facts, args.model, len(prompts), args.batch)
    notes += [args.note] if args.note else []
    print(report.text_table(cells))
    print(*notes, sep="\n")
    if args.out:
        about = {
            "model": args.model,
            "prompts": str(args.prompts or "built in"),
            "batch": args.batch,
            "note": args.note,
        }
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
    if args.token_frequencies:
        try:
            load_frequencies(args.token_frequencies)
        except OptionError as error:
            raise UsageError(str(error)) from error


def _pairs(args: argparse.Namespace) -> tuple[list[tuple[Setting, Setting]], list[str]]:
    """What is run, full recompute first of every decoder, and what cannot be."""
    from vllm_d2cache.decoders import DECODER_CLASSES
    from vllm_d2cache.policies import POLICY_CLASSES

    policies = [p for p in args.policies or POLICY_CLASSES if p != "full"]
    decoders = args.decoders or [d for d in DECODER_CLASSES if d != "pc" or args.token_frequencies]
    server = parse_server_options({**_family_options(args.model), "token_frequencies": args.token_frequencies})
    return pairs_of(
        [Setting.parse("policy", text) for text in dict.fromkeys(["full", *policies])],
        [Setting.parse("decoder", text) for text in dict.fromkeys(decoders)],
        server,
        (bool(args.policies), bool(args.decoders)),
    )


def _family_options(model: str) -> dict[str, Any]:
    """The options that the engine will have of the model's family; none where only the engine can say what is wrong.

    Raises:
        UsageError: a directory's config.json cannot be read.
    """
    if Path(model).is_dir():
        given = read_object(Path(model) / "config.json")
        if isinstance(given, str):
            raise UsageError(f"--model {model}: {given}")
    else:
        given = model_file(model, "config.json", None)
    config = read_config(given)
    block = config.traits().block_length if config is not None and not config.unsupported() else None
    return {**config.decoding_defaults(), "block_length": block} if block else {}


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


def _run_cells(llm: Any, prompts: list[Prompt], pairs: list[tuple[Setting, Setting]], one_by_one: bool) -> list[Cell]:
    """The cells, compared with full recompute under the same decoder."""
    from tqdm import tqdm
    from vllm.exceptions import VLLMValidationError

    from vllm_d2cache.compat.internals import in_process_model_state

    counters = in_process_model_state(llm).steps.counters
    cells: list[Cell] = []
    full: dict[str, Cell] = {}
    with tqdm(total=len(pairs) * len(prompts), unit="request", disable=None) as bar:
        for policy, decoder in pairs:
            bar.set_description(f"{policy.label}, {decoder.label}")
            try:
                cell = measure(llm, counters, prompts, policy, decoder, one_by_one, bar.update)
            except VLLMValidationError as error:  # a prompt that does not fit
                raise UsageError(f"{policy.label}, {decoder.label}: {error}") from error
            same_decoder = full.setdefault(decoder.label, cell)
            cell.compare(same_decoder, prompts)
            cells.append(cell)
            cell.set_against(cells[0] if cell is same_decoder else same_decoder)
    return cells
