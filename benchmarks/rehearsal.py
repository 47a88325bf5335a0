"""A rehearsal at real size without real weights: write a checkpoint, serve it, ask, stream, stop; count memory.

    make rehearse                                # LLaDA-8B, as many layers as fit into this machine's memory
    make rehearse ARGS="--models Dream-7B --layers 4"

The checkpoint has the published configuration, tensor names and shapes, in shards of 4 GB with an index, and weights of
chance: answers mean nothing. Its tokenizer is the small checkpoint's, with the published size and special tokens. The
server is stock `vllm serve`, without a flag but the port and the trace directory; on a CPU with room for 4 GiB of keys
and values, more than one longest request. Memory is what the processes of the server hold for themselves (proportional
set size, Linux only), beside the weights and the engine's own plan.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.engine import CONFIGS
from benchmarks.machine import caption, machine
from tools.serving import ServerError, server

ROOT = Path(__file__).resolve().parents[1]
SHARD = 4_000_000_000  # bytes
SPARE = 8_000_000_000  # of memory: the engine, its KV cache, the front end, the page cache
# By name: the small checkpoint whose tokenizer stands in, the layers' key in config.json, the published special tokens.
FAMILIES: dict[str, tuple[str, str, dict[str, int]]] = {
    "LLaDA-8B": (
        "tiny-llada", "n_layers",
        {"<|startoftext|>": 126080, "<|endoftext|>": 126081, "<|mdm_mask|>": 126336, "<|start_header_id|>": 126346,
         "<|end_header_id|>": 126347, "<|eot_id|>": 126348},
    ),
    "Dream-7B": (
        "tiny-dream", "num_hidden_layers",
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|beginoftext|>": 151665,
         "<|mask|>": 151666},
    ),
}  # fmt: skip


def tensors(name: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published checkpoints."""
    llada = name == "LLaDA-8B"
    width = config["d_model" if llada else "hidden_size"]
    hidden = config["mlp_hidden_size" if llada else "intermediate_size"]
    heads, kv_heads = (
        (config["n_heads"], config["n_kv_heads"])
        if llada
        else (config["num_attention_heads"], config["num_key_value_heads"])
    )
    narrow = width // heads * kv_heads
    vocabulary = (config["vocab_size"], width)
    if llada:
        yield from (("model.transformer.wte.weight", vocabulary), ("model.transformer.ff_out.weight", vocabulary))
        yield "model.transformer.ln_f.weight", (width,)
        base = "model.transformer.blocks.{}."
        names = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm")
    else:
        yield from (("model.embed_tokens.weight", vocabulary), ("lm_head.weight", vocabulary))
        yield "model.norm.weight", (width,)
        base = "model.layers.{}."
        attention = [f"self_attn.{part}_proj" for part in "qkvo"]
        mlp = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        names = (*attention, *mlp, "input_layernorm", "post_attention_layernorm")
    square, down = (width, width), (width, hidden)
    shapes = (square, (narrow, width), (narrow, width), square, (hidden, width), (hidden, width), down)
    for layer in range(config[FAMILIES[name][1]]):
        for part, shape in zip(names, (*shapes, (width,), (width,)), strict=True):
            yield f"{base.format(layer)}{part}.weight", shape
            if not llada and part.removeprefix("self_attn.") in ("q_proj", "k_proj", "v_proj"):
                yield f"{base.format(layer)}{part}.bias", (shape[0],)


def write_weights(directory: Path, name: str, config: dict[str, Any], console: Console) -> int:
    """Write the shards and their index; returns the bytes of all tensors. One shard is in memory at a time."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16()
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal held
        number = len(set(places.values())) + 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()
        held = 0

    with console.status("") as status:
        for tensor, shape in tensors(name, config):
            count = torch.Size(shape).numel()
            values = torch.ones(shape) if "norm" in tensor or "ln_f" in tensor else pattern[:count]
            if values.numel() < count:
                values = pattern.repeat(-(-count // pattern.numel()))[:count]
            shard[tensor] = values.reshape(shape).bfloat16().clone()
            held, total = held + 2 * count, total + 2 * count
            status.update(f"writing weights: {total / 1e9:.1f} GB")
            if held > SHARD:
                flush()
        if shard:
            flush()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_tokenizer(directory: Path, name: str, vocab_size: int) -> None:
    """The small checkpoint's tokenizer, filled up to the published size with words nobody writes."""
    small, _, special = FAMILIES[name]
    source = ROOT / "models" / small
    files = {path.name: json.loads(path.read_text()) for path in source.glob("*.json") if "token" in path.name}
    if "tokenizer.json" not in files:
        from transformers import Qwen2Tokenizer

        files["tokenizer.json"] = json.loads(Qwen2Tokenizer.from_pretrained(source).backend_tokenizer.to_str())
    model = files["tokenizer.json"]["model"]
    words = list(model["vocab"])
    taken = set(special.values())
    free = (index for index in range(vocab_size) if index not in taken)
    plain = [word for word in words if word not in special]
    vocab = {word: next(free) for word in plain}
    vocab |= {f"[unused {index}]": index for index in free} | special
    model["vocab"] = vocab
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    files["tokenizer.json"]["added_tokens"] = [
        {"id": index, "content": text, **added} for text, index in sorted(special.items(), key=lambda item: item[1])
    ]
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for key in ("added_tokens_decoder", "auto_map"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer.json").write_text(json.dumps(files["tokenizer.json"]))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def available_memory() -> int:
    """Bytes of memory that can be had now."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return 1024 * int(found.group(1))


def layers_that_fit(name: str, config: dict[str, Any], memory: int) -> int:
    """As many layers as memory holds beside the embeddings and what everything else takes; at most all."""
    key = FAMILIES[name][1]
    size = [sum(2 * torch.Size(s).numel() for _, s in tensors(name, {**config, key: count})) for count in (0, 1)]
    return int(max(0, min(config[key], (memory - SPARE - size[0]) // (size[1] - size[0]))))


def server_of(directory: Path) -> int:
    """The process that serves the checkpoint in ``directory``: the oldest whose command line names it."""
    word, found = os.fsencode(directory), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if word in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return min(found)


def held_by(pid: int) -> int:
    """Bytes that a process and its children hold, shared pages divided among those that share them."""
    pids = [pid]
    for parent in pids:
        children = Path(f"/proc/{parent}/task/{parent}/children")
        pids += [int(child) for child in children.read_text().split()] if children.exists() else []
    found = 0
    for one in pids:
        path = Path(f"/proc/{one}/smaps_rollup")
        text = path.read_text() if path.exists() else ""
        found += 1024 * sum(int(value) for value in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE))
    return found


@dataclass
class Rehearsal:
    """What one model took. Bytes and seconds."""

    model: str
    layers: int
    of_layers: int
    weights: int
    shards: int
    writing: float
    start: float = 0.0
    memory_ready: int = 0
    memory_after: int = 0
    chat: float = 0.0
    tokens: int = 0
    first_event: float = 0.0
    stream: float = 0.0
    stop: float = 0.0
    plan: tuple[str, ...] = ()


def ask(url: str, canvas: int, found: Rehearsal) -> None:
    """One chat request, then one stream, each with a small canvas in four steps."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800, max_retries=0)
    wishes: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": "Name the four seasons."}],
        "max_tokens": canvas,
        "extra_body": {"vllm_xargs": {"d2cache_steps": 4}, "ignore_eos": True},
    }
    begin = time.monotonic()
    found.tokens = client.chat.completions.create(**wishes).usage.completion_tokens
    found.chat = time.monotonic() - begin
    begin = time.monotonic()
    for number, _ in enumerate(client.chat.completions.create(**wishes, stream=True)):
        found.first_event = found.first_event if number else time.monotonic() - begin
    found.stream = time.monotonic() - begin


def rehearse(name: str, layers: int | None, canvas: int, console: Console) -> Rehearsal:
    """Write, serve, ask, stop."""
    key = FAMILIES[name][1]
    published = CONFIGS[name]
    wanted = layers or layers_that_fit(name, published, available_memory())
    if not 1 <= wanted <= published[key]:
        raise ServerError(
            f"{name}: no layer fits into {available_memory() / 1e9:.1f} GB; --layers must be 1 to {published[key]}"
        )
    config = {**published, key: wanted}
    with tempfile.TemporaryDirectory(prefix="d2cache-rehearsal-", dir=ROOT / "out") as scratch:
        directory, traces = Path(scratch) / name, Path(scratch) / "traces"
        directory.mkdir()
        traces.mkdir()
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        write_tokenizer(directory, name, config["vocab_size"])
        begin = time.monotonic()
        total = write_weights(directory, name, config, console)
        shards = len(list(directory.glob("*.safetensors")))
        found = Rehearsal(name, wanted, published[key], total, shards, time.monotonic() - begin)
        begin = time.monotonic()
        with server(str(directory), traces, console) as url:
            found.start = time.monotonic() - begin
            pid = server_of(directory)
            found.memory_ready = held_by(pid)
            ask(url, canvas, found)
            found.memory_after = held_by(pid)
            log = (traces / "server.log").read_text(errors="replace")
            begin = time.monotonic()
        found.stop = time.monotonic() - begin
        found.plan = tuple(re.findall(r"((?:KV cache|memory of [^:]+|batch|execution): .*)", log))
    return found


def show(found: list[Rehearsal], console: Console) -> str:
    """Print the table; returns it for a file."""
    heads = ("model", "layers", "weights, GB", "shards", "start, s", "held when ready, GB", "after two requests, GB",
             "chat, s", "tokens", "first event, s", "stream, s", "stop, s")  # fmt: skip
    rows = [
        (r.model, f"{r.layers} of {r.of_layers}", f"{r.weights / 1e9:.2f}", str(r.shards), f"{r.start:.0f}",
         f"{r.memory_ready / 1e9:.2f}", f"{r.memory_after / 1e9:.2f}", f"{r.chat:.1f}", str(r.tokens),
         f"{r.first_event:.1f}", f"{r.stream:.1f}", f"{r.stop:.1f}")
        for r in found
    ]  # fmt: skip
    table = Table("", *(row[0] for row in rows))
    for head, *cells in zip(heads[1:], *(row[1:] for row in rows), strict=True):
        table.add_row(head, *cells)
    console.print(table)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    for r in found:
        lines += ["", f"{r.model}, the engine's plan:", "", *(f"* {line}" for line in r.plan)]
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=["LLaDA-8B"])
    parser.add_argument("--layers", type=int, help="of each model (default: as many as fit into memory)")
    parser.add_argument("--canvas", type=int, default=16, help="max_tokens of the two requests (default: 16)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/rehearsal")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the server then, too
    if not Path("/proc/driver/nvidia/version").exists():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    console = Console()
    (ROOT / "out").mkdir(exist_ok=True)
    try:
        found = [rehearse(name, args.layers, args.canvas, console) for name in args.models]
    except ServerError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    facts = machine()
    text = f"{show(found, console)}\n\ncanvas {args.canvas}, four steps; weights of chance, bf16; {caption(facts)}\n"
    args.out.with_suffix(".md").write_text(text)
    record = {"machine": facts, "models": [asdict(r) for r in found]}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
