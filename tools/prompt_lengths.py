"""Count the tokens of real prompts, for benchmarks with random weights: benchmarks/gpu/data/prompt_lengths.json.

GSM8K with five worked examples before each question, HumanEval as it is; tokens of Qwen's vocabulary, which is Dream's
(LLaDA's is of the same size and kind). Needs tiktoken, the data sets as published, and Qwen's ranks file.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
from pathlib import Path

import tiktoken

OUT = Path(__file__).resolve().parents[1] / "benchmarks/gpu/data/prompt_lengths.json"
SHOTS = 5
MOST = 256  # of each workload
# How Qwen splits text before it is encoded: the rule published with the ranks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(path: Path) -> list[dict[str, str]]:
    """A JSON object a line."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with gsm8k_test.jsonl, gsm8k_train_head200.jsonl, HumanEval")
    parser.add_argument("ranks", type=Path, help="qwen.tiktoken")
    args = parser.parse_args()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, args.ranks.read_text().splitlines())}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    solved = [
        f"Question: {q['question']}\nAnswer: {q['answer']}" for q in read(args.data / "gsm8k_train_head200.jsonl")
    ]
    head = "\n\n".join(solved[:SHOTS])
    math = [f"{head}\n\nQuestion: {q['question']}\nAnswer:" for q in read(args.data / "gsm8k_test.jsonl")]
    code = [q["prompt"] for q in read(args.data / "HumanEval.jsonl.gz")]
    lengths = {
        name: [len(encoding.encode(prompt)) for prompt in prompts[:MOST]]
        for name, prompts in (("gsm8k", math), ("humaneval", code))
    }
    OUT.write_text(json.dumps(lengths) + "\n")


if __name__ == "__main__":
    main()
