"""Checks of a checkpoint's directory: everything that would otherwise show after the wait for the model to load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_d2cache.doctor.finding import Finding
from vllm_d2cache.doctor.safetensors_files import read_weights
from vllm_d2cache.models.families import FAMILIES, Family
from vllm_d2cache.models.mask_token import mask_contradiction

# What a tokenizer can be made of: each group of files will do.
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


def check_model(directory: Path, memory: int | None) -> Iterator[Finding]:
    """All findings of the section.

    Args:
        memory: bytes of the device's memory, or None if unknown.
    """
    if not directory.is_dir():
        yield _problem("directory", f"{directory} is not a directory; download the checkpoint and name where it is")
        return
    found = _json(directory / "config.json")
    config = None if isinstance(found, str) else found
    if isinstance(found, str):
        yield _problem("config.json", found)
    else:
        yield from _architecture(found)
    yield from _weights(directory, memory)
    yield from _tokenizer(directory, config)


def _json(path: Path) -> dict[str, Any] | str:
    """The object in a file, or what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read: {error}"
    return content if isinstance(content, dict) else f"{path.name} is not a JSON object"


def _architecture(config: dict[str, Any]) -> Iterator[Finding]:
    names, known = config.get("architectures") or [], _known(config)
    if not known:
        served = ", ".join(name for name, family in FAMILIES.items() if family.unserved is None)
        yield _problem("architecture", f"{names or 'none given'}; supported: {served}")
        return
    unserved = FAMILIES[known[0]].unserved
    if unserved is None:
        yield _ok("architecture", known[0])
    else:
        yield _problem("architecture", f"{known[0]} cannot be served yet: {unserved}")
    dtype = config.get("torch_dtype") or config.get("dtype")
    yield _ok("dtype", str(dtype)) if dtype else _note("dtype", "config.json names none; vLLM takes float32")
    if find_spec("transformers") is None or find_spec("torch") is None:
        yield _note("settings", "not checked: that needs transformers and torch")
        return
    yield from _settings(config, FAMILIES[known[0]])


def _known(config: dict[str, Any]) -> list[str]:
    """Those of its architectures that are ours."""
    return [name for name in config.get("architectures") or [] if name in FAMILIES]


def _settings(config: dict[str, Any], family: Family) -> Iterator[Finding]:
    """By the class that vLLM will read the file with; the one check that imports torch."""
    valid = (family.model_type, *family.other_types)
    if config.get("model_type") not in valid:
        yield _problem("model_type", f"{config.get('model_type')!r}; must be {' or '.join(valid)}")
        return
    try:
        parsed = family.config_class().from_dict(config)
        unsupported = parsed.unsupported()
    except Exception as error:  # whatever the file's values make of it, vLLM would raise the same
        yield _problem("settings", f"config.json is refused: {error}")
        return
    if unsupported:
        yield _problem("settings", "not supported: " + "; ".join(unsupported))
    else:
        layers, longest = parsed.num_hidden_layers, parsed.max_position_embeddings
        yield _ok("settings", f"{layers} layers, width {parsed.hidden_size}, at most {longest} positions")
    mask, vocab = parsed.mask_token_id, parsed.vocab_size
    if not isinstance(mask, int) or not 0 <= mask < vocab:
        yield _problem("mask token", f"mask_token_id {mask!r} is not in the vocabulary of {vocab}")
    else:
        where = "" if "mask_token_id" in config else "; not in config.json: the family's own"
        yield _ok("mask token", f"id {mask}{where}")


def _weights(directory: Path, memory: int | None) -> Iterator[Finding]:
    weights = read_weights(directory)
    if weights.problems:
        yield from (_problem("weights", text) for text in weights.problems)
        return
    text = f"{weights.tensors} tensors, {weights.num_bytes / 2**30:.2f} GiB, {', '.join(sorted(weights.dtypes))}"
    if memory is not None and weights.num_bytes > memory:
        yield _problem("weights", f"{text}; more than the {memory / 2**30:.1f} GiB of memory available")
    else:
        yield _ok("weights", text)


def _tokenizer(directory: Path, config: dict[str, Any] | None) -> Iterator[Finding]:
    group = next((files for files in _TOKENIZERS if all((directory / f).is_file() for f in files)), None)
    if group is None:
        yield _problem("tokenizer", "none of " + ", ".join("+".join(files) for files in _TOKENIZERS))
        return
    yield _ok("tokenizer", "+".join(group))
    settings = _json(directory / "tokenizer_config.json")
    if isinstance(settings, str):
        yield _problem("tokenizer_config.json", settings)
        settings = {}
    has_template = settings.get("chat_template") or (directory / "chat_template.jinja").is_file()
    if has_template:
        yield _ok("chat template", "found")
    elif any(FAMILIES[name].chat_template for name in _known(config or {})):
        yield _note("chat template", "none: that of its family is used")
    else:
        yield _note("chat template", "none: completions work, chat requests need --chat-template FILE")
    mask = (config or {}).get("mask_token_id")
    contradiction = None if mask is None else mask_contradiction(settings, mask)
    if contradiction is not None:
        yield _problem("mask token", contradiction)
    if group == ("tokenizer.json",):
        yield from _special_tokens(directory, config or {})


def _special_tokens(directory: Path, config: dict[str, Any]) -> Iterator[Finding]:
    content = _json(directory / "tokenizer.json")
    if isinstance(content, str):
        yield _problem("tokenizer.json", content)
        return
    added = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    mask = config.get("mask_token_id")
    if mask in added:
        yield _ok("mask text", repr(added[mask]))
    elif mask is not None:
        yield _note(
            "mask text", f"id {mask} is no added token of the tokenizer; a wrong mask gives nonsense, not errors"
        )


def _ok(name: str, text: str) -> Finding:
    return Finding("ok", "model", name, text)


def _note(name: str, text: str) -> Finding:
    return Finding("note", "model", name, text)


def _problem(name: str, text: str) -> Finding:
    return Finding("problem", "model", name, text)
