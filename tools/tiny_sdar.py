"""The tiny SDAR: its tokenizer and configuration files, and how it starts from the tiny LLaDA.

SDAR was made from Qwen3, an autoregressive model; the tiny one is made from the tiny LLaDA: its weights, with an RMS
norm over each head of q and k whose weights keep the size that q and k had, then trained block by block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import Qwen2Tokenizer

import tiny_dream
import tiny_llada
from tiny_blocks import of_length
from tiny_model import Config, Family, TinyLM

SPECIALS = EOS, START, END, MASK = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")
ROLES = dict(zip(SPECIALS, (tiny_llada.EOS, tiny_llada.START, tiny_llada.EOT, tiny_llada.MASK), strict=True))
BLOCK = 8
CONFIG = replace(Config(), rms_norm_eps=1e-6, qk_norm=True, block=BLOCK)
chat = tiny_dream.chat


def build_tokenizer() -> Tokenizer:
    """Byte-level characters and the few words of tiny_dream.py; special tokens at the end."""
    merges = tiny_dream.word_merges()
    entries = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocab = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges).backend_tokenizer
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def files(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON files of the checkpoint, with the keys of the published ones."""
    ids = {text: tokenizer.token_to_id(text) for text in SPECIALS}
    configuration = {
        "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": config.block, "bos_token_id": ids[EOS], "eos_token_id": ids[EOS],
        "head_dim": config.d_model // config.n_heads, "hidden_act": "silu", "hidden_size": config.d_model,
        "initializer_range": 0.02, "intermediate_size": config.mlp_hidden_size, "mask_token_id": ids[MASK],
        "max_position_embeddings": 4096, "max_window_layers": config.n_layers, "model_type": "sdar",
        "num_attention_heads": config.n_heads, "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_heads, "rms_norm_eps": config.rms_norm_eps, "rope_scaling": None,
        "rope_theta": config.rope_theta, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False, "vocab_size": config.vocab_size,
    }  # fmt: skip
    generation = {
        "bos_token_id": ids[EOS], "do_sample": False, "eos_token_id": [ids[END], ids[EOS]], "pad_token_id": ids[EOS],
        "transformers_version": "4.52.4",
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tiny_dream.CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": EOS, "mask_token": MASK, "model_max_length": 4096,
        "pad_token": EOS,
    }  # fmt: skip
    return {
        "config.json": configuration, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config,
    }  # fmt: skip


def tensor_name(name: str) -> str:
    """Qwen3's names are Qwen2's and those of the two norms."""
    *_, number, module, kind = name.split(".")
    norm = module in ("q_norm", "k_norm")
    return f"model.layers.{number}.self_attn.{module}.{kind}" if norm else tiny_dream.tensor_name(name)


@torch.no_grad()
def start_from_llada(model: TinyLM, llada: TinyLM, llada_tokenizer: Tokenizer, tokenizer: Tokenizer) -> None:
    """Take over the tiny LLaDA's weights; a token it does not have starts from the mean of all."""
    source = llada.state_dict()
    for name in ("wte", "ff_out"):
        source[f"transformer.{name}.weight"] = tiny_dream.by_token(
            source[f"transformer.{name}.weight"], tokenizer, llada_tokenizer, model.config.vocab_size, ROLES
        )
    size = model.config.d_model // model.config.n_heads
    for i in range(model.config.n_layers):
        layer = f"transformer.blocks.{i}"
        scale = source[f"{layer}.attn_norm.weight"]
        for part in ("q", "k"):
            # The rows of the input have squared mean one, so this is the root mean square of q or k.
            size_of = (source[f"{layer}.{part}_proj.weight"] * scale).square().sum(1).mean().sqrt()
            source[f"{layer}.{part}_norm.weight"] = size_of.repeat(size)
    model.load_state_dict(source)


SDAR = Family(
    "sdar", MASK, EOS, CONFIG, build_tokenizer, chat, tensor_name, files, tiny_llada.save_tokenizer,
    tiny_llada.load_tokenizer, *of_length(BLOCK), sigmas=(0.0,),
)  # fmt: skip
