"""What docs/security.md says never happens, as far as the package's own source can say."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_d2cache.decoders.frequencies import load_frequencies
from vllm_d2cache.options.types import OptionError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "vllm_d2cache").rglob("*.py"))
# They run what a file or a message says.
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system"}


def hazards(source: str) -> Iterator[str]:
    """What of a source could run code that it was given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unpickles = called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False"
            trusts = "True" in (given.get("trust_remote_code"), given.get("shell"))
            if called in FORBIDDEN_CALLS or unpickles or trusts:
                yield called


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib.x import y",
        "torch.load(path)",
        "eval(text)",
        "np.load(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_hazards_are_found(source: str) -> None:
    assert len(list(hazards(source))) == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_nothing_that_it_reads(path: Path) -> None:
    source = path.read_text()
    assert list(hazards(source)) == []
    # vLLM's switch that lets messages between its processes be pickled.
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in source


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_frequency_table_with_objects_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    file, proof = tmp_path / "table.npy", tmp_path / "ran"
    np.save(file, np.array([Runs(proof)], dtype=object), allow_pickle=True)
    with pytest.raises(OptionError, match="token_frequencies"):
        load_frequencies(str(file))
    assert not proof.exists()
    np.load(file, allow_pickle=True)
    assert proof.exists(), "the file would have done it"


def test_every_test_that_the_document_names_exists() -> None:
    document = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+\.py)`", document)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).is_file()] == []
