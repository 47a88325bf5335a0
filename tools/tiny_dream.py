"""The tiny Dream: its tokenizer and configuration files, and how it starts from the tiny LLaDA.

Dream was made from an autoregressive model; the tiny one is made from the tiny LLaDA, with Qwen2's tensor names,
biases on q, k and v, and logits shifted by one. The tokenizer has the published files (vocab.json, merges.txt, a
tokenizer_config.json with an auto_map) and merges for a few words.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import Qwen2Tokenizer

import tiny_llada
from tiny_data import masked_loss
from tiny_model import Config, Family, TinyLM, collate, decode, rotate

SPECIALS = EOS, START, END, BOS, MASK = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>",
)  # fmt: skip
# In tiny_llada.SPECIALS: which token's weights each special token starts from.
_ROLES = dict(zip(SPECIALS, (tiny_llada.EOS, tiny_llada.START, tiny_llada.EOT, tiny_llada.BOS, tiny_llada.MASK)))  # noqa: B905
# Words whose beginnings never occur in the tasks' random strings, so that the letters of those stay single tokens.
WORDS = ("Answer", "Reverse", "Replace", "Uppercase", "Count", "Sort", "Add", "How")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '" + START + "' + message['role'] + '\n' + message['content'] + '" + END + "\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + START + "assistant\n' }}{% endif %}"
)
CONFIG = replace(Config(), qkv_bias=True, shift=1)


def chat(prompt: str) -> str:
    """The chat template applied to one user message, with the generation prompt."""
    return f"{START}user\n{prompt}{END}\n{START}assistant\n"


def word_merges() -> list[tuple[str, str]]:
    """The merges that spell WORDS letter by letter."""
    return list(dict.fromkeys((word[:i], word[i]) for word in WORDS for i in range(1, len(word))))


def build_tokenizer() -> Tokenizer:
    """Byte-level characters and a few words, as vocab.json and merges.txt describe them; special tokens at the end."""
    merges = word_merges()
    entries = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    return _tokenizer({entry: index for index, entry in enumerate(entries)}, merges)


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Qwen2's tokenizer over this vocabulary."""
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges).backend_tokenizer
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def _model_of(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write vocab.json and merges.txt."""
    vocab, merges = _model_of(tokenizer)
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n")
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read the two files back."""
    lines = (path / "merges.txt").read_text().splitlines()[1:]
    return _tokenizer(json.loads((path / "vocab.json").read_text()), [tuple(line.split(" ")) for line in lines])


def files(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON files of the checkpoint, in the layout of the published ones."""
    ids = {text: tokenizer.token_to_id(text) for text in SPECIALS}
    tokens = {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS], "pad_token_id": ids[EOS]}
    configuration = {
        "architectures": ["DreamModel"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        **tokens, "hidden_act": "silu", "hidden_size": config.d_model, "initializer_range": 0.02,
        "intermediate_size": config.mlp_hidden_size, "mask_token_id": ids[MASK], "max_position_embeddings": 131072,
        "max_window_layers": 28, "model_type": "Dream", "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers, "num_key_value_heads": config.n_heads,
        "rms_norm_eps": config.rms_norm_eps, "rope_scaling": None, "rope_theta": config.rope_theta,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.46.2", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    generation = {
        "_from_model_config": True, "alg": "origin", "alg_temp": None, **tokens, "eps": 0.001, "mask_token_id": None,
        "output_history": False, "steps": 512, "temperature": 0.0, "top_k": None, "top_p": None,
        "transformers_version": "4.46.2",
    }  # fmt: skip
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": text, **flags} for text, index in ids.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": BOS, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": EOS,
        "errors": "replace", "mask_token": MASK, "model_max_length": 131072, "pad_token": EOS,
        "split_special_tokens": False, "tokenizer_class": "DreamTokenizer", "unk_token": None,
    }  # fmt: skip
    special = {"bos_token": BOS, "eos_token": EOS, "mask_token": MASK, "pad_token": EOS}
    return {
        "config.json": configuration, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special, "added_tokens.json": ids,
    }  # fmt: skip


_BLOCK = {
    "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip
_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


def tensor_name(name: str) -> str:
    """`transformer.blocks.0.q_proj.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    *_, number, module, kind = name.split(".")
    return f"model.layers.{number}.{_BLOCK[module]}.{kind}" if number.isdigit() else f"{_TOP[module]}.{kind}"


@torch.no_grad()
def start_from_llada(model: TinyLM, llada: TinyLM, llada_tokenizer: Tokenizer, tokenizer: Tokenizer) -> None:
    """Take over the tiny LLaDA's weights.

    A row of the shifted model speaks for the slot on its right: its queries are turned by one position, so that it
    looks where that slot's row looked. Tokens the LLaDA does not have start from the mean of all.
    """
    source = llada.state_dict()
    for name in ("wte", "ff_out"):
        source[f"transformer.{name}.weight"] = by_token(
            source[f"transformer.{name}.weight"], tokenizer, llada_tokenizer, model.config.vocab_size, _ROLES
        )
    cos, sin = llada.angles(torch.ones(1))
    for i in range(model.config.n_layers):
        name = f"transformer.blocks.{i}.q_proj.weight"
        heads = source[name].unflatten(0, (model.config.n_heads, -1)).mT  # [heads, d, head size]
        source[name] = rotate(heads, cos, sin).mT.flatten(0, 1)
    missing, unknown = model.load_state_dict(source, strict=False)
    assert not unknown and all(name.endswith("bias") for name in missing)


def by_token(
    weight: Tensor, tokenizer: Tokenizer, llada_tokenizer: Tokenizer, rows: int, roles: dict[str, str]
) -> Tensor:
    """Rows of ``weight`` in the order of ``tokenizer``'s ids; `roles`: special tokens by the LLaDA's names of them."""
    out = weight.mean(0).repeat(rows, 1)
    for token, index in tokenizer.get_vocab().items():
        other = next(
            (i for t in (roles.get(token, token), f"Ġ{token}") if (i := llada_tokenizer.token_to_id(t)) is not None),
            None,
        )
        if other is not None:
            out[index] = weight[other]
    return out


DREAM = Family(
    "dream", MASK, EOS, CONFIG, build_tokenizer, chat, tensor_name, files, save_tokenizer, load_tokenizer,
    collate, masked_loss, decode,
)  # fmt: skip
