"""What `make rehearse` writes: the published names, sizes and special tokens, in one piece and in shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

import benchmarks.rehearsal as module
from benchmarks.gpu.engine import CONFIGS
from benchmarks.rehearsal import FAMILIES, layers_that_fit, tensors, write_tokenizer, write_weights


@pytest.mark.parametrize(("name", "count", "billions"), [("LLaDA-8B", 291, 8.02), ("Dream-7B", 339, 7.62)])
def test_names_and_sizes_are_the_published_ones(name: str, count: int, billions: float) -> None:
    """LLaDA: 3 tensors and 9 a layer, 32 layers; Dream: 3 and 12 a layer, 28 layers (docs/models.md)."""
    found = dict(tensors(name, CONFIGS[name]))
    assert len(found) == count
    assert sum(torch.Size(shape).numel() for shape in found.values()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizer_has_the_published_ids_and_size(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    size = CONFIGS[name]["vocab_size"]
    write_tokenizer(tmp_path, name, size)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == size
    for text, index in FAMILIES[name][2].items():
        assert tokenizer.encode(text, add_special_tokens=False) == [index]
    assert CONFIGS[name]["mask_token_id"] in FAMILIES[name][2].values()
    assert tokenizer.decode(tokenizer.encode("Name the four seasons.")) == "Name the four seasons."


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_in_the_shard_that_the_index_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 6_000)
    small = {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 32}
    small |= {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    config = {**CONFIGS[name], **small, "vocab_size": 64, FAMILIES[name][1]: 3}
    total = write_weights(tmp_path, name, config, Console(quiet=True))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    wanted = dict(tensors(name, config))
    assert index["metadata"]["total_size"] == total == sum(2 * torch.Size(s).numel() for s in wanted.values())
    assert set(index["weight_map"]) == set(wanted)
    assert len(set(index["weight_map"].values())) > 1
    for tensor, shape in wanted.items():
        with safe_open(tmp_path / index["weight_map"][tensor], "pt") as file:
            found = file.get_tensor(tensor)
        assert (tuple(found.shape), found.dtype) == (shape, torch.bfloat16)


def test_layers_follow_memory() -> None:
    config = CONFIGS["LLaDA-8B"]
    assert layers_that_fit("LLaDA-8B", config, 8 << 30) == 0
    assert 0 < layers_that_fit("LLaDA-8B", config, 16 << 30) < 32
    assert layers_that_fit("LLaDA-8B", config, 1 << 40) == 32
