"""Which folder may import which, which may import vLLM, and what the middle of the house may name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.policies import POLICY_CLASSES

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_d2cache"

# From the ground up: a folder imports only what stands above it in this list, at module level, in functions and for
# types alike. The last ones are modules, the doors that vLLM enters by.
FOLDERS = (
    "ops",  # what is computed
    "options",  # what may be said
    "canvas",  # the texts being written
    "mechanisms",  # what layers do for a policy or a decoder
    "decoders",  # what to commit
    "policies",  # what to recompute
    "graphs",  # steps as CUDA graphs
    "requests",  # what a request asks
    "observe",  # what was done, and what it cost
    "step",  # one step, without an engine
    "compat",  # private vLLM names, and patches
    "engine",  # inside vLLM
    "models",  # networks and families
    "registration",
    "metrics",
    "viewer",
    "doctor",
    "cli",
    "__init__",
)
PURE = (
    "ops",
    "options",
    "canvas",
    "mechanisms",
    "decoders",
    "policies",
    "graphs",
    "requests",
    "observe",
    "step",
    "viewer",
)
# Of the folders that import vLLM, modules that do not, and are tested in seconds.
PURE_MODULES = (
    *("engine.refusals", "engine.memory_plan", "engine.startup_log", "engine.weight_check"),
    *(
        "models.base_configs",
        "models.block_configs",
        "models.config_rules",
        "models.configs",
        "models.families",
        "models.generation_file",
        "models.quantisation",
        "models.rope",
        "models.safetensors_files",
        "models.shape",
    ),
    *("models.tensor_rules", "registration"),
)
TYPED_ONLY = ("engine.startup_log",)  # vLLM's types, for the checker alone
PRIVATE_NAMES = ("_all_token_ids", "_output_token_ids", "_CONFIG_REGISTRY", "MODELS_CONFIG_MAP")

# The middle: what every step passes through. It knows interfaces, and no implementation.
MIDDLE_FOLDERS, MIDDLE_MODULES = ("canvas", "step"), ("engine.model_state", "engine.runner_sampler")
INTERFACES = (
    *("mechanisms.base", "mechanisms.partial_forward", "policies.base", "policies.budget", "policies.registry"),
    *("decoders.base", "decoders.registry", "decoders.schedule", "decoders.scores"),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MIDDLE = [name for name in SOURCES if name.split(".")[0] in MIDDLE_FOLDERS or name in MIDDLE_MODULES]
MECHANISMS = [name.split(".")[1] for name in SOURCES if name.startswith("mechanisms.") and name not in INTERFACES]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands; names of the package without the package's in front."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            deeper = [f"{module}.{alias.name}".removeprefix(f"{PACKAGE.name}.") for alias in node.names]
            names = [name if name in SOURCES else module for name in deeper]
        else:
            continue
        for name in names:
            yield node.lineno, name.removeprefix(f"{PACKAGE.name}.")


def folder_of(module: str) -> str:
    return module.split(".")[0]


def test_the_table_names_every_folder_and_nothing_else() -> None:
    assert {folder_of(name) for name in SOURCES} == set(FOLDERS)
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("name", SOURCES)
def test_folders_import_only_lower_ones(name: str) -> None:
    mine = FOLDERS.index(folder_of(name))
    for line, target in imports(SOURCES[name]):
        if target in SOURCES and folder_of(target) != folder_of(name):
            assert FOLDERS.index(folder_of(target)) < mine, f"{name}:{line} imports {target}"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: {t for _, t in imports(path) if t in SOURCES and t != name} for name, path in SOURCES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def is_pure(name: str) -> bool:
    return folder_of(name) in PURE or name in PURE_MODULES


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if is_pure(name) and name not in (*TYPED_ONLY, "registration")]
)
def test_pure_modules_do_not_import_vllm_anywhere(name: str) -> None:
    assert [line for line, target in imports(SOURCES[name]) if folder_of(target) == "vllm"] == []


def test_importing_the_pure_modules_loads_no_vllm() -> None:
    names = [f"{PACKAGE.name}.{name}" for name in SOURCES if is_pure(name)]
    code = (
        f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'vllm'][:3])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in SOURCES if folder_of(name) != "compat"])
def test_private_names_are_touched_in_compat_alone(name: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        used = {getattr(node, field, None) for field in ("attr", "id")}
        if isinstance(node, ast.Import | ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        assert not used & set(PRIVATE_NAMES), node


@pytest.mark.parametrize("name", MIDDLE)
def test_the_middle_names_no_policy_decoder_or_mechanism(name: str) -> None:
    """Neither by import, nor by class, nor by the name that a request would give."""
    for line, target in imports(SOURCES[name]):
        implementation = folder_of(target) in ("mechanisms", "policies", "decoders") and target not in INTERFACES
        assert not implementation, f"{name}:{line} imports {target}"
    classes = [*POLICY_CLASSES.values(), *DECODER_CLASSES.values()]
    forbidden = {cls.__name__ for cls in classes} | {type(use).__name__ for cls in classes for use in cls.uses}
    forbidden |= {repr(named) for named in (*POLICY_CLASSES, *DECODER_CLASSES)}
    forbidden |= {f'"{named}"' for named in (*POLICY_CLASSES, *DECODER_CLASSES)}
    with SOURCES[name].open() as file:
        found = [token for token in tokenize.generate_tokens(file.readline) if token.string in forbidden]
    assert found == []
    # Words of their own, in comments too; many policies and decoders are named by words of the language.
    words = re.compile("|".join(rf"\b{name.replace('_', '[_ ]')}\b" for name in (*MECHANISMS, "wino")), re.IGNORECASE)
    assert [line for line in SOURCES[name].read_text().splitlines() if words.search(line)] == []


def test_there_is_something_to_look_for() -> None:
    assert {"importance", "drift", "hidden_keys", "stored_outputs", "row_exits"} <= set(MECHANISMS)
    assert {"step.runner", "step.constraints", "canvas.states", *MIDDLE_MODULES} <= set(MIDDLE)


def test_what_operators_and_requests_may_say_needs_no_torch() -> None:
    names = [f"{PACKAGE.name}.{name}" for name in SOURCES if folder_of(name) == "options"]
    code = f"import sys, {', '.join(names)}\nprint('torch' in sys.modules, 'vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "False False"


def longest_functions(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of each function of a file, but for kernels."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
            if not decorators & {"triton.jit", "kernel"}:
                yield node.end_lineno - node.lineno + 1, node.name  # type: ignore[operator]


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_functions_are_read_in_one_sitting(name: str) -> None:
    assert len(SOURCES[name].read_text().splitlines()) < 400
    assert [(lines, function) for lines, function in longest_functions(SOURCES[name]) if lines >= 60] == []
