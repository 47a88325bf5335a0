"""tools/check_docs.py: names that lead nowhere are found, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_docs import ROOT, Files, anchors, cited_sections, looks_like_path, problems, repository_files

METHODS = "# Methods\n\n## 3. Cache\n\n### 3.1 Density\n\n### 3.2 Rollout\n\n## 4 Commits\n"
TREE = {
    "README.md": "# Title\n",
    "manual/methods/cache.md": METHODS,
    "pkg/ops/density.py": '"""Nothing cited."""\n',
    "pkg/ops/eb.py": "",
}


def found(tmp_path: Path, **changed: str) -> list[str]:
    """Problems of TREE with one document more, or one Python file more."""
    names = {"document": "manual/new.md", "source": "pkg/new.py"}
    tree = TREE | {names[kind]: text for kind, text in changed.items()}
    for path, text in tree.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return list(problems(tmp_path, tree))


@pytest.mark.parametrize(
    "text",
    [
        "`pkg/ops/density.py`, `ops/density.py: begin`, `eb.py`, `pkg/ops/`, `ops/*.py`",
        "`/v1/completions`, `GSAI-ML/LLaDA-8B-Instruct`, `.css`, `a / b`, `policies/test_NAME.py`",
        "`pkg/ops/eb.py::test_this`, `benchmarks/results/gpu.json`",
        "[one](methods/cache.md), [two](../README.md#title), [three](methods/cache.md#31-density), [web](https://a.b/c.md)",
        "```\npython pkg/ops/eb.py out/gone.json\n[not a link](gone.md)\n```",
        "# Here\n\n[above](#here) and `[no link](x)`",
    ],
)
def test_what_exists_is_not_reported(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, document=text) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("see `pkg/ops/gone.py`", "pkg/ops/gone.py"),
        ("see `gone.py: begin`", "gone.py"),
        ("in `pkg/gone`", "pkg/gone"),
        ("in `pkg/README.md`", "pkg/README.md"),
        ("all of `ops/*.json`", "ops/*.json"),
        ("```\nsh pkg/gone.sh --fast\n```", "pkg/gone.sh"),
        ("[a](gone.md)", "gone.md"),
        ("[a](../README.md#gone)", "#gone"),
        ("[a](#gone)", "#gone"),
    ],
)
def test_what_does_not_exist_is_reported(tmp_path: Path, text: str, name: str) -> None:
    (problem,) = found(tmp_path, document=text)
    assert problem.startswith("manual/new.md: ")
    assert name in problem


def test_mentions_in_python(tmp_path: Path) -> None:
    cited = '"""manual/methods/cache.md, sections 3.1 to 3.2 and 4; pkg/ops/eb.py."""'
    good = f"{cited}\n# manual/methods/cache.md,\n# section 3\n"
    assert found(tmp_path, source=good) == []
    bad = '"""manual/gone.md, and manual/methods/cache.md, sections 3.1 and\n5."""\n'
    bad += "# manual/methods/cache.md, section\n# 3.3\n"
    lines = found(tmp_path, source=bad)
    assert [line.split(": ")[1] for line in lines] == [
        "manual/gone.md",
        "manual/methods/cache.md, section 5",
        "manual/methods/cache.md, section 3.3",
    ]


def test_made_up_names_are_left_alone(tmp_path: Path) -> None:
    assert found(tmp_path, source="# check_docs: names are made up\npath = 'manual/gone.md'\n") == []
    assert len(found(tmp_path, source="check_docs: names are made up, 'manual/gone.md'\n")) == 1


def test_ranges_of_sections() -> None:
    assert cited_sections("3.3 to 3.5 and 12, 2") == ["3.3", "3.4", "3.5", "12", "2"]
    assert cited_sections("6") == ["6"]


def test_anchors_are_those_of_github() -> None:
    text = "# CUDA graphs\n## What's new?\n```\n# no heading\n```\n## `steps`\n## `steps`\n"
    assert anchors(text) == {"cuda-graphs", "whats-new", "steps", "steps-1"}


def test_a_top_folder_makes_a_path() -> None:
    files = Files(["a.md", "pkg/b.py"])
    assert looks_like_path("pkg/gone", files)
    assert not looks_like_path("other/gone", files)
    assert not looks_like_path("pkg", files)


def test_this_repository() -> None:
    assert list(problems(ROOT, repository_files(ROOT))) == []
