"""Hypothesis strategies: requests with any options the decoding loop knows."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.unit.batches import MASK, VOCAB, FakeJob
from vllm_d2cache.config import DECODER_OPTIONS
from vllm_d2cache.records import SamplingSpec

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
    read = DECODER_OPTIONS[rule.get("decoder", "confidence")]
    foreign = {name for names in DECODER_OPTIONS.values() for name in names} - set(read)
    return {**rule, **{name: value for name, value in rest.items() if name not in foreign}}


options = st.builds(
    _merged,
    st.sampled_from(RULES),
    st.fixed_dictionaries(
        {},
        optional={
            "policy": st.sampled_from(["d2cache", "full"]),
            "window": st.sampled_from([0, 1, 3, 8, 100]),
            "score": st.sampled_from(["confidence", "margin", "entropy"]),
            "sigma": st.sampled_from([0, 0.5, 3, 10]),
            "selection_sigma": st.sampled_from([0, 0.5, 3, 10]),
            "current_k": st.sampled_from([1, 2, 5, 32]),
            "rollout_p": st.sampled_from([0, 0.05, 0.3, 0.99, 1]),
            "inflate_w": st.sampled_from([0, 1, 2, 4, 50]),
            "confidence_memory": st.sampled_from(["first", "latest"]),
            "confidence_top_p": st.sampled_from([0.5, 0.9, 1.0]),
        },
    ),
)

samplings = st.builds(
    SamplingSpec,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 1, 4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


def jobs(policy: str | None = None, stops: bool = False) -> st.SearchStrategy[FakeJob]:
    """Requests of up to 40 positions; prompts may hold literal mask ids."""
    chosen = options if policy is None else options.map(lambda o: {**o, "policy": policy})
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
