"""Which module may import which, which may import vLLM, and which may touch its private names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_d2cache"

# Module or folder -> what of the package it may import at module level.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "records": (),
    "option_types": (),
    "policy_registry": ("option_types",),
    "config": ("option_types", "policy_registry"),
    "generation_defaults": (),
    "ops": (),
    "infill": ("config",),
    "snapshots": ("config", "canvas", "infill", "ops"),
    "request_fit": ("config", "infill"),
    "request_fields": ("config",),
    "figures": ("config",),
    "metrics": ("compat", "models.families"),
    "compat": (
        "config", "generation_defaults", "grammar", "request_fields", "request_fit", "snapshots", "models.config_rules",
        "models.families",
    ),
    "grammar": ("config",),
    "canvas": ("records", "config", "grammar"),
    "constraints": ("records", "ops", "canvas"),
    "samplers": ("records", "config", "ops"),
    "policies": ("option_types", "policy_registry", "records", "config", "ops", "canvas"),
    "partial_rows": ("records", "canvas", "policies"),
    "denoiser": (
        "records", "config", "ops", "canvas", "constraints", "policies", "samplers", "counters", "decoding",
        "partial_rows",
    ),
    "trace": ("records", "canvas"),
    "logprobs": ("records", "ops", "canvas"),
    "counters": ("records",),
    "decoding": ("records", "config", "ops", "canvas", "constraints", "grammar", "samplers"),
    "attention.capture": ("ops",),
    "attention.eviction": ("records", "ops", "attention.capture"),
    "attention.drift": ("records", "ops", "attention.capture"),
    "value_directions": ("records", "attention.capture"),
    "row_store": (),
    "row_exits": ("records", "ops", "row_store"),
    "stored_outputs": ("records", "ops", "attention.capture", "row_exits", "row_store", "value_directions"),
    "attention": ("ops", "attention.capture", "attention.drift", "attention.eviction"),
    "step_graphs": ("records", "ops", "attention.capture"),
    "graph_check": ("ops", "attention.capture", "step_graphs"),
    "cuda_graphs": ("ops", "attention", "attention.capture", "step_graphs", "graph_check"),
    "request_check": ("config", "figures", "grammar", "infill", "snapshots"),
    "memory_plan": ("config", "canvas", "grammar", "ops", "policies", "samplers", "attention.capture", "step_graphs"),
    "startup_log": ("config", "policies", "memory_plan"),
    "scheduler": ("config", "figures", "policies", "compat", "memory_plan", "snapshots", "startup_log"),
    "runner_sampler": ("ops", "snapshots"),
    "model_state": (
        "records", "config", "ops", "canvas", "policies", "denoiser", "grammar", "trace", "logprobs", "infill",
        "attention", "attention.capture", "attention.drift", "attention.eviction", "runner_sampler", "compat",
        "snapshots", "stored_outputs", "row_exits", "row_store", "memory_plan", "step_graphs",
        "cuda_graphs", "value_directions",
    ),
    "models.weight_check": (),
    "models.families": (),
    "models.shape": (),
    "models.tensor_rules": (),
    "models.config_rules": ("models.families", "models.shape"),
    "models": (
        "records", "attention", "stored_outputs", "models.weight_check", "models.config_rules", "models.shape",
        "models.tensor_rules",
    ),
    "trace_reader": (),
    "viewer": ("trace_reader",),
    "config_hook": ("config", "compat", "samplers", "generation_defaults", "models", "models.config_rules"),
    "registration": ("models.families",),
    "doctor": ("models.config_rules", "models.families", "models.tensor_rules"),
    "cli": ("config", "samplers", "policies", "counters", "compat", "trace_reader", "viewer", "doctor"),
    "__init__": (),
}  # fmt: skip
PURE = (
    "option_types", "policy_registry", "records", "config", "generation_defaults", "ops", "canvas", "samplers",
    "policies", "denoiser", "decoding", "trace", "logprobs", "constraints", "grammar", "infill", "request_fields",
    "request_fit", "figures", "counters", "attention.capture", "attention.drift", "attention.eviction", "trace_reader",
    "viewer", "models.families", "models.shape", "models.config_rules", "models.tensor_rules", "models.weight_check",
    "snapshots", "stored_outputs", "row_exits", "row_store",
    "partial_rows", "memory_plan", "step_graphs", "graph_check", "value_directions",
)  # fmt: skip
PRIVATE_NAMES = ("_all_token_ids", "_output_token_ids", "_CONFIG_REGISTRY", "MODELS_CONFIG_MAP")


def part_of(module: str) -> str:
    """The line of the table that ``module`` (a dotted name inside the package) belongs to."""
    candidates = [part for part in MAY_IMPORT if module == part or module.startswith(part + ".")]
    assert candidates, f"{module} is in no line of the table"
    return max(candidates, key=len)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(node: ast.stmt) -> list[str]:
    """Dotted names a statement imports; of our own package without its name in front."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        module = node.module or ""
        deep = module == PACKAGE.name or (PACKAGE.parent / module.replace(".", "/")).is_dir()
        names = [f"{module}.{alias.name}" for alias in node.names] if deep else [module]
    else:
        names = []
    return names


def module_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        for name in imported(node):
            yield node.lineno, name


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PURE_MODULES = sorted(name for name in SOURCES if part_of(name) in PURE)


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()

    def visit(part: str, path: tuple[str, ...]) -> None:
        assert part not in path, " -> ".join((*path, part))
        if part not in done:
            for lower in MAY_IMPORT[part]:
                visit(lower, (*path, part))
            done.add(part)

    for part in MAY_IMPORT:
        visit(part, ())


def test_the_table_has_no_line_without_a_module() -> None:
    assert {part_of(name) for name in SOURCES} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_keep_to_the_table(name: str) -> None:
    part = part_of(name)
    for line, target in module_level_imports(ast.parse(SOURCES[name].read_text())):
        where = f"{SOURCES[name].name}:{line} imports {target}"
        if target.split(".")[0] == "vllm":
            assert part not in PURE, where
        if target.startswith(PACKAGE.name + "."):
            lower = part_of(target.removeprefix(PACKAGE.name + "."))
            assert lower == part or lower in MAY_IMPORT[part], where


@pytest.mark.parametrize("name", PURE_MODULES)
def test_pure_modules_do_not_import_vllm_anywhere(name: str) -> None:
    """Not inside functions either."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not any(target.split(".")[0] == "vllm" for target in imported(node)), node.lineno


@pytest.mark.parametrize("name", [name for name in SOURCES if part_of(name) != "compat"])
def test_private_names_are_touched_in_compat_alone(name: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        used = {getattr(node, field, None) for field in ("attr", "id")}
        if isinstance(node, ast.Import | ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        assert not used & set(PRIVATE_NAMES), node


def test_importing_the_pure_modules_loads_no_vllm() -> None:
    names = [f"{PACKAGE.name}.{name}" for name in PURE_MODULES]
    code = (
        f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'vllm'][:3])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_the_configuration_needs_no_torch() -> None:
    code = f"import sys, {PACKAGE.name}.config\nprint('torch' in sys.modules, 'vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "False False"
