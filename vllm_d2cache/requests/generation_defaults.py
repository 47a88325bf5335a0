"""What a checkpoint's generation_config.json asks for, in this package's options.

vLLM reads the sampling parameters it knows (temperature, top_p, top_k, max_new_tokens) and the end-of-text tokens; the
keys of the authors' own generation code (Dream's: alg, alg_temp, eps, steps, ...) are read here. Nothing is dropped in
silence: what has no meaning here is named, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_d2cache.options.types import Number

# Dream's names of what ranks candidates (docs/methods/d2cache.md, section 2, step 4).
_SCORE_OF_ALG = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
_WHY_IGNORED = {
    "alg": "candidates are never ranked at random; see the option score",
    "alg_temp": "commits are not drawn at random",
    "eps": "there is no schedule of noise levels",
    "steps": "tokens_per_step, threshold and factor say how many tokens a step commits",
    "output_history": "see the option trace_dir",
}
# Defaults that vLLM would give every request, and every request would then be refused for (requests/check.py).
UNSUPPORTED_DEFAULTS = ("min_p",)


# Defaults that vLLM gives every request: what they must be for a request that does not name them to be answered.
_RANGES: dict[str, Number] = {
    "temperature": Number(float, 0),
    "top_p": Number(float, 0, 1, open_low=True),
    "top_k": Number(int, -1),
    "repetition_penalty": Number(float, 0, open_low=True),
    "presence_penalty": Number(float, -2, 2),
    "frequency_penalty": Number(float, -2, 2),
    "max_new_tokens": Number(int, 1),
}


def default_problems(
    raw: Mapping[str, Any], override: Mapping[str, Any], unreadable: Mapping[str, str] | None = None
) -> list[str]:
    """Why requests that rely on these defaults would all be refused, or an operator's word would have no effect.

    Args:
        raw: contents of a generation_config.json.
        override: what ``--override-generation-config`` says.
        unreadable: key of the file -> what is wrong with it for whoever reads it, in words that name the key; the file
            is read even where the operator wants none of its defaults.
    """
    problems = {}
    for key, value in {**raw, **override}.items():
        name = f"--override-generation-config {key}" if key in override else f"generation_config.json {key}"
        if value is None or value is False:
            continue
        if key in _RANGES:
            if _RANGES[key].parse(value) is None:
                problems[name] = f"{name}={value!r} (must be {_RANGES[key].describe()})"
        elif key in override and not (key == "alg" and _is_score(value)) and not (key == "min_p" and value == 0):
            refused = "every request would be refused for it" if key == "min_p" else "it would have no effect"
            problems[name] = f"{name}={value!r} ({_WHY_IGNORED.get(key, refused)})"
    for key, text in (unreadable or {}).items():
        problems.setdefault(f"generation_config.json {key}", f"generation_config.json {text}")
    return list(problems.values())


def _is_score(value: object) -> bool:
    """Whether Dream's key ``alg`` names a score."""
    return isinstance(value, str) and value in _SCORE_OF_ALG


@dataclass
class GenerationDefaults:
    """Outcome of :func:`read_generation_defaults`.

    Attributes:
        options: by plain option name.
        ignored: key of the file -> value and reason, in words.
    """

    options: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def read_generation_defaults(raw: Mapping[str, Any]) -> GenerationDefaults:
    """Translate the contents of a generation_config.json; keys with the value null or false say nothing."""
    found = GenerationDefaults()
    for key, value in raw.items():
        if value is None or value is False:
            continue
        if key == "top_p":
            # Dream cuts the distribution before it takes confidences, at temperature 0 as well.
            found.options["confidence_top_p"] = value
        elif key == "alg" and _is_score(value):
            found.options["score"] = _SCORE_OF_ALG[value]
        elif key in UNSUPPORTED_DEFAULTS:
            found.ignored[key] = f"{value!r} (not supported for diffusion language models)"
        elif key in _WHY_IGNORED:
            found.ignored[key] = f"{value!r} ({_WHY_IGNORED[key]})"
    return found
