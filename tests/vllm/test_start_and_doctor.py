"""A checkpoint that doctor has something against does not start, and the other way round; both say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs

from tests.reference.int8 import write_int8
from tests.reference.oracle import ORACLE
from vllm_d2cache.doctor.model_directory import check_model
from vllm_d2cache.registration import register_all

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_all()


def checkpoint(directory: Path, family: str, changes: dict[str, Any]) -> Path:
    """The traces' checkpoint with keys of its config.json changed; ``...`` removes one."""
    model = Path(shutil.copytree(ORACLE / family, directory / "model"))
    content = {**json.loads((model / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return model


def start(model: Path, **settings: Any) -> Any:
    """The configuration, or vLLM's error."""
    return EngineArgs(str(model), skip_tokenizer_init=True, max_model_len=256, **settings).create_engine_config()


def problems(model: Path) -> list[str]:
    return [f.text for f in check_model(model, None) if f.status == "problem" and f.name != "tokenizer"]


AUTO_MAP = {"auto_map": {"AutoConfig": "configuration_foo.FooConfig", "AutoModel": "modeling_foo.FooModel"}}
FILES: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear": ("llada", {"rope_scaling": {"type": "linear"}}, "rope_parameters.factor=None (must be a number of at"),
    "ntk": ("llada", {"rope_parameters": {"rope_type": "ntk", "factor": 0.5}}, "rope_parameters.factor=0.5 (must be a"),
    "yarn": ("dream", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "alpha": 1}},
             "rope_parameters.alpha=1 (no setting of yarn; it has factor, original_max_position_embeddings, "),
    "dynamic": ("llada", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_parameters={'type': 'dynamic'"),
    "mrope": ("dream", {"rope_scaling": {"type": "mrope"}}, "rope_parameters={'type': 'mrope'}"),
    "no object": ("dream", {"rope_scaling": [4]}, "rope_parameters=[4]"),
    "theta": ("llada", {"rope_theta": "10000"}, "rope_theta='10000' (must be a number from 1 to 1e+30)"),
    "layers": ("llada", {"n_layers": 0}, "n_layers=0 (must be a whole number from 1"),
    "heads": ("dream", {"num_attention_heads": 3}, "3 attention heads do not divide a width of 64"),
    "null mask": ("llada", {"mask_token_id": None}, "mask_token_id=None (config.json must name it"),
    "no mask": ("dream", {"mask_token_id": ...}, "mask_token_id=None (config.json must name it"),
    "other mask": ("dream", {"mask_token_id": 384}, "mask_token_id=384 (not in the vocabulary"),
    "null vocabulary": ("llada", {"vocab_size": None}, "an embedding of 384 rows for a vocabulary of 126464"),
    "quip": ("llada", {"quantization_config": {"quant_method": "quip"}}, "weights quantised by quip (supported: compr"),
    "no method": ("dream", {"quantization_config": {}}, "weights quantised by None (supported: compressed-tensors, "),
    "quantised how": ("llada", {"quantization_config": "gptq"}, "weights quantised by 'gptq'"),
    "self": ("llada", {"self": 1}, "self=1 (no setting of these models)"),
    "tiny theta": ("llada", {"rope_theta": 1e-40}, "rope_theta=1e-40 (must be a number from 1 to 1e+30)"),
    "awq": ("llada", {"quantization_config": {"quant_method": "awq", "bits": [4]}}, "bits=[4] (must be 4, 8)"),
    "gptq": ("llada", {"quantization_config": {"quant_method": "gptq"}}, "bits=None (must be 2, 3, 4, 8)"),
    "targets": ("llada", {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {
        "g": {"weights": {"type": "int", "num_bits": 8}}}}}, "config_groups.g.targets=None (must be a list of names"),
    "dtype": ("llada", {"torch_dtype": "int4"}, "torch_dtype='int4' (must be bfloat16, float16, float32)"),
    "auto_map": ("dream", {"auto_map": None}, "auto_map=None (must be an object, or be left out)"),
    "no map": ("llada", {"auto_map": 3}, "auto_map=3 (must be an object, or be left out)"),
    "text_config": ("llada", {"text_config": {"hidden_size": 64}}, "text_config={'hidden_size': 64} (no setting of t"),
    "length": ("dream", {"model_max_length": "4096"}, "model_max_length='4096' (must be a number of at least 1)"),
    "experts": ("llada", {"num_local_experts": []}, "num_local_experts=[] (supported: 0)"),
    "older name": ("llada", {"compression_config": "x"}, "quantization_config: weights quantised by 'x'"),
    "nobody's": ("llada", {"architectures": ["FooDiffusion"], "model_type": "foo", **AUTO_MAP},
                 "the architecture FooDiffusion is not supported; vllm-d2cache serves LLaDAModelLM, "),
    "nobody's architecture": ("llada", {"architectures": ["FooDiffusion"], **AUTO_MAP},
                              "the architecture FooDiffusion is not supported; vllm-d2cache serves LLaDAModelLM, "),
    "no architecture": ("dream", {"architectures": ...}, "config.json has no architectures; vllm-d2cache serves"),
    "a word": ("dream", {"architectures": "DreamModel"}, "config.json has no architectures; vllm-d2cache serves"),
    "no type": ("dream", {"model_type": ...}, "model_type=None (for DreamModel it must be 'Dream')"),
    "another's type": ("llada", {"model_type": "llama"}, "model_type='llama' (for LLaDAModelLM it must be 'llada')"),
    "another family's type": ("llada", {"model_type": "Dream"}, "model_type='Dream' (for LLaDAModelLM it must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_both_refuse_it_in_the_same_words(case: str, tmp_path: Path) -> None:
    family, changes, said = FILES[case]
    model = checkpoint(tmp_path, family, changes)
    (problem,) = problems(model)
    assert said in problem
    with pytest.raises(ValueError) as error:
        start(model)
    assert said in str(error.value)
    assert "trust" not in str(error.value)
    assert error.value.__context__ is None, "a page of tracebacks"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llada", {"rope_scaling": {"type": "default"}}),
        ("llada", {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llada", {"rope_theta": None, "rms_norm_eps": None, "max_sequence_length": None, "n_kv_heads": None}),
        ("dream", {"rope_theta": None, "rms_norm_eps": None, "max_position_embeddings": None, "sliding_window": 64}),
        ("dream", {"auto_map": AUTO_MAP["auto_map"], "expand_token_id": 5}),
    ],
    ids=["default", "theta inside", "llada nulls", "dream nulls", "infilling"],
)
def test_both_accept_it(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family, changes)
    assert problems(model) == []
    config = start(model).model_config
    theta = (changes.get("rope_parameters") or {}).get("rope_theta", {"llada": 500000.0, "dream": 1e6}[family])
    assert config.hf_config.shape().rope_theta == theta
    assert config.get_sliding_window() is None


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("llada", {"rope_parameters": {"rope_type": "yarn", "factor": "8"}}, "rope_parameters.factor='8'"),
        ("dream", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_parameters={'rope_type': 'dynamic'"),
        ("dream", {"rope_parameters": {"factor": 8.0}}, "rope_parameters={'factor': 8.0}"),
        ("llada", {"rope_theta": "x"}, "rope_theta='x'"),
        ("llada", {"n_heads": 3}, "3 attention heads do not divide"),
        ("dream", {"num_attention_heads": None, "hidden_size": 65}, "28 attention heads do not divide a width of 65"),
        ("dream", {"mask_token_id": 999}, "mask_token_id=999"),
        ("llada", {"architectures": ["FooDiffusion"]}, "the architecture FooDiffusion is not supported"),
    ],
)
def test_overrides_of_the_operator_are_judged_too(
    family: str, overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        start(checkpoint(tmp_path, family, {}), hf_overrides=overrides)
    assert said in str(error.value)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(
    "overrides", [{"rope_theta": 777.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}]
)
def test_an_overridden_theta_is_computed(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    config = start(checkpoint(tmp_path, family, {}), hf_overrides=overrides).model_config
    assert config.hf_config.shape().rope_theta == 777.0
    assert config.max_model_len == 256


@pytest.mark.parametrize("source", ["auto", "vllm"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"eos_token_id": [371, "x"]}',
            "generation_config.json eos_token_id=[371, 'x'] (must be an id or a list of i",
        ),
        (
            '{"eos_token_id": 370}',
            "generation_config.json eos_token_id=370 (must be an id or a list of ids from 0 to 38",
        ),
        ('{"pad_token_id": "x"}', "generation_config.json pad_token_id='x' (must be an id from 0 to 383, and not the"),
        ('{"cache_implementation": "nope"}', "generation_config.json cache_implementation='nope' (transformers cannot"),
        ("[]", "generation_config.json is not a JSON object"),
        ("null", "generation_config.json is not a JSON object"),
        ("7", "generation_config.json is not a JSON object"),
        ("", "generation_config.json cannot be read: Expecting value"),
        ('{"a": ', "generation_config.json cannot be read: Expecting value"),
        ("[" * 100000, "generation_config.json cannot be read: it is nested too deeply"),
    ],
)
def test_both_judge_generation_config(content: str, said: str, source: str, tmp_path: Path) -> None:
    """vLLM takes the end tokens from the file with either source."""
    model = checkpoint(tmp_path, "llada", {})
    (model / "generation_config.json").write_text(content)
    (problem,) = problems(model)
    assert said in problem
    with pytest.raises(ValueError) as error:
        start(model, generation_config=source)
    assert said in str(error.value)


def rename(model: Path, change: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(dict(change(name, t) for name, t in tensors.items()), model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n, t: (f"base_model.{n}", t), "has a tensor base_model.model.transformer"),
        (lambda n, t: (n.replace("blocks.2.q_proj", "blocks.2.q"), t), "has a tensor model.transformer.blocks.2.q."),
        (lambda n, t: (n, t[:8].clone() if "3.ff_norm" in n else t), "blocks.3.ff_norm.weight has the shape (8,)"),
    ],
    ids=["prefix", "renamed", "shape"],
)
def test_both_name_the_tensor(change: Any, said: str, tmp_path: Path, load: Any) -> None:
    model = checkpoint(tmp_path, "llada", {})
    rename(model, change)
    assert any(said in problem for problem in problems(model))
    with pytest.raises(ValueError) as error:
        load(model)
    assert said in str(error.value)


def write_index(content: Any) -> Any:
    return lambda model: (model / "model.safetensors.index.json").write_text(json.dumps(content))


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def store_as(dtype: torch.dtype) -> Any:
    return lambda model: rename(model, lambda n, t: (n, t.to(dtype) if n.endswith("1.q_proj.weight") else t))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: shutil.copy(m / "model.safetensors", m / "old.safetensors"), "in two files"),
        (cut, "model.safetensors: has "),
        (lambda m: (m / "model.safetensors").write_text("x"), "model.safetensors: is no safetensors file"),
        (write_index([]), "model.safetensors.index.json is not a JSON object"),
        (write_index({"weight_map": {"t": None}}), "weight_map.t=None (must be the name of a file)"),
        (write_index({"weight_map": {}}), "weight_map={} (must be an object"),
        (write_index({"weight_map": ["t"]}), "weight_map=['t'] (must be an object"),
        (store_as(torch.int64), "1.q_proj.weight has the dtype int64 (not quantised, it must be float64"),
        (store_as(torch.bool), "1.q_proj.weight has the dtype bool"),
        (store_as(torch.float8_e4m3fn), "1.q_proj.weight has the dtype float8_e4m3fn"),
        (store_as(torch.complex64), "1.q_proj.weight has the dtype complex64"),
    ],
    ids=["twice", "cut", "no file", "list", "null", "nothing", "map", "int64", "bool", "float8", "complex64"],
)
def test_both_name_the_file_or_the_tensor(spoil: Any, said: str, tmp_path: Path, load: Any) -> None:
    model = checkpoint(tmp_path, "llada", {})
    spoil(model)
    assert any(said in problem for problem in problems(model))
    with pytest.raises(ValueError) as error:
        load(model)
    assert said in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_both_accept_any_floats(dtype: torch.dtype, tmp_path: Path, load: Any) -> None:
    model = checkpoint(tmp_path, "llada", {})
    store_as(dtype)(model)
    assert problems(model) == []
    load(model)


def test_a_quantised_checkpoint_that_lacks_a_layer(tmp_path: Path, load: Any) -> None:
    """vLLM would leave what was in that memory."""
    model = write_int8(ORACLE / "dream", tmp_path / "model")
    assert problems(model) == []
    load(model)
    gone = "model.layers.2.mlp.up_proj."
    tensors = {name: t for name, t in load_file(model / "model.safetensors").items() if not name.startswith(gone)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said = f"the checkpoint lacks {gone}weight in any form"
    assert problems(model) == [said]
    with pytest.raises(ValueError, match=said):
        load(model)


def test_checkpoints_of_others_are_read_as_ever(tmp_path: Path) -> None:
    """Our sentence is for what nobody has; a family of vLLM's whose file cannot be read keeps vLLM's error."""
    for name, content in {
        "broken": {"architectures": ["LlamaForCausalLM"], "model_type": "foo", **AUTO_MAP},
        "unknown": {"model_type": "foo"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        with pytest.raises((ValueError, RuntimeError)) as error:
            ModelConfig(model=str(tmp_path / name))
        assert "d2cache" not in str(error.value)
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(llama))
    assert ModelConfig(model=str(tmp_path / "llama"), skip_tokenizer_init=True).max_model_len == 1024
