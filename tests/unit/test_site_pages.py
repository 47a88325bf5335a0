"""tools/site_pages.py and tools/griffe_docstrings.py: what the documentation site shows. `make docs` builds it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from tools import site_pages
from tools.site_pages import ROOT, document_pages, modules, reference_nav, reference_pages, rewritten


@pytest.fixture
def docstrings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The extension of griffe, which is not installed here; its text functions need nothing of it."""
    stub = SimpleNamespace(Extension=object, Attribute=object, Docstring=object, Object=object)
    monkeypatch.setitem(sys.modules, "griffe", stub)
    return importlib.import_module("tools.griffe_docstrings")


# check_docs: names are made up
def tree(root: Path) -> Path:
    files = {
        "README.md": "[a](docs/a.md), [tools](tools), ![p](docs/p.png), [web](https://x.y/z.md), `[n](docs/a.md)`",
        "docs/a.md": "[home](../README.md#top), [run](../tools/run.sh), [b](deep/b.md#x), [gone](gone.md), [here](#a)",
        "docs/deep/b.md": "[a](../a.md) [home](../../README.md)\n\n```\n[code](../a.md)\n```\n",
        "docs/p.png": "",
        "tools/run.sh": "echo\n",
        "tools/deep/__init__.py": "",
        "vllm_d2cache/__init__.py": "",
        "vllm_d2cache/one.py": "",
        "vllm_d2cache/_private.py": "",
        "vllm_d2cache/part/__init__.py": "",
        "vllm_d2cache/part/__main__.py": "",
        "vllm_d2cache/part/two.py": "",
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_links_lead_to_the_same_places_on_the_site(tmp_path: Path) -> None:
    pages = document_pages(tree(tmp_path))
    assert pages["index.md"] == (
        "[a](a.md), [tools](repository/tools/index.md), ![p](p.png), [web](https://x.y/z.md), `[n](docs/a.md)`"
    )
    assert pages["a.md"] == (
        "[home](index.md#top), [run](repository/tools/run.sh.md), [b](deep/b.md#x), [gone](gone.md), [here](#a)"
    )
    assert pages["deep/b.md"] == "[a](../a.md) [home](../index.md)\n\n```\n[code](../a.md)\n```\n"


def test_linked_files_and_folders_come_along(tmp_path: Path) -> None:
    pages = document_pages(tree(tmp_path))
    assert pages["repository/tools/index.md"] == "# tools\n\n- [deep](deep/index.md)\n- [run.sh](run.sh.md)\n"
    assert pages["repository/tools/run.sh.md"] == "# tools/run.sh\n\n``````bash\necho\n``````\n"
    assert pages["p.png"] == b""
    assert "repository/tools/deep/index.md" in pages


def test_nothing_outside_of_the_repository(tmp_path: Path) -> None:
    root = tree(tmp_path / "inner")
    (tmp_path / "secret.md").write_text("secret")
    assert rewritten("docs/a.md", "[s](../../secret.md)", root) == ("[s](../../secret.md)", set())


def test_the_reference_has_the_public_modules(tmp_path: Path) -> None:
    root = tree(tmp_path)
    assert modules(root) == ["vllm_d2cache", "vllm_d2cache.one", "vllm_d2cache.part", "vllm_d2cache.part.two"]
    assert reference_nav(root) == [
        "api-reference/index.md",
        {"one": "api-reference/one.md"},
        {"part": ["api-reference/part/index.md", {"two": "api-reference/part/two.md"}]},
    ]
    assert reference_pages(root)["api-reference/part/two.md"] == "# part.two\n\n::: vllm_d2cache.part.two\n"


def test_every_document_has_a_place_in_the_navigation() -> None:
    """mkdocs says so too, where it is installed."""

    def pages(nav: list[object]) -> set[str]:
        found: set[str] = set()
        for entry in nav:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                found |= pages(value) if isinstance(value, list) else {value}
        return found

    documents = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    wanted = documents | {page for path, page in site_pages.TOP_PAGES.items() if (ROOT / path).exists()}
    assert pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]) == wanted


def test_lists_are_lists_on_the_site_too() -> None:
    """Python-Markdown nests by four spaces, where GitHub needs two or three: with fewer a list's numbers change."""
    for path in [*(ROOT / "docs").rglob("*.md"), *map(ROOT.joinpath, site_pages.TOP_PAGES)]:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", text, re.MULTILINE) == [], path.name


def test_docstrings_as_griffe_reads_them(docstrings: ModuleType) -> None:
    assert docstrings.without_roles("from :func:`attend`, one of :data:`~a.B`") == "from `attend`, one of `a.B`"
    text = "Args:\n    key, value: [N]\n        of rows.\n    scale: of it.\n\nNote: a, b: c"
    assert docstrings.one_by_one(text) == (
        "Args:\n    key: [N]\n        of rows.\n    value: [N]\n        of rows.\n    scale: of it.\n\nNote: a, b: c"
    )


def test_comments_of_fields(docstrings: ModuleType) -> None:
    lines = ["class A:", "    # Above,", "    # both.", "    x: int = f(", "        1)  # beside", "    y: int"]
    assert docstrings.comment_of(lines, 4, 5) == "Above, both. beside"
    assert docstrings.comment_of(lines, 6, 6) == ""
