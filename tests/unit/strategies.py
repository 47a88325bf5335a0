"""Hypothesis strategies: requests with any options the decoding loop knows."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.unit.batches import MASK, VOCAB, FakeJob
from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.options.sampling import SamplingSpec

RULES: list[dict[str, Any]] = [
    {},
    {"tokens_per_step": 3},
    {"tokens_per_step": 1000},
    {"steps": 5},
    {"steps": 60, "window": 3},
    {"steps": 40, "threshold": 0.5},
    {"threshold": 0.3},
    {"threshold": 0.05, "tokens_per_step": 2},
    {"factor": 0.7},
    {"factor": 3.0},
    {"decoder": "eb", "gamma": 0.5},
    {"decoder": "eb", "gamma": 2.0, "tokens_per_step": 2},
    {"decoder": "klass", "kl_threshold": 2.0, "threshold": 0.2},
    {"decoder": "klass", "kl_threshold": 40.0, "kl_history_length": 1, "factor": 2.0},
    {"decoder": "pc"},
    {"decoder": "pc", "clip_alpha": 0.5, "tokens_per_step": 2},
    {"decoder": "credit", "threshold": 0.6},
    {"decoder": "credit", "threshold": 0.9, "credit_alpha": 3.0, "credit_beta": 1.0, "credit_gamma": 0.0},
    {"decoder": "hierarchical", "threshold": 0.6, "low_threshold": 0.3},
    {"decoder": "localleap", "threshold": 0.5, "leap_threshold": 0.2, "leap_radius": 2},
]


def _merged(rule: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """``rule`` with those of the other options that its decoder reads."""
    read = {name: {*cls.options, *cls.reads} for name, cls in DECODER_CLASSES.items()}
    foreign = set().union(*read.values()) - read[rule.get("decoder", "confidence")]
    return {**rule, **{name: value for name, value in rest.items() if name not in foreign}}


DECODING = {
    "window": st.sampled_from([0, 1, 3, 8, 100]),
    "score": st.sampled_from(["confidence", "margin", "entropy"]),
    "sigma": st.sampled_from([0, 0.5, 3, 10]),
    "confidence_top_p": st.sampled_from([0.5, 0.9, 1.0]),
}

D2CACHE: dict[str, st.SearchStrategy[Any]] = {
    "selection_sigma": st.sampled_from([0, 0.5, 3, 10]),
    "current_k": st.sampled_from([1, 2, 5, 32]),
    "rollout_p": st.sampled_from([0, 0.05, 0.3, 0.99, 1]),
    "inflate_w": st.sampled_from([0, 1, 2, 4, 50]),
    "confidence_memory": st.sampled_from(["first", "latest"]),
}

# The options of each policy's own.
POLICIES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "d2cache": D2CACHE,
    "d2cache_light": D2CACHE,
    "full": {},
    "block": {"block_cache": st.sampled_from(["off", "on"])},
    "prefix": {},
    "dual": {},
    "dkv": {
        "dkv_variant": st.sampled_from(["decode", "prefill", "pd"]),
        "cache_steps": st.sampled_from([1, 2, 3, 8, 10**30]),
    },
    "vicinity": {
        "prefix_look": st.sampled_from([0, 1, 5, 10**30]),
        "after_look": st.sampled_from([0, 1, 5, 10**30]),
        "warmup_steps": st.sampled_from([0, 1, 4]),
        "cache_update_freq": st.sampled_from([0, 1, 3]),
    },
    "entropy": {
        "entropy_tau": st.sampled_from([0, 0.5, 1.5, 1e300]),
        "entropy_k": st.sampled_from([0, 1, 4, 10**30]),
    },
    "window_diffusion": {
        "outer_window": st.sampled_from([1, 2, 6, 10**30]),
        "inner_window": st.sampled_from([1, 2, 4, 10**30]),
        "phase_steps": st.sampled_from([1, 2, 5, 10**30]),
    },
    "dllm_cache": {
        "kp": st.sampled_from([1, 2, 7, 10**30]),
        "kr": st.sampled_from([1, 2, 3, 10**30]),
        "rou": st.sampled_from([0, 0.1, 0.3, 1]),
    },
    "spa": {
        "refresh_steps": st.sampled_from([1, 2, 7, 10**30]),
        "refresh_gen_steps": st.sampled_from([1, 2, 3, 10**30]),
        "n_warmup_steps": st.sampled_from([0, 2]),
        "max_update_ratio": st.sampled_from([0.01, 0.3, 1]),
        "update_ratio_dist": st.sampled_from(["gaussian", "uniform"]),
        "proxy_rank": st.sampled_from([1, 256]),
    },
    "sparse_dllm": {
        "keep_ratio": st.sampled_from([0, 0.3, 0.5, 1]),
        "kernel_size": st.sampled_from([1, 2, 3, 10**30]),
    },
    "streaming": {"suffix_window": st.sampled_from([0, 1, 5, 10**30])},
    "es": {
        "prompt_update_freq": st.sampled_from([1, 3, 8, 10**30]),
        "block_update_freq": st.sampled_from([1, 2, 5, 10**30]),
        "importance_score_alpha": st.sampled_from([0, 0.5, 1]),
    },
    "elastic": {
        "elastic_beta": st.sampled_from([1, 2, 6, 10**30]),
        "elastic_gamma": st.sampled_from([0, 0.5, 0.9, 1]),
    },
}


def options_of(policy: str) -> st.SearchStrategy[dict[str, Any]]:
    """Options of a request for ``policy``, which it names but for the default one."""
    return st.builds(
        lambda rule, rest: {**({} if policy == "d2cache" else {"policy": policy}), **_merged(rule, rest)},
        st.sampled_from(RULES),
        st.fixed_dictionaries({}, optional={**DECODING, **POLICIES[policy]}),
    )


options = st.one_of([options_of(policy) for policy in POLICIES])

samplings = st.builds(
    SamplingSpec,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 1, 4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


def jobs(policy: str | None = None, stops: bool = False) -> st.SearchStrategy[FakeJob]:
    """Requests of up to 40 positions; prompts may hold literal mask ids."""
    chosen = options if policy is None else options_of(policy)
    sampling = samplings
    if stops:
        ids = st.lists(st.sampled_from([t for t in range(VOCAB) if t != MASK]), min_size=1, max_size=3, unique=True)
        sampling = st.builds(
            lambda s, stop: SamplingSpec(s.temperature, s.top_p, s.top_k, s.seed, tuple(stop)), samplings, ids
        )
    return st.builds(
        FakeJob,
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
        st.integers(1, 20),
        chosen,
        sampling,
        st.integers(0, 10_000),
    )
