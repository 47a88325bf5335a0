"""What a checkpoint's config.json may say: one set of rules for the start and for ``vllm-d2cache doctor``.

The configuration classes (configs.py) bring what differs by family: defaults, and the values a model class computes.
Nothing here imports torch, transformers or vLLM.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vllm_d2cache.models.families import FAMILIES, Family
from vllm_d2cache.models.shape import TransformerShape

DTYPES = ("bfloat16", "float16", "float32")

# Whole numbers of at least one, whichever family spells them so. A key that is absent or null is its default.
_COUNTS = frozenset({
    "vocab_size", "embedding_size", "d_model", "hidden_size", "n_layers", "num_hidden_layers", "n_heads",
    "num_attention_heads", "n_kv_heads", "num_key_value_heads", "head_dim", "mlp_ratio", "mlp_hidden_size",
    "intermediate_size", "expert_intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok",
    "max_sequence_length", "max_position_embeddings", "n_group", "topk_group", "rotary_dim", "block_size", "bd_size",
    "block_length",
})  # fmt: skip
# Other words for the longest text: vLLM looks for them in any family's file and takes the smallest.
_LENGTHS = frozenset({
    "max_seq_len", "max_seq_length", "max_target_positions", "model_max_length", "n_positions", "seq_len", "seq_length",
})  # fmt: skip
# Words for the number of experts: vLLM takes the first that is there.
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
# The same of at least zero.
_MAYBE_NONE = frozenset({"num_shared_experts", "first_k_dense_replace"})
# Longer positions are not exact in fp32, in which angles are computed.
_MOST = {"max_sequence_length": 2**24, "max_position_embeddings": 2**24}
# Far beyond what anybody trains with, and within what fp32 computes: a base below 1 would turn later pairs faster, and
# a tiny one by infinite angles.
_BOUNDS = {"rope_theta": (1, 1e30), "routed_scaling_factor": (0.001, 1000)}
_FLAGS = frozenset({"weight_tying", "tie_word_embeddings"})
TOKENS = ("mask_token_id", "eos_token_id", "pad_token_id")
# Keys that vLLM itself reads for any family, and what they must be for it to compute what the model class does.
_FOR_ALL: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "dual_chunk_attention_config": (None,),
    "hidden_act": ("silu", "swish", None),
    "is_causal": (False, None),
    "partial_rotary_factor": (None, 1),
    "sliding_window": (None,),
}
# Keys that are judged here, not by transformers, whose own checks come first and break on some values.
JUDGED = frozenset(
    {*_COUNTS, *_LENGTHS, *_MAYBE_NONE, *_FLAGS, *TOKENS, "rms_norm_eps", "rope_theta", "layer_types", "bos_token_id"}
)
# Keys of config.json that transformers would act on while it reads the file, or that vLLM must not see as they are.
ACTED_ON = frozenset({
    "architectures", "audio_config", "dtype", "is_encoder_decoder", "per_layer_config", "rope_parameters",
    "rope_scaling", "scaled_rope", "text_config", "torch_dtype", "vision_config",
})  # fmt: skip
# Keys that say nothing of the network: of classifiers, and switches of transformers' own implementation.
IGNORED = frozenset({
    "attn_implementation", "chunk_size_feed_forward", "experts_implementation", "id2label", "label2id", "model_type",
    "num_labels", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version",
    "use_return_dict",
    "asked", "misspelled",  # of a configuration that was written out by this package
})  # fmt: skip
_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def architecture_problem(architectures: object, model_type: object = None) -> str | None:
    """Why a checkpoint belongs to no family, in one sentence; None if it does.

    Args:
        architectures: of config.json, whatever it is.
        model_type: of config.json; not looked at where the architecture is unknown.
    """
    names = names_of(architectures)
    known = next((name for name in names if name in FAMILIES), None)
    if known is None:
        found = f"the architecture {', '.join(names)} is not supported" if names else "config.json has no architectures"
        served = [name for name, family in FAMILIES.items() if family.unserved is None]
        return f"{found}; vllm-d2cache serves {', '.join(served)}"
    valid = (FAMILIES[known].model_type, *FAMILIES[known].other_types)
    if model_type not in valid:
        return f"model_type={model_type!r} (for {known} it must be {' or '.join(map(repr, valid))})"
    return None


def family_of(config: Mapping[str, Any]) -> tuple[str, Family] | None:
    """The architecture and the family of a config.json that :func:`architecture_problem` has nothing against."""
    if architecture_problem(config.get("architectures"), config.get("model_type")) is not None:
        return None
    name = next(name for name in names_of(config.get("architectures")) if name in FAMILIES)
    return name, FAMILIES[name]


def owner(architectures: object) -> Family | None:
    """The family of the first architecture that one has; None if there is none."""
    return next((FAMILIES[name] for name in names_of(architectures) if name in FAMILIES), None)


def unserved_problem(architectures: object) -> str | None:
    """Why no checkpoint of the architecture can be served yet; None if they are."""
    named = [(name, FAMILIES[name].unserved) for name in names_of(architectures) if name in FAMILIES]
    return next((f"vllm-d2cache cannot serve {name} yet: {reason}" for name, reason in named[:1] if reason), None)


def names_of(architectures: object) -> list[str]:
    """The names in a list of them; none in anything else."""
    return [n for n in architectures if isinstance(n, str)] if isinstance(architectures, list | tuple) else []


def dtype_name(value: object) -> str | None:
    """One of DTYPES, from its name or torch's own object; None if it is neither."""
    name = str(value).removeprefix("torch.")
    return name if name in DTYPES else None


def asked_problems(asked: Mapping[str, Any], scaled: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys of ACTED_ON with values that are not computed, and keys that are no settings at all.

    Args:
        scaled: the kinds of RoPE that the family computes besides the plain one.
    """
    for key, value in asked.items():
        if value is None or key == "architectures":
            continue
        if key in ("dtype", "torch_dtype"):
            if dtype_name(value) is None:
                yield f"{key}={value!r} (must be {', '.join(DTYPES)})"
        elif key == "rope_scaling":
            yield f"{key}={value!r} (but there are rope_parameters, which say something else)"
        elif key == "rope_parameters":
            yield f"{key}={value!r} (supported: rope_type {', '.join(map(repr, ('default', *scaled)))})"
        elif key == "is_encoder_decoder":
            if value is not False:
                yield f"{key}={value!r} (supported: False)"
        else:
            yield f"{key}={value!r} (no setting of these models)"


def refusal(reasons: list[str]) -> str:
    """What the start says where there are any."""
    return "this checkpoint is not supported by vllm-d2cache: " + "; ".join(reasons)


def type_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Keys whose value has the wrong type or is out of range; None is absent."""
    for key, value in values.items():
        valid = None if value is None else _valid(key)
        if valid is not None and not valid[0](value):
            yield f"{key}={value!r} (must be {valid[1]})"


def absent_problems(values: Mapping[str, Any], needed: Iterable[str]) -> Iterator[str]:
    """Keys that config.json must name, and that are absent or null; tokens have a rule of their own."""
    for key in needed:
        if key not in TOKENS and values.get(key) is None:
            valid = _valid(key)
            yield f"{key}=None (config.json must name it: {valid[1] if valid else 'see docs/models.md'})"


def _valid(key: str) -> tuple[Callable[[Any], bool], str] | None:
    """Whether a value will do for a key, and the valid ones in words; None for keys without a rule of types."""
    if key in _LENGTHS:  # transformers writes 10**30 for no limit
        return lambda v: _is_number(v) and v >= 1, "a number of at least 1"
    if key in _COUNTS or key in _MAYBE_NONE:
        least, most = int(key in _COUNTS), _MOST.get(key, 2**31 - 1)
        return lambda v: _is_whole(v) and least <= v <= most, f"a whole number from {least} to {most}"
    if key == "rms_norm_eps":
        return lambda v: _is_number(v) and 0 < v < 1, "a number above 0 and below 1"
    if key in _BOUNDS:
        low, high = _BOUNDS[key]
        return lambda v: _is_number(v) and low <= v <= high, f"a number from {low:g} to {high:g}"
    if key == "partial_rotary_factor":
        return lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and at most 1"
    if key in _FLAGS:
        return lambda v: isinstance(v, bool), "true or false"
    if key == "quantization_config":
        return lambda v: isinstance(v, Mapping), "an object"
    if key == "auto_map":  # its code is not run, but transformers looks into it
        return lambda v: isinstance(v, Mapping | list | str), "an object, or be left out"
    return None


def choice_problems(values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Keys whose value asks for what the model class does not compute.

    Args:
        supported: key -> the values that the family computes; none named = all of the key's type.
    """
    for key, allowed in {**_FOR_ALL, **supported}.items():
        if allowed and key in values and values[key] not in allowed:
            yield f"{key}={values[key]!r} (supported: {', '.join(map(repr, allowed))})"
    layers = values.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and set(map(str, layers)) <= {"full_attention"}):
        yield f"layer_types={layers!r} (supported: 'full_attention' for every layer)"


def token_problems(values: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    """Token ids that are none, or none of this vocabulary."""
    mask = values.get("mask_token_id")
    if mask is None:
        yield f"mask_token_id=None (config.json must name it: an id from 0 to {vocab_size - 1})"
    for key in TOKENS:
        value = values.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(is_token(i, vocab_size) for i in ids):
            yield f"{key}={value!r} (not in the vocabulary: must be an id from 0 to {vocab_size - 1})"
        elif key != "mask_token_id" and mask is not None and mask in ids:
            yield f"mask_token_id={mask!r} (is the {key} too)"


def shape_problems(shape: TransformerShape) -> Iterator[str]:
    """Numbers that do not go together."""
    if shape.head_dim is None and shape.hidden_size % shape.num_heads:
        yield f"{shape.num_heads} attention heads do not divide a width of {shape.hidden_size} (and no head_dim)"
    elif shape.head_size % 2:
        yield f"heads of {shape.head_size} elements (RoPE rotates pairs: the number must be even)"
    elif shape.rotary_dim is not None and (shape.rotary_dim % 2 or not 2 <= shape.rotary_dim <= shape.head_size):
        yield f"{shape.rotary_dim} rotated elements (must be even, from 2 to the head size {shape.head_size})"
    if shape.num_heads % shape.num_kv_heads:
        yield f"{shape.num_kv_heads} heads of keys and values do not divide {shape.num_heads} attention heads"
    if shape.embedding_size < shape.vocab_size:
        yield f"an embedding of {shape.embedding_size} rows for a vocabulary of {shape.vocab_size}"
    mixture = shape.mixture
    if mixture is not None and mixture.per_token > mixture.num_experts:
        yield f"{mixture.per_token} experts a token of {mixture.num_experts}"


def size_problems(values: Mapping[str, Any], shape: TransformerShape) -> Iterator[str]:
    """Sizes that vLLM reads from any family's file, and that follow from others: they must be what is computed."""
    experts = 0 if shape.mixture is None else shape.mixture.num_experts
    computed = {**dict.fromkeys(_EXPERTS, experts), "head_dim": shape.head_size}
    if shape.rotary_dim is None:
        computed["rotary_dim"] = shape.head_size
    for key, value in computed.items():
        if values.get(key) is not None and values[key] != value:
            yield f"{key}={values[key]!r} (supported: {value})"


def read_rope(entry: object) -> tuple[dict[str, Any], object]:
    """What ``rope_parameters`` or ``rope_scaling`` say that is computed, and what they say besides.

    Returns:
        rope_theta and partial_rotary_factor, where they are named; and the entry if it asks for anything else, or None.
    """
    if entry is None or entry == {}:
        return {}, None
    if not isinstance(entry, Mapping):
        return {}, entry
    named = {key: entry[key] for key in ("rope_theta", "partial_rotary_factor") if entry.get(key) is not None}
    plain = all(entry.get(key) in (None, "default") for key in ("rope_type", "type"))
    others = [key for key, value in entry.items() if key not in _ROPE_KEYS and value is not None]
    return named, None if plain and not others else dict(entry)


def mask_contradiction(tokenizer_config: Mapping[str, Any], mask_token_id: int) -> str | None:
    """What is wrong, or None: also where the tokenizer has no mask token, or its file does not say which id it has.

    Args:
        tokenizer_config: the object in tokenizer_config.json.
        mask_token_id: the model's.
    """
    token, added = tokenizer_config.get("mask_token"), tokenizer_config.get("added_tokens_decoder")
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or not isinstance(added, Mapping):
        return None
    ids = [id for id, entry in added.items() if isinstance(entry, Mapping) and entry.get("content") == text]
    if not ids or str(mask_token_id) in map(str, ids):
        return None
    return (
        f"mask_token_id={mask_token_id}, but tokenizer_config.json's mask_token {text!r} has the id {', '.join(ids)} "
        f"(--hf-overrides '{{\"mask_token_id\": {ids[0]}}}' if that is right)"
    )


def null_problems(given: Mapping[str, Any]) -> list[str]:
    """Keys that may be absent, but not null: what reads them breaks."""
    return ["auto_map=None (must be an object, or be left out)"] if given.get("auto_map", {}) is None else []


def spelled_twice(given: Mapping[str, Any], other_names: Mapping[str, str]) -> list[str]:
    """Keys that config.json has under two names with different values: only one of them would be read."""
    return [
        f"{name}={given[name]!r} (but {key}={given[key]!r}; they are the same setting)"
        for name, key in other_names.items()
        if name in given and key in given and given[name] != given[key] and None not in (given[name], given[key])
    ]


def is_token(value: Any, vocab_size: int) -> bool:
    """Whether a value is an id of the vocabulary."""
    return _is_whole(value) and 0 <= value < vocab_size


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # Compared, not converted: JSON has whole numbers that no float holds. NaN is no smaller than anything.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
