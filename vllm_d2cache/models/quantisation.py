"""Which quantised weights are loaded, and which of them were ever tried: for the start, `--quantization` and doctor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# vLLM's names of a method, by what its checkpoints are made with; some of vLLM's releases lack some of them.
_FP8 = ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
_AWQ = ("awq", "awq_marlin", "auto_awq")
_GPTQ = ("gptq", "gptq_marlin", "auto_gptq")
METHODS = ("compressed-tensors", *_AWQ, *_GPTQ, *_FP8, "bitsandbytes")


def _one_of(*values: object) -> tuple[Callable[[object], bool], str]:
    """Whether a value is one of these, of their type (1 is not true), and they in words."""
    words = ", ".join("true" if v is True else "false" if v is False else str(v) for v in values)
    return lambda value: any(type(value) is type(v) and value == v for v in values), words


def _is_group_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value > 0)


_Rule = tuple[tuple[str, ...], Callable[[object], bool], str]
_GROUP_SIZE = (_is_group_size, "a whole number of at least 1, or -1 for one group")
# Method of a config.json -> settings that it must have: their names, whether a value will do, and the valid ones.
_NEEDED: dict[str, tuple[_Rule, ...]] = {
    "gptq": (
        (("bits",), *_one_of(2, 3, 4, 8)),
        (("group_size",), *_GROUP_SIZE),
        (("desc_act",), *_one_of(True, False)),
        (("sym",), *_one_of(True, False)),
    ),
    "awq": (
        (("w_bit", "bits"), *_one_of(4, 8)),
        (("q_group_size", "group_size"), *_GROUP_SIZE),
        (("zero_point",), *_one_of(True, False)),
    ),
    "fp8": ((("activation_scheme",), *_one_of("static", "dynamic")),),
}

# Where older GPTQ checkpoints say how they are quantised, in the place of config.json.
SEPARATE_FILE = "quantize_config.json"


def of_separate_file(read: Callable[[str], Mapping[str, Any]]) -> dict[str, Any] | None:
    """The quantization_config that the file stands for; None where there is none.

    Args:
        read: a JSON file of the checkpoint, by its name; empty if there is none.
    """
    content = read(SEPARATE_FILE)
    return {"quant_method": "gptq", **content} if content else None


def method_of(settings: object) -> str | None:
    """The method that a quantization_config names; None without one."""
    if settings is None:
        return None
    return str(settings.get("quant_method")) if isinstance(settings, Mapping) else f"{settings!r}"


def problem(method: object, settings: object) -> str | None:
    """Why weights quantised like this are refused; None if they are not quantised, or vLLM's layers are tried.

    Args:
        method: vLLM's name of it, or None.
        settings: the quantization_config of config.json.
    """
    if method is None:
        return None
    where = "" if settings is None else "quantization_config: "
    if method not in METHODS:
        return f"{where}weights quantised by {method} (supported: {', '.join(METHODS)})"
    if method == "compressed-tensors" and not list(_weights(settings)):
        return f"{where}weights quantised by {method}, whose config_groups names no weights"
    said = "; ".join(_setting_problems(settings))
    return f"{where}weights quantised by {method}: {said}" if said else None


def _setting_problems(settings: object) -> Iterator[str]:
    """What vLLM's layers would break on, naming the key; whether they have kernels for the rest is theirs to say."""
    if not isinstance(settings, Mapping):
        return
    method = settings.get("quant_method")
    for names, is_valid, valid in _NEEDED.get(method, ()) if isinstance(method, str) else ():
        name = next((name for name in names if name in settings), names[-1])
        if not is_valid(settings.get(name)):
            yield f"{name}={settings.get(name)!r} (must be {valid})"
    groups = settings.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, Mapping):
        for key, group in groups.items():
            targets = group.get("targets") if isinstance(group, Mapping) else None
            if not (isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)):
                yield f"config_groups.{key}.targets={targets!r} (must be a list of names of layers)"


def note(method: object, settings: object) -> str | None:
    """What an operator should know of weights that are not refused: whether anybody has tried them here."""
    if method is None or _is_tested(method, settings):
        return None
    return f"weights quantised by {method}{_described(settings)}: not tested; they go through vLLM's own layers"


def _is_tested(method: object, settings: object) -> bool:
    """Whether tests/vllm/test_quantised_layers.py compares such layers with the same arithmetic in PyTorch."""
    if method == "compressed-tensors":
        groups = list(_weights(settings))
        return bool(groups) and all(w.get("type") == "int" and w.get("num_bits") in (4, 8) for w in groups)
    bits = settings.get("bits") if isinstance(settings, Mapping) else None
    return bits == 4 and method in (*_AWQ, *_GPTQ)


def _described(settings: object) -> str:
    """How many bits, where the settings say it plainly."""
    if not isinstance(settings, Mapping):
        return ""
    kinds = sorted({f"{w.get('type')} {w.get('num_bits')}" for w in _weights(settings)})
    if kinds:
        return f" ({', '.join(kinds)} bits)"
    return f" ({settings['bits']} bits)" if isinstance(settings.get("bits"), int) else ""


def _weights(settings: object) -> Iterator[Mapping[str, Any]]:
    """What compressed-tensors says of the weights of each group."""
    groups = settings.get("config_groups") if isinstance(settings, Mapping) else None
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights
