"""Whether a tag may be released: it is the version in pyproject.toml, and everything says the same window of vLLM.

    python3 tools/check_release.py v0.1.0            # exit status 1 and the reasons, if it may not
    python3 tools/check_release.py v0.1.0 --notes    # prints the release's section of CHANGELOG.md

A final release needs a heading of its own in CHANGELOG.md, "## [0.1.0] - 2026-01-31: vLLM >= 0.31, < 0.34"; a
pre-release (v0.1.0rc1) makes do with that of "[Unreleased]". Standard library only.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_HEADING = re.compile(r"^## \[(?P<name>[^]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?: vLLM (?P<window>.+)$", re.MULTILINE)
_REQUIREMENT = re.compile(r"vllm(?:-cpu)?>=(?P<oldest>[\d.]+),<(?P<newest>[\d.]+)")
_INTERNAL = re.compile(r'^(OLDEST|NEWEST) = Version\("([\d.]+)"\)', re.MULTILINE)


def is_final(version: str) -> bool:
    """Whether a version is no pre-release."""
    return re.fullmatch(r"\d+\.\d+\.\d+", version) is not None


def windows(root: Path) -> dict[str, str]:
    """The window of vLLM as each place has it, as ">= 0.31, < 0.34"."""
    found = {}
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("cuda", "cpu"):
        matches = [match for line in extras[extra] if (match := _REQUIREMENT.fullmatch(line))]
        found[f"pyproject.toml, extra {extra}"] = (
            f">= {matches[0]['oldest']}, < {matches[0]['newest']}" if matches else ""
        )
    ends = dict(_INTERNAL.findall((root / "vllm_d2cache/compat/internals.py").read_text()))
    found["compat/internals.py"] = f">= {ends.get('OLDEST')}, < {ends.get('NEWEST')}"
    return found


def section(changelog: str, version: str) -> tuple[re.Match[str], str] | None:
    """The heading and the text of a version in CHANGELOG.md; a pre-release's may be that of "Unreleased"."""
    names = [version] if is_final(version) else [re.match(r"[\d.]*\d", version)[0], "Unreleased"]  # type: ignore[index]
    for name in names:
        heading = next((match for match in _HEADING.finditer(changelog) if match["name"] == name), None)
        if heading:
            rest = changelog[heading.end() :]
            end = re.search(r"^(?:## |\[[^]]+\]: )", rest, re.MULTILINE)
            return heading, rest[: end.start() if end else None].strip()
    return None


def reasons(root: Path, tag: str) -> list[str]:
    """Why the tag may not be released; empty if it may."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    if tag != f"v{version}":
        return [f"the tag is {tag}, the version in pyproject.toml {version}: a release of it is tagged v{version}"]
    found = windows(root)
    entry = section((root / "CHANGELOG.md").read_text(), version)
    if entry is None:
        return [f'CHANGELOG.md has no heading "## [{version}] - DATE: vLLM >= A, < B"']
    heading, text = entry
    found["CHANGELOG.md"] = heading["window"]
    problems = []
    if not is_final(version) and not re.fullmatch(r"\d+\.\d+\.\d+rc\d+", version):
        problems.append(f"the version {version} is neither final (0.1.0) nor a release candidate (0.1.0rc1)")
    if is_final(version) and not heading["date"]:
        problems.append(f"CHANGELOG.md: the heading of {version} has no date")
    if not text:
        problems.append(f"CHANGELOG.md: nothing stands under {version}")
    if len(set(found.values())) > 1:
        problems.append("the window of vLLM differs: " + "; ".join(f"{place}: {found[place]}" for place in found))
    return problems


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tag", help="such as v0.1.0")
    parser.add_argument("--notes", action="store_true", help="print what CHANGELOG.md says of the release")
    args = parser.parse_args()
    problems = reasons(ROOT, args.tag)
    if problems:
        print("\n".join(f"check_release: {problem}" for problem in problems), file=sys.stderr)
        return 1
    if args.notes:
        entry = section((ROOT / "CHANGELOG.md").read_text(), args.tag.removeprefix("v"))
        assert entry is not None
        print(f"vLLM {entry[0]['window']}\n\n{entry[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
