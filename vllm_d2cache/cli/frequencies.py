"""Count the tokens of a text file, as a model's tokenizer cuts it: the table of corpus frequencies for decoder pc."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint with a tokenizer")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text, a document a line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="where to write the table")


def run(args: argparse.Namespace) -> int:
    """Write the table."""
    import numpy as np

    from vllm_d2cache.cli import UsageError
    from vllm_d2cache.decoders.frequencies import count_frequencies

    config = args.model / "config.json"
    for path in (config, args.text):
        if not path.is_file():
            raise UsageError(f"no such file: {path}")
    if args.out.suffix != ".npy":
        raise UsageError(f"--out must end in .npy, got {args.out}")
    vocab_size = json.loads(config.read_text())["vocab_size"]
    try:
        table = count_frequencies(_documents(args.model, args.text), vocab_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    np.save(args.out, table)
    seen = int((table > table.min()).sum())
    print(f"{args.out}: {vocab_size} tokens, of which {seen} occur more than once in {args.text}")
    return 0


def _documents(model: Path, text: Path) -> Iterator[list[int]]:
    """Token ids of each line, without the tokens a tokenizer adds at its ends."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            yield tokenizer.encode(line, add_special_tokens=False)
