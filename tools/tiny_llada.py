"""The tiny LLaDA: its tokenizer, chat template and configuration files."""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tiny_data import masked_loss
from tiny_model import Config, Family, collate, decode
from tiny_tasks import train_problem

SPECIALS = (
    "<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|mdm_mask|>",
)  # fmt: skip
BOS, EOS, START, END, EOT, MASK = SPECIALS
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '" + START + "' + message['role'] + '" + END + "\n\n' + "
    "message['content'] | trim + '" + EOT + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START + "assistant" + END + "\n\n' }}{% endif %}"
)


def chat(prompt: str) -> str:
    """The chat template applied to one user message, with the generation prompt."""
    return f"{BOS}{START}user{END}\n\n{prompt.strip()}{EOT}{START}assistant{END}\n\n"


def build_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """Byte-level characters, the commonest whole words of the tasks, and LLaDA's special tokens at the end.

    A word that is an entry is one token, all other text goes byte by byte (no merges), so any UTF-8 text
    round-trips and the letters of random strings stay single tokens.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng, counts = random.Random(0), collections.Counter({"user": 10**6, "assistant": 10**6})
    for _ in range(5000):
        problem = train_problem(rng, fewshot_share=0.0)
        for text in (problem.prompt, problem.answer):
            counts.update(word for word, _ in byte_level.pre_tokenize_str(text))
    words = [word for word, n in counts.most_common() if n > 20 and sum(c.isalpha() for c in word) > 1 and
             word.strip("Ġ").isalpha() and len(word.strip("Ġ")) > 1]  # fmt: skip
    entries = sorted(byte_level.alphabet()) + words[: vocab_size - 256 - len(SPECIALS)]
    vocab = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def configuration(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json in the layout of the published LLaDA checkpoints."""
    eos, no, none = tokenizer.token_to_id(EOS), False, None
    return {
        "activation_type": "silu", "alibi": no, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": no, "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": no, "block_group_size": 1, "block_type": "llama", "d_model": config.d_model,
        "embedding_dropout": 0.0, "embedding_size": config.vocab_size, "eos_token_id": eos,
        "flash_attention": no,
        "include_bias": no, "include_qkv_bias": no, "init_cutoff_factor": none, "init_device": "cpu",
        "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": no, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "mask_token_id": tokenizer.token_to_id(MASK),
        "max_sequence_length": 4096,
        "mlp_hidden_size": config.mlp_hidden_size, "mlp_ratio": 4, "model_type": "llada",
        "multi_query_attention": none, "n_heads": config.n_heads, "n_kv_heads": config.n_heads,
        "n_layers": config.n_layers, "pad_token_id": eos, "precision": "amp_bf16", "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps, "rope": True, "rope_full_precision": True,
        "rope_theta": config.rope_theta, "scale_logits": no, "torch_dtype": "float32",
        "transformers_version": "4.46.3", "use_cache": no, "vocab_size": config.vocab_size,
        "weight_tying": no,
    }  # fmt: skip


def files(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON files of the checkpoint."""
    eos = tokenizer.token_to_id(EOS)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
        "clean_up_tokenization_spaces": False, "model_max_length": 4096, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    generation = {
        "bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": eos, "pad_token_id": eos,
        "mask_token_id": tokenizer.token_to_id(MASK), "transformers_version": "4.46.2",
    }  # fmt: skip
    return {
        "config.json": configuration(config, tokenizer), "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
    }  # fmt: skip


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json."""
    tokenizer.save(str(out / "tokenizer.json"))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json back."""
    return Tokenizer.from_file(str(path / "tokenizer.json"))


LLADA = Family(
    "llada", MASK, EOS, Config(), build_tokenizer, chat, "model.{}".format, files, save_tokenizer, load_tokenizer,
    collate, masked_loss, decode,
)  # fmt: skip
