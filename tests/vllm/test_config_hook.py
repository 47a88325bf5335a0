"""What the config hook makes of a checkpoint's files and the operator's flags; no engine is started."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.config.vllm import OptimizationLevel
from vllm.engine.arg_utils import EngineArgs

from tests.reference.blocks import BLOCK_ORACLE
from tests.reference.oracle import ORACLE
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.engine import config_hook
from vllm_d2cache.engine.config_hook import DEFAULT_MAX_MODEL_LEN, DiffusionConfigHook
from vllm_d2cache.engine.part_rows import configure_parts, part_rows
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.requests.resolve import parse_server_options

pytestmark = pytest.mark.vllm


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Dream's configuration files without weights, with the auto_map of the published ones."""
    config = json.loads((ORACLE / "dream" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(ORACLE / "dream" / "generation_config.json", tmp_path)
    return tmp_path


def configured(directory: Path, **settings: Any) -> VllmConfig:
    return EngineArgs(str(directory), skip_tokenizer_init=True, **settings).create_engine_config()


def options(config: VllmConfig) -> dict[str, Any]:
    return config.additional_config["d2cache"]


def test_a_checkpoint_without_wishes_gets_the_defaults(checkpoint: Path) -> None:
    config = configured(checkpoint, max_num_batched_tokens=DEFAULT_MAX_MODEL_LEN)
    assert options(config) == {}
    assert config.model_config.max_model_len == DEFAULT_MAX_MODEL_LEN


def test_rows_of_a_step_and_of_a_layer(checkpoint: Path) -> None:
    """A step has room for the longest text; what the operator or vLLM says is what a layer computes at a time."""
    config = configured(checkpoint)
    assert config.scheduler_config.max_num_batched_tokens == DEFAULT_MAX_MODEL_LEN
    assert part_rows(config) == options(config)["part_rows"] < DEFAULT_MAX_MODEL_LEN
    config = configured(checkpoint, max_num_batched_tokens=300)
    assert (config.scheduler_config.max_num_batched_tokens, part_rows(config)) == (DEFAULT_MAX_MODEL_LEN, 300)
    DiffusionConfigHook.verify_and_update_config(config)  # vLLM may do it again
    assert (config.scheduler_config.max_num_batched_tokens, part_rows(config)) == (DEFAULT_MAX_MODEL_LEN, 300)
    config = configured(checkpoint, max_num_batched_tokens=20000)
    assert (config.scheduler_config.max_num_batched_tokens, part_rows(config)) == (20000, 20000)
    chosen = {"d2cache": {"part_rows": 1000}}
    config = configured(checkpoint, max_num_batched_tokens=20000, additional_config=chosen)
    assert (config.scheduler_config.max_num_batched_tokens, part_rows(config)) == (20000, 1000)
    with pytest.raises(ValueError, match=r"part_rows.*: must be an integer >= 1"):
        configured(checkpoint, additional_config={"d2cache": {"part_rows": 0}})


def test_layers_that_compute_all_rows_at_a_time(checkpoint: Path) -> None:
    """Where rows have adapters."""
    config = configured(checkpoint, enable_lora=True, max_num_batched_tokens=300)
    assert part_rows(config) == config.scheduler_config.max_num_batched_tokens == DEFAULT_MAX_MODEL_LEN
    with pytest.raises(ValueError, match=r"part_rows.*: leave it out; --enable-lora: adapters are laid out for"):
        configured(checkpoint, enable_lora=True, additional_config={"d2cache": {"part_rows": 300}})
    scheduler: Any = SimpleNamespace(lora_config=None, scheduler_config=SimpleNamespace(max_num_batched_tokens=500))
    assert configure_parts(scheduler, ServerOptions({}), 100) == {"part_rows": 100}


def test_longest_request_is_the_operators_choice(checkpoint: Path) -> None:
    assert configured(checkpoint, max_model_len=20000).model_config.max_model_len == 20000


def test_generation_config_is_mapped_and_the_operator_wins(checkpoint: Path) -> None:
    wishes = {"top_p": 0.9, "alg": "entropy", "temperature": 0.2, "min_p": 0.05}
    whole = {"max_num_batched_tokens": DEFAULT_MAX_MODEL_LEN}
    (checkpoint / "generation_config.json").write_text(json.dumps(wishes))
    config = configured(checkpoint, **whole)
    assert options(config) == {"confidence_top_p": 0.9, "score": "entropy"}
    defaults = config.model_config.get_diff_sampling_param()
    assert defaults == {"max_tokens": 256, "temperature": 0.2, "top_p": 0.9}
    chosen = {"d2cache": {"score": "margin", "window": 8}}
    assert options(configured(checkpoint, additional_config=chosen, **whole)) == {
        "confidence_top_p": 0.9,
        "score": "margin",
        "window": 8,
    }
    assert options(configured(checkpoint, generation_config="vllm", **whole)) == {}
    overridden = configured(checkpoint, override_generation_config={"top_p": 0.5})
    assert options(overridden)["confidence_top_p"] == 0.5
    assert configured(checkpoint, override_generation_config={"min_p": 0.0, "alg": "entropy"})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"temperature": 0.7, "min_p": 0.05}, r"min_p=0\.05 \(every request would be refused for it\)"),
        ({"eos_token_id": 5}, r"eos_token_id=5 \(it would have no effect\)"),
        ({"alg_temp": 0.5}, r"alg_temp=0\.5 \(commits are not drawn at random\)"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 \(must be an integer >= 1\)"),
        ({"top_p": "x"}, r"top_p='x' \(must be a number > 0 and <= 1\)"),
    ],
)
def test_defaults_that_no_request_could_have_are_refused(checkpoint: Path, override: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"--override-generation-config {said}"):
        configured(checkpoint, override_generation_config=override)


def test_a_files_defaults_are_judged_too(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"top_p": 2, "min_p": 0.1, "eos_token_id": [1, 2]}))
    with pytest.raises(ValueError, match=r"with: generation_config\.json top_p=2 \(must be .*<= 1\)") as error:
        configured(checkpoint)
    assert "min_p" not in str(error.value)  # of a file it is ignored


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32768}),
    ],
)
def test_other_variants_of_dream_are_refused(checkpoint: Path, key: str, value: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    named = f"rope_parameters={value!r}" if key == "rope_scaling" else f"{key}={value!r}"
    with pytest.raises(ValueError, match=re.escape(named)):
        configured(checkpoint)


def test_quantisation_that_nobody_supports_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"weights quantised by experts_int8 \(supported: compressed-tensors, "):
        configured(checkpoint, quantization="experts_int8")


def test_quantisation_that_was_never_tried_is_said_in_the_log(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    from vllm_d2cache.engine import config_hook

    said: list[str] = []
    monkeypatch.setattr(config_hook.logger, "info", lambda text, *args: said.append(text % args))
    # What a GPU would do with it: this machine's platform may refuse it.
    monkeypatch.setattr(type(current_platform), "verify_quantization", lambda *_: None)
    configured(checkpoint, quantization="fp8")
    assert "vllm-d2cache: weights quantised by fp8: not tested; they go through vLLM's own layers" in said
    said.clear()
    configured(checkpoint)
    assert not any("quantised" in text for text in said)


def test_an_engine_has_one_grammar_backend(checkpoint: Path) -> None:
    config = configured(checkpoint).structured_outputs_config
    assert (config.backend, config.disable_any_whitespace) == ("xgrammar", True)
    chosen = configured(checkpoint, structured_outputs_config={"backend": "guidance"}).structured_outputs_config
    assert (chosen.backend, chosen.disable_any_whitespace) == ("guidance", True)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline-parallel-size"),
        ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype"),
        ({"load_format": "sharded_state"}, r"--load-format sharded_state \(damaged weights would not be noticed"),
        ({"structured_outputs_config": {"backend": "outlines"}}, "structured output backend outlines"),
    ],
)
def test_what_cannot_work_is_refused_by_name(checkpoint: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        configured(checkpoint, **settings)


def test_experts_are_not_shared_among_engines(checkpoint: Path) -> None:
    """Data parallelism is vLLM's own, but its experts count on rows that are known before a step."""
    assert configured(checkpoint, data_parallel_size=2).parallel_config.data_parallel_size == 2
    with pytest.raises(ValueError, match="data-parallel-size > 1 with a mixture of experts"):
        configured(BLOCK_ORACLE / "llada2", data_parallel_size=2)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as our hook asks, the platform is CUDA."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)


def raw_config(level: OptimizationLevel = OptimizationLevel.O2, **compilation: Any) -> Any:
    """What the hook reads to decide how steps are executed, before vLLM has filled in defaults."""
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False, hf_config=SimpleNamespace(traits=lambda: FamilyTraits(0))),
        lora_config=None,
        parallel_config=SimpleNamespace(data_parallel_size=1),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        optimization_level=level,
        compilation_config=SimpleNamespace(**{"mode": None, "cudagraph_mode": None, **compilation}),
    )


def test_on_a_gpu_the_graphs_are_ours(on_cuda: None) -> None:
    raw = raw_config()
    config_hook._set_execution(raw)
    assert raw.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert raw.compilation_config.mode == CompilationMode.NONE
    assert not raw.model_config.enforce_eager, "what the operator says: the worker goes by it"
    raw.scheduler_config.scheduler_cls = config_hook.SCHEDULER
    assert config_hook._without_graphs(raw, parse_server_options(None)) == {}, "a configuration built anew"
    raw.model_config.hf_config.traits = lambda: FamilyTraits(0, block_length=32)
    assert config_hook._without_graphs(raw, parse_server_options(None)) == {}, "blocks have graphs, too"
    raw.lora_config = object()
    assert config_hook._without_graphs(raw, parse_server_options(None)) == {"graph_rows": 0}, "they know no adapters"


@pytest.mark.parametrize("mode", [CompilationMode.VLLM_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE])
def test_the_network_is_compiled_where_the_operator_says_so(on_cuda: None, mode: CompilationMode) -> None:
    raw = raw_config(mode=mode)
    for _ in range(2):  # vLLM builds a configuration again from one that has been here
        config_hook._set_execution(raw)
        assert raw.compilation_config.mode == mode
        assert raw.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


def test_compilation_on_a_cpu(checkpoint: Path) -> None:
    assert configured(checkpoint).compilation_config.mode == CompilationMode.NONE
    chosen = configured(checkpoint, compilation_config={"mode": CompilationMode.VLLM_COMPILE})
    assert not chosen.model_config.enforce_eager
    assert chosen.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE, "what vLLM makes of it on a CPU"
    with pytest.raises(ValueError, match="vllm_compile compiles the layers"):
        configured(checkpoint, compilation_config={"mode": CompilationMode.STOCK_TORCH_COMPILE})


@pytest.mark.parametrize(
    ("section", "compilation", "want"),
    [
        ({}, {}, {}),
        ({"attention_backend": "triton"}, {}, {}),
        ({"attention_backend": "torch"}, {}, {"graph_rows": 0}),
        ({"attention_backend": "xformers"}, {}, {"graph_rows": 0}),
        ({}, {"cudagraph_mode": CUDAGraphMode.NONE}, {"graph_rows": 0}),
        ({"graph_rows": 0}, {"cudagraph_mode": CUDAGraphMode.NONE}, {}),
        ({}, {"level": OptimizationLevel.O0}, {"graph_rows": 0}),
        ({}, {"cudagraph_mode": CUDAGraphMode.FULL}, {}),
    ],
)
def test_what_leaves_no_graphs(
    on_cuda: None, section: dict[str, Any], compilation: dict[str, Any], want: dict[str, int]
) -> None:
    assert config_hook._without_graphs(raw_config(**compilation), parse_server_options(section)) == want


def test_a_cpu_stays_eager(checkpoint: Path) -> None:
    assert configured(checkpoint).model_config.enforce_eager


@pytest.mark.parametrize(
    "wish", [{"cudagraph_capture_sizes": [64]}, {"max_cudagraph_capture_size": 64}], ids=["sizes", "largest"]
)
def test_sizes_of_vllms_own_graphs_are_refused(checkpoint: Path, wish: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="graph_rows"):
        configured(checkpoint, compilation_config=wish)


BLOCKS = BLOCK_ORACLE / "sdar"  # block length 4


def test_texts_in_blocks_keep_vllms_prefix_cache_and_chunks() -> None:
    config = configured(BLOCKS)
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert config.model_config.max_model_len == 1024  # config.json's, not DEFAULT_MAX_MODEL_LEN
    assert options(config)["prefill_piece"] == config.scheduler_config.max_num_batched_tokens // 4


def test_the_operators_pieces() -> None:
    config = configured(BLOCKS, long_prefill_token_threshold=50, max_num_batched_tokens=256)
    assert options(config)["prefill_piece"] == 48
    # vLLM must not cut what we cut.
    assert config.scheduler_config.long_prefill_token_threshold == 0
    assert options(configured(BLOCKS, enable_chunked_prefill=False))["prefill_piece"] == 0


@pytest.mark.parametrize(
    ("block", "page", "caching", "size"),
    [(4, 16, True, 16), (32, 16, False, 16), (32, 64, True, 64)],
)
def test_the_operators_pages(block: int, page: int, caching: bool, size: int) -> None:
    config = configured(BLOCKS, hf_overrides={"block_size": block}, block_size=page)
    assert (config.cache_config.enable_prefix_caching, config.cache_config.block_size) == (caching, size)


@pytest.mark.parametrize("block", [4, 32, 48])
def test_pages_are_whole_blocks_where_nobody_chooses(block: int) -> None:
    """Which size that is depends on the platform."""
    config = configured(BLOCKS, hf_overrides={"block_size": block})
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.block_size % block == 0


@pytest.mark.parametrize("name", ["block_length", "prefill_piece"])
def test_blocks_where_there_are_none_are_refused(checkpoint: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*: is for models whose text is cut into blocks; leave it out, got 8"):
        configured(checkpoint, additional_config={"d2cache": {name: 8}})


def test_no_prefix_cache_is_the_operators_choice() -> None:
    assert not configured(BLOCKS, enable_prefix_caching=False).cache_config.enable_prefix_caching
