"""What a config.json may say, value by value; and that no value whatever breaks who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.blocks import BLOCK_ORACLE
from tests.reference.llada_moe import CONFIG as MOE
from tests.reference.oracle import ORACLE
from vllm_d2cache.doctor import model_directory
from vllm_d2cache.models.config_rules import read_rope
from vllm_d2cache.models.families import FAMILIES

PUBLISHED: dict[str, dict[str, Any]] = {
    "LLaDAModelLM": json.loads((ORACLE / "llada" / "config.json").read_text()),
    "DreamModel": json.loads((ORACLE / "dream" / "config.json").read_text()),
    "LLaDAMoEModelLM": MOE,
}
BLOCKS: dict[str, dict[str, Any]] = {
    content["architectures"][0]: content
    for content in (json.loads(path.read_text()) for path in sorted(BLOCK_ORACLE.glob("*/config.json")))
}
ALL = PUBLISHED | BLOCKS
MASK, VOCAB = 370, 384


def unsupported(architecture: str, **changes: Any) -> list[str]:
    """What a family says of a published file with these changes; ``...`` removes a key."""
    content = {key: value for key, value in {**ALL[architecture], **changes}.items() if value is not ...}
    return FAMILIES[architecture].config_class().from_dict(content).unsupported()


@pytest.mark.parametrize("architecture", ALL)
def test_published_files_are_supported(architecture: str) -> None:
    assert unsupported(architecture) == []


# Family, what is changed, and how the reason begins.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("LLaDAModelLM", {"n_layers": "4"}, "n_layers='4' (must be a whole number from 1"),
    ("LLaDAModelLM", {"n_heads": 0}, "n_heads=0 (must be a whole number from 1"),
    ("LLaDAModelLM", {"d_model": 64.0}, "d_model=64.0 (must be a whole number"),
    ("LLaDAModelLM", {"vocab_size": True}, "vocab_size=True (must be a whole number"),
    ("LLaDAModelLM", {"max_sequence_length": 2**24 + 1}, "max_sequence_length=16777217 (must be a whole number"),
    ("LLaDAModelLM", {"rope_theta": -1}, "rope_theta=-1 (must be a number from 1 to 1e+30)"),
    ("LLaDAModelLM", {"rope_theta": [1]}, "rope_theta=[1] (must be a number from 1 to 1e+30)"),
    ("LLaDAModelLM", {"rope_theta": float("inf")}, "rope_theta=inf (must be a number from 1 to 1e+30)"),
    *(
        ("DreamModel", {"rope_theta": value}, f"rope_theta={value!r} (must be a number from 1 to 1e+30)")
        for value in (1e-300, 1e-40, 0.5, 0, 1e31, 1e308)
    ),
    ("LLaDA2MoeModelLM", {"routed_scaling_factor": 1e308}, "routed_scaling_factor=1e+308 (must be a number from 0.001"),
    ("LLaDA2MoeModelLM", {"partial_rotary_factor": 1e-9, "rotary_dim": None}, "0 rotated elements (must be even, from"),
    ("DreamModel", {"rope_theta": 10**400}, "rope_theta=1000"),
    ("DreamModel", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan (must be a number above 0 and below 1)"),
    ("LLaDAModelLM", {"rms_norm_eps": 0}, "rms_norm_eps=0 (must be a number above 0 and below 1)"),
    ("LLaDAModelLM", {"weight_tying": "no"}, "weight_tying='no' (must be true or false)"),
    ("LLaDAModelLM", {"auto_map": 5}, "auto_map=5 (must be an object, or be left out)"),
    ("DreamModel", {"auto_map": None}, "auto_map=None (must be an object, or be left out)"),
    ("LLaDAModelLM", {"max_seq_len": "4096"}, "max_seq_len='4096' (must be a number of at least 1)"),
    ("DreamModel", {"model_max_length": 0}, "model_max_length=0 (must be a number of at least 1)"),
    ("SDARForCausalLM", {"seq_length": []}, "seq_length=[] (must be a number of at least 1)"),
    ("LLaDAModelLM", {"text_config": {}}, "text_config={} (no setting of these models)"),
    ("DreamModel", {"vision_config": {"depth": 2}}, "vision_config={'depth': 2} (no setting of these models)"),
    ("LLaDAModelLM", {"num_experts": 8}, "num_experts=8 (supported: 0)"),
    ("DreamModel", {"num_local_experts": []}, "num_local_experts=[] (supported: 0)"),
    ("LLaDAMoEModelLM", {"n_routed_experts": 3}, "n_routed_experts=3 (supported: 8)"),
    ("LLaDAModelLM", {"head_dim": 8}, "head_dim=8 (supported: 16)"),
    ("Fast_dLLM_QwenForCausalLM", {"rotary_dim": 8}, "rotary_dim=8 (supported: 16)"),
    ("LLaDAModelLM", {"block_size": 4}, "block_size=4 (supported: None)"),
    ("DreamModel", {"bd_size": 8}, "bd_size=8 (supported: None)"),
    ("LLaDAModelLM", {"hidden_act": "gelu"}, "hidden_act='gelu' (supported: 'silu', 'swish', None)"),
    ("DreamModel", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config={'chunk_size': 8}"),
    ("LLaDAModelLM", {"compression_config": 5}, "quantization_config: weights quantised by 5 (supported: compressed"),
    ("LLaDA2MoeModelLM", {"norm_topk_prob": False}, "norm_topk_prob=False (supported: True, None)"),
    ("LLaDAModelLM", {"alibi": True}, "alibi=True (supported: False)"),
    ("LLaDAModelLM", {"embedding_size": 380}, "an embedding of 380 rows for a vocabulary of 384"),
    ("LLaDAModelLM", {"n_heads": 5}, "5 attention heads do not divide a width of 64"),
    ("LLaDAModelLM", {"n_heads": 64, "n_kv_heads": 64}, "heads of 1 elements"),
    ("LLaDAModelLM", {"n_kv_heads": 3}, "3 heads of keys and values do not divide 4"),
    ("LLaDAModelLM", {"hidden_size": 128}, "hidden_size=128 (but d_model=64; they are the same setting)"),
    ("LLaDAModelLM", {"sliding_window": 64}, "sliding_window=64 (supported: None)"),
    ("LLaDAModelLM", {"layer_types": ["sliding_attention"] * 4}, "layer_types=["),
    ("LLaDAModelLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 (supported: None, 1)"),
    ("LLaDAModelLM", {"per_layer_config": {"0": {}}}, "per_layer_config={'0': {}} (no setting"),
    ("LLaDAModelLM", {"torch_dtype": "int4"}, "torch_dtype='int4' (must be bfloat16, float16, float32)"),
    ("LLaDAModelLM", {"self": 1}, "self=1 (no setting of these models)"),
    ("LLaDAModelLM", {"to_dict": 5}, "to_dict=5 (no setting of these models)"),
    ("LLaDAModelLM", {"quantization_config": "gptq"}, "quantization_config: weights quantised by 'gptq'"),
    ("LLaDAModelLM", {"quantization_config": {"quant_method": "quip"}}, "quantization_config: weights quantised by q"),
    ("LLaDAMoEModelLM", {"num_experts_per_tok": 9}, "9 experts a token of 8"),
    ("LLaDAMoEModelLM", {"num_experts": None, "num_experts_per_tok": 65}, "65 experts a token of 64"),
    ("DreamModel", {"head_dim": 17}, "heads of 17 elements (RoPE rotates pairs"),
    ("DreamModel", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64 (supported: None)"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes", "said"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_what_cannot_be_computed_is_refused_by_name(architecture: str, changes: dict[str, Any], said: str) -> None:
    reasons = unsupported(architecture, **changes)
    assert any(reason.startswith(said) for reason in reasons), reasons


@pytest.mark.parametrize("theta", [1, 1.5, 10000, 5e5, 1e7, 1e30])
def test_any_base_that_is_computed(theta: float) -> None:
    assert unsupported("LLaDAModelLM", rope_theta=theta) == []


OTHER_ROPE = [
    {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "longrope", "factor": 4.0, "long_factor": [1.0], "short_factor": [1.0]},
    {"rope_type": "default", "factor": 4.0},
    {"rope_type": "default", "type": "yarn"},
    {"factor": 4.0},
    {"rope_type": ["default"]},
    {"mrope_section": [1, 2, 3]},
    "linear",
    [4.0],
]
SCALED_ROPE = [{"type": "linear", "factor": 4.0}, {"rope_type": "ntk", "factor": 4}, {"rope_type": "yarn", "factor": 2}]
SCALES = [name for name in ALL if FAMILIES[name].config_class().scales_rope]


@pytest.mark.parametrize(
    ("architecture", "entry"),
    [
        *((name, entry) for name in ALL for entry in OTHER_ROPE),
        *((name, entry) for name in ALL if name not in SCALES for entry in SCALED_ROPE),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_that_a_family_does_not_compute_is_refused(architecture: str, entry: Any, key: str) -> None:
    (reason,) = unsupported(architecture, **{key: entry})
    kinds = "'default', 'linear', 'ntk', 'yarn'" if architecture in SCALES else "'default'"
    assert reason == f"rope_parameters={entry!r} (supported: rope_type {kinds})"


def test_rope_in_both_places() -> None:
    entry = {"rope_type": "default", "rope_theta": 5.0}
    assert unsupported("DreamModel", rope_parameters=entry, rope_scaling=entry) == []
    (reason,) = unsupported("DreamModel", rope_parameters=entry, rope_scaling={"type": "yarn"})
    assert reason.startswith("rope_scaling={'type': 'yarn'} (but there are rope_parameters")


@pytest.mark.parametrize("architecture", PUBLISHED)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_theta_in_either_place_is_computed(architecture: str, key: str) -> None:
    family = FAMILIES[architecture].config_class()
    plain = {k: v for k, v in PUBLISHED[architecture].items() if k not in ("rope_theta", "rope_scaling")}
    want = family.from_dict({**plain, "rope_theta": 12345.0}).shape()
    assert want.rope_theta == 12345.0
    for entry in ({"rope_type": "default", "rope_theta": 12345.0}, {"type": "default", "rope_theta": 12345.0}):
        assert family.from_dict({**plain, key: entry}).shape() == want
        assert family.from_dict({**plain, "rope_theta": 1.0, key: entry}).shape() == want
    assert unsupported(architecture, **{key: {"rope_type": "default", "rope_theta": "x"}, "rope_theta": 1.0})
    assert unsupported(architecture, **{key: {"rope_type": "default", "partial_rotary_factor": 0.5}})
    for nothing in (None, {}):
        assert family.from_dict({**plain, "rope_theta": 12345.0, key: nothing}).shape() == want


NULL_IS_ABSENT = {
    "LLaDAModelLM": ["rope_theta", "rms_norm_eps", "max_sequence_length", "n_kv_heads", "embedding_size"],
    "DreamModel": ["rope_theta", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "sliding_window"],
    "LLaDAMoEModelLM": ["rope_theta", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads"],
}


@pytest.mark.parametrize(("architecture", "key"), [(a, key) for a, keys in NULL_IS_ABSENT.items() for key in keys])
def test_null_is_absent(architecture: str, key: str) -> None:
    family = FAMILIES[architecture].config_class()
    content = {k: v for k, v in PUBLISHED[architecture].items() if k != key}
    absent, null = family.from_dict(content), family.from_dict({**content, key: None})
    assert null.unsupported() == absent.unsupported() == []
    assert null.shape() == absent.shape()


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("value", [None, ..., -1, VOCAB, 10**9, "370", 37.0, True, [370]])
def test_a_mask_token_that_is_none(architecture: str, value: Any) -> None:
    """Absent too: the family's own belongs to its own vocabulary."""
    (reason,) = unsupported(architecture, mask_token_id=value, vocab_size=VOCAB, embedding_size=None)
    shown = None if value is ... else value
    assert reason.startswith(f"mask_token_id={shown!r} (")
    assert "from 0 to 383" in reason


@pytest.mark.parametrize("architecture", ALL)
def test_an_absent_mask_token_is_the_familys_in_the_familys_vocabulary(architecture: str) -> None:
    defaults = FAMILIES[architecture].config_class().defaults
    changes = {"vocab_size": defaults["vocab_size"], "embedding_size": None}
    assert unsupported(architecture, mask_token_id=..., **changes) == []
    (reason,) = unsupported(architecture, mask_token_id=None, **changes)
    assert reason.startswith("mask_token_id=None")


def test_stop_tokens_of_another_vocabulary() -> None:
    for eos in ("371", VOCAB, [371, VOCAB], {"a": 1}, 1.5):
        (reason,) = unsupported("DreamModel", eos_token_id=eos)
        assert reason.startswith(f"eos_token_id={eos!r} (not in the vocabulary")
    assert unsupported("DreamModel", eos_token_id=[371, 5], pad_token_id=None, bos_token_id=None) == []
    assert unsupported("DreamModel", eos_token_id=MASK) == [f"mask_token_id={MASK} (is the eos_token_id too)"]


def test_a_window_that_is_off_is_none() -> None:
    """vLLM would take its length and have one."""
    config = FAMILIES["DreamModel"].config_class().from_dict({**PUBLISHED["DreamModel"], "sliding_window": 64})
    assert config.unsupported() == []
    assert config.sliding_window is None


def test_infilling_of_any_length_is_noted() -> None:
    config = FAMILIES["DreamModel"].config_class().from_dict({**PUBLISHED["DreamModel"], "expand_token_id": 3})
    assert config.unsupported() == []
    assert config.notes() == ["expand_token_id=3 has no effect: a canvas keeps its length"]


# --- whatever a file holds ------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3), max_leaves=6
)
OTHER_KEYS = (
    "architectures", "auto_map", "dtype", "head_dim", "id2label", "is_encoder_decoder", "label2id", "layer_types",
    "num_labels", "output_attentions", "per_layer_config", "problem_type", "quantization_config", "rope_parameters",
    "rope_scaling", "shape", "sliding_window", "tie_word_embeddings", "transformers_version", "use_return_dict",
)  # fmt: skip


@pytest.mark.parametrize("architecture", ALL)
@given(data=st.data())
def test_no_value_breaks_who_reads_it(architecture: str, data: st.DataObject) -> None:
    """Every file is judged; and of one that is supported the network can be built."""
    keys = sorted({*ALL[architecture], *FAMILIES[architecture].config_class().supported_values, *OTHER_KEYS})
    changes = data.draw(st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), VALUES, min_size=1, max_size=3))
    content = {**ALL[architecture], **changes, "architectures": [architecture]}
    content["model_type"] = ALL[architecture]["model_type"]
    config = FAMILIES[architecture].config_class().from_dict(content)
    reasons = config.unsupported()
    if not reasons:
        shape = config.shape()
        assert shape.q_size > 0 and shape.kv_size > 0 and shape.mlp_width > 0
        assert 0 <= config.traits().mask_token_id < shape.vocab_size
    elif "eos_token_id" not in changes and "pad_token_id" not in changes:
        assert all(isinstance(reason, str) and reason for reason in reasons)


@given(changes=st.dictionaries(st.sampled_from(sorted({*PUBLISHED["DreamModel"], *OTHER_KEYS})), VALUES, max_size=3))
def test_nor_doctor(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps({**PUBLISHED["DreamModel"], **changes}))
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": changes.get("id2label")}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": changes.get("label2id")}))
    assert list(model_directory.check_model(directory, None))


def test_an_entry_is_read_without_being_changed(tmp_path: Path) -> None:
    entry = {"rope_type": "default", "rope_theta": 5.0}
    assert read_rope(entry) == ({"rope_theta": 5.0}, None)
    assert entry == {"rope_type": "default", "rope_theta": 5.0}
