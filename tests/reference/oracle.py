"""The traces of the published implementation, as requests this project understands (tests/data/oracle)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORACLE = Path(__file__).resolve().parents[1] / "data" / "oracle"
_ALG = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
_STRATEGIES = {"vanilla": "confidence", "klass": "klass"}
# Argument of the published code -> the decoder it belongs to, where no strategy names it.
_DECODER_KEYS = {
    "gamma": "eb",
    "kl_threshold": "klass",
    "kl_history_length": "klass",
    "clip_alpha": "pc",
    "debias": "pc",
}
# Options of a server that can run all traces: the corpus table is the one that pc's were recorded with.
SERVER = {"token_frequencies": str(ORACLE / "token_freq.npy")}


@dataclass(frozen=True)
class OracleCase:
    """One traced request of batch size one."""

    name: str
    prompt: list[int]
    canvas_length: int
    options: dict[str, Any]  # by plain option name
    steps: list[tuple[list[int] | None, list[tuple[int, int]]]]  # refreshed, committed
    final_tokens: list[int]


def case_names(family: str = "llada") -> list[str]:
    """Traces of this family whose policy and decoder exist here."""
    names = []
    for path in sorted((ORACLE / "traces").glob(f"{family}.*.json")):
        raw = json.loads(path.read_text())
        kwargs, cache = raw["generate_kwargs"], raw["cache"]
        known = {"sigma", "strategy", "gen_length", "block_length", "threshold", "factor", "alg", "top_p"}
        known |= _DECODER_KEYS.keys()
        if kwargs["strategy"] not in _STRATEGIES or not set(kwargs) <= known:
            continue
        # Without the repair the search window is a different one by design (docs/architecture.md).
        repaired = cache is not None and cache["kind"] == "d2cache" and "block_mask" in raw["repairs"]
        if cache is None or cache["kind"] in ("prefix", "dllm") or repaired:
            names.append(path.stem)
    return names


def _policy(cache: dict[str, Any] | None) -> str:
    if cache is None:
        return "full"
    if cache["kind"] == "prefix":
        return "dual" if cache["use_dual"] else "prefix"
    return {"dllm": "dllm_cache"}.get(cache["kind"], cache["kind"])


def load_case(name: str) -> OracleCase:
    """Read a trace and translate its options."""
    raw = json.loads((ORACLE / "traces" / f"{name}.json").read_text())
    kwargs, cache = raw["generate_kwargs"], raw["cache"]
    length = kwargs["gen_length"]
    options: dict[str, Any] = {
        "policy": _policy(cache),
        "window": kwargs.get("block_length", length) % length,
        "sigma": kwargs.get("sigma", 0.0) or 0.0,
        "confidence_top_p": kwargs.get("top_p", 1.0) or 1.0,
    }
    options |= {key: kwargs[key] for key in ("threshold", "factor") if kwargs.get(key)}
    if "alg" in kwargs:
        options["score"] = _ALG[kwargs["alg"]]
    options |= _decoder_options(kwargs)
    if cache and cache["kind"] == "d2cache":
        options |= {
            "current_k": cache["current_k"],
            "rollout_p": cache["rollout_p"],
            "inflate_w": cache["inflate_w"],
            "selection_sigma": cache["sigma"],
            "confidence_memory": "latest" if "conf_cache" in raw["repairs"] else "first",
        }
    if cache and cache["kind"] == "dllm":
        options |= {name: cache[name] for name in ("kp", "kr", "rou")}
    steps = []
    for step in raw["steps"]:
        active = step["active_positions"]
        moves = step["transfer"][0]
        pairs = list(zip(moves["positions"], moves["tokens"], strict=True))
        refreshed = None if active is None else sorted(active[0])
        if "dllm_layers" in step and not step["dllm_layers"][1]["refresh_prompt"]:
            # The published code carries the prompt's rows along, where no layer behind the first one computes them.
            # Dream's first slot is read from the prompt's last row, which goes on with stored outputs.
            prompt = len(raw["input_ids"][0])
            refreshed = list(range(prompt - (raw["family"] == "dream"), prompt + length))
        steps.append((refreshed, sorted(pairs)))
    return OracleCase(name, raw["input_ids"][0], length, options, steps, raw["final_tokens"][0])


def _decoder_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The decoder and the options of its own."""
    own = {key: kwargs[key] for key in _DECODER_KEYS if key in kwargs}
    decoder = next((_DECODER_KEYS[key] for key in own), _STRATEGIES[kwargs["strategy"]])
    own.pop("debias", None)
    return {"decoder": decoder, **own}
