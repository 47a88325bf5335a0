"""Checks of a checkpoint's directory: everything that would otherwise show after the wait for the model to load."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice, starmap
from pathlib import Path
from typing import Any

from vllm_d2cache.doctor.finding import Finding
from vllm_d2cache.models.config_rules import (
    architecture_problem,
    family_of,
    mask_contradiction,
    refusal,
    unserved_problem,
)
from vllm_d2cache.models.quantisation import method_of, of_separate_file
from vllm_d2cache.models.safetensors_files import Weights, read_weights
from vllm_d2cache.models.tensor_rules import (
    REDUNDANT,
    dtype_problem,
    missing_modules,
    missing_problem,
    tensor_problem,
)
from vllm_d2cache.options.json_files import object_in
from vllm_d2cache.requests.generation_defaults import default_problems

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
    given = read_object(directory / "config.json")
    if isinstance(given, str):
        yield _problem("config.json", given)
        given = {}
    else:
        if given.get("quantization_config") is None:
            given["quantization_config"] = of_separate_file(lambda name: _object(directory / name))
        yield from _architecture(given)
    config = read_config(given)
    if config is not None:
        yield from _settings(config, given)
    elif family_of(given) is not None:
        yield _note("settings", "not checked: that needs transformers and torch")
    sound = config if config is not None and not config.unsupported() else None
    yield from _generation(directory, sound)
    yield from _weights(directory, memory, given, sound)
    yield from _tokenizer(directory, given, sound)


def read_config(given: dict[str, Any]) -> Any:
    """config.json as the class that vLLM will read it with; None where there is none, or nothing to read it with."""
    found = family_of(given)
    if found is None or find_spec("transformers") is None or find_spec("torch") is None:
        return None
    return found[1].config_class().from_dict(dict(given))


def read_object(path: Path) -> dict[str, Any] | str:
    """The object in a file, or what is wrong with it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return object_in(content, path.name)


def _object(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    content = read_object(path)
    return content if isinstance(content, dict) else {}


def _architecture(config: dict[str, Any]) -> Iterator[Finding]:
    found = family_of(config)
    if found is None:
        reason = architecture_problem(config.get("architectures"), config.get("model_type"))
        yield _problem("architecture", str(reason))
        return
    unserved = unserved_problem(config.get("architectures"))
    yield _ok("architecture", found[0]) if unserved is None else _problem("architecture", unserved)
    dtype = config.get("torch_dtype") or config.get("dtype")
    yield _ok("dtype", str(dtype)) if dtype else _note("dtype", "config.json names none; vLLM takes float32")


def _settings(config: Any, given: dict[str, Any]) -> Iterator[Finding]:
    """What the start says of them, and what of them matters to whoever starts it."""
    reasons = config.unsupported()
    if reasons:
        yield _problem("settings", refusal(reasons))
        return
    layers, longest = config.num_hidden_layers, config.shape().longest
    yield _ok("settings", f"{layers} layers, width {config.hidden_size}, at most {longest} positions")
    where = "" if "mask_token_id" in given else "; not in config.json: the family's own"
    yield _ok("mask token", f"id {config.mask_token_id}{where}")
    quantised = config.quantisation_note(method_of(getattr(config, "quantization_config", None)))
    yield from (_note("settings", text) for text in (*config.notes(), *([quantised] if quantised else [])))


def _generation(directory: Path, config: Any) -> Iterator[Finding]:
    """What the start says of generation_config.json, which a checkpoint need not have."""
    name = "generation_config.json"
    if not (directory / name).exists():
        return
    content = read_object(directory / name)
    if isinstance(content, str):
        yield _problem(name, content)
        return
    problems = default_problems(content, {}, config.generation_problems(content) if config is not None else None)
    yield _problem(name, "; ".join(problems)) if problems else _ok(name, f"{len(content)} keys")


def _weights(directory: Path, memory: int | None, given: dict[str, Any], config: Any) -> Iterator[Finding]:
    weights = read_weights(directory)
    problems = weights.problems or list(_tensors(weights, given, config))
    if problems:
        yield from (_problem("weights", text) for text in problems)
        return
    dtypes = ", ".join(sorted(set(weights.dtypes.values())))
    text = f"{len(weights.shapes)} tensors, {weights.num_bytes / 2**30:.2f} GiB, {dtypes}"
    if memory is not None and weights.num_bytes > memory:
        yield _problem("weights", f"{text}; more than the {memory / 2**30:.1f} GiB of memory available")
    else:
        yield _ok("weights", text)
    if config is not None and find_spec("vllm") is None:
        yield _note("weights", "names and shapes were not compared with the family's: that needs vLLM")


def _tensors(weights: Weights, given: dict[str, Any], config: Any) -> Iterator[str]:
    """The first of each kind of difference between the files and what the network is made of."""
    named = family_of(given)
    if named is None or config is None:
        return
    if given.get("quantization_config") is None:
        stored = ((name, dtype) for name, dtype in weights.dtypes.items() if not name.endswith(REDUNDANT))
        yield from islice(filter(None, starmap(dtype_problem, stored)), 1)
    if find_spec("vllm") is None:
        return
    architecture, family = named
    model = family.model_class()
    expected = model.tensor_shapes(config.shape())
    found = {name: shape for name, shape in weights.shapes.items() if not name.endswith(REDUNDANT)}
    not_needed = model.head_tensor if config.shape().tied_head else None
    if given.get("quantization_config") is not None:
        wrong: list[str | None] = [missing_modules(found, expected, not_needed)]
    else:
        each = (tensor_problem(name, shape, expected, architecture) for name, shape in found.items())
        wrong = [next((problem for problem in each if problem), None), missing_problem(found, expected, not_needed)]
    yield from (_shortened(problem) for problem in wrong if problem)


def _shortened(text: str) -> str:
    return text if len(text) < 300 else f"{text[:250]} ... ({text.count(',') + 1} of them)"


def _tokenizer(directory: Path, given: dict[str, Any], config: Any) -> Iterator[Finding]:
    group = next((files for files in _TOKENIZERS if all((directory / f).is_file() for f in files)), None)
    if group is None:
        yield _problem("tokenizer", "none of " + ", ".join("+".join(files) for files in _TOKENIZERS))
        return
    yield _ok("tokenizer", "+".join(group))
    settings = read_object(directory / "tokenizer_config.json")
    if isinstance(settings, str):
        yield _problem("tokenizer_config.json", settings)
        settings = {}
    family = family_of(given)
    if settings.get("chat_template") or (directory / "chat_template.jinja").is_file():
        yield _ok("chat template", "found")
    elif family is not None and family[1].chat_template is not None:
        yield _ok("chat template", "none in the checkpoint: the family's own is used")
    else:
        yield _note("chat template", "none: completions work, chat requests need --chat-template FILE")
    mask = given.get("mask_token_id") if config is None else config.mask_token_id
    contradiction = None if mask is None else mask_contradiction(settings, mask)
    if contradiction is not None:
        yield _problem("mask token", contradiction)
    if group == ("tokenizer.json",):
        yield from _special_tokens(directory, given)


def _special_tokens(directory: Path, given: dict[str, Any]) -> Iterator[Finding]:
    content = read_object(directory / "tokenizer.json")
    if isinstance(content, str):
        yield _problem("tokenizer.json", content)
        return
    tokens = content.get("added_tokens")
    tokens = [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
    mask = given.get("mask_token_id")
    named = [token.get("content") for token in tokens if token.get("id") == mask]
    if mask is not None and named:
        yield _ok("mask text", repr(named[0]))
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
