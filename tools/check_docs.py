"""Find what documents name that does not exist: files of the repository, targets of links, cited sections.

    python tools/check_docs.py            # all tracked files; exit status 1 and a line for each name that leads nowhere

Looked at are

* in Markdown, relative links and their anchors; words inside `code` that look like a path; and words of indented or
  fenced code that start with a folder of the repository;
* in Python, mentions of a file under one of the repository's folders, such as docs/policies.md, and cited sections of a
  document, such as "docs/methods/NAME.md, section 4": the document needs a heading with that number.

A name may leave out leading folders (`ops/density.py`, `eb.py`). PLACEHOLDERS stand for any (`policies/NAME.py`) and
are not looked at. Names of files that exist only at run time stand in RUNTIME; a Python file whose names are all
made up says so in a comment, MADE_UP. Standard library only.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
# Files that a command writes, or that are somebody else's. Patterns of fnmatch.
RUNTIME = (
    "benchmarks/results/gpu.json",  # python -m benchmarks.gpu
    "gpu.png",
    "benchmarks/serve.py",  # vLLM's
)
MADE_UP = "check_docs: names are made up"
PLACEHOLDERS = {"NAME", "DIR", "FILE", "MODEL", "RELEASE", "SUITE"}
# Endings of what counts as a file's name without a folder before it.
ENDINGS = ("py", "md", "sh", "json", "jsonl", "toml", "yml", "yaml", "jinja", "npy", "png", "svg", "html", "css", "js")

_CODE = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_WORD = re.compile(r"[\w.*/-]+")
_HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)
_CITED = re.compile(r"([\w/.-]+\.md), sections? (\d+(?:\.\d+)*(?:(?:, | and | to )\d+(?:\.\d+)*)*)")


class Files:
    """The repository's files and folders, by any tail of their paths."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = sorted(paths)
        self._folders = {str(folder) for path in self.paths for folder in PurePosixPath(path).parents} - {"."}
        self.tops = {folder for folder in self._folders if "/" not in folder}
        self._tails = {tail for path in {*self.paths, *self._folders} for tail in _tails(path)}

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name exists; ``*`` stands for anything."""
        name = name.rstrip("/").removeprefix("./")
        return bool(fnmatch.filter(self._tails, name)) if "*" in name else name in self._tails


def _tails(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[i:]) for i in range(len(parts)))


def is_runtime(name: str) -> bool:
    """Whether RUNTIME covers the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in RUNTIME)


def looks_like_path(word: str, files: Files) -> bool:
    """Whether a word names a file of this repository, existing or not.

    `GSAI-ML/LLaDA-8B-Instruct`, `/v1/completions` and `a/b` do not.
    """
    if word.startswith("/") or (word.startswith(".") and "/" not in word):
        return False
    if PLACEHOLDERS & set(re.split(r"[/._]", word)):
        return False
    if word.rpartition(".")[2] in ENDINGS and len(word.rpartition(".")[0]) > 0:
        return True
    first, slash, rest = word.removeprefix("./").partition("/")
    return bool(slash and rest) and first in files.tops


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeats = sum(slug == other or re.fullmatch(re.escape(slug) + r"-\d+", other) is not None for other in found)
        found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def missing_links(path: str, text: str, root: Path) -> Iterator[str]:
    """Relative links of a document that lead nowhere."""
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", text))):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = (root / path).parent / target if target else root / path
        if not file.exists():
            yield f"link {link}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"link {link}: no such heading"


def missing_names(text: str, files: Files) -> Iterator[str]:
    """Paths that a document's code names and that do not exist."""
    fences = [match.group() for match in _FENCE.finditer(text)]
    words = [word for span in _CODE.findall(_FENCE.sub("", text)) for word in _WORD.findall(span)]
    words += [word for fence in fences for word in _WORD.findall(fence) if word.partition("/")[0] in files.tops]
    for word in dict.fromkeys(words):
        name = word.rstrip(".")
        if looks_like_path(name, files) and not is_runtime(name) and not files.has(name):
            yield f"{name}: no such file"


def section_numbers(text: str) -> set[str]:
    """Numbers that a document's headings begin with: "## 3.4 Rollout" has 3.4."""
    return {match.group(1) for heading in _HEADING.findall(text) if (match := re.match(r"(\d+(?:\.\d+)*)\b", heading))}


def cited_sections(numbers: str) -> list[str]:
    """From "3.3 to 3.5 and 12": 3.3, 3.4, 3.5, 12."""
    found: list[str] = []
    for part in re.split(r", | and ", numbers):
        first, _, last = part.partition(" to ")
        stem, dot, low = first.rpartition(".")
        high = int(last.rpartition(".")[2]) if last else int(low)
        found += [f"{stem}{dot}{number}" for number in range(int(low), high + 1)]
    return found


def missing_mentions(text: str, files: Files, root: Path) -> Iterator[str]:
    """Documents and sections that a Python file cites and that do not exist."""
    tops = "|".join(sorted(files.tops))
    for name in dict.fromkeys(re.findall(rf"(?<![\w/.*{{}}-])((?:{tops})/[\w/.-]+\.(?:md|sh|py))\b", text)):
        if looks_like_path(name, files) and not is_runtime(name) and not files.has(name):
            yield f"{name}: no such file"
    flat = re.sub(r"\s+(?:# )?", " ", text)  # a citation may be broken over two lines of a comment
    for name, numbers in dict.fromkeys(_CITED.findall(flat)):
        if (root / name).exists():
            there = section_numbers((root / name).read_text(encoding="utf-8"))
            for number in cited_sections(numbers):
                if number not in there:
                    yield f"{name}, section {number}: no such heading"


def problems(root: Path, paths: Iterable[str]) -> Iterator[str]:
    """A line for each name that leads nowhere.

    Args:
        root: the repository.
        paths: its files, relative to it.
    """
    files = Files(paths)
    for path in files.paths:
        if path.endswith((".md", ".py")) and (root / path).is_file():
            text = (root / path).read_text(encoding="utf-8")
            if path.endswith(".md"):
                found = [*missing_links(path, text, root), *missing_names(text, files)]
            else:
                found = [] if f"# {MADE_UP}" in text else [*missing_mentions(text, files, root)]
            yield from (f"{path}: {problem}" for problem in found)


def repository_files(root: Path) -> list[str]:
    """Tracked files, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout
    return [path for path in listed.split("\0") if path and (root / path).exists()]


def main() -> int:
    """Print the problems; 1 if there are any."""
    found = list(problems(ROOT, repository_files(ROOT)))
    print("\n".join([*found, f"check_docs: {len(found) or 'no'} name{'s' * (len(found) != 1)} without a file"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
