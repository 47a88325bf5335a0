"""Pages of the documentation site that docs/ does not hold; mkdocs.yml names this file as a hook.

Added are the documents at the top of the repository (README.md is the home page), whatever file or folder a document
links to, and a page for each module of the package, made from its docstrings. Links are rewritten accordingly, so that
documents can be read on the site as in the repository. A link that leads nowhere is left as it is: mkdocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_d2cache"
# Documents outside of docs/ that have a place in the navigation.
TOP_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security-policy.md",
    "patches/README.md": "patches.md",
}
REFERENCE = "api-reference"
OTHERS = "repository"  # where linked files that are no documents of docs/ go
_CODE_OF = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", ".conf": "nginx", ".patch": "diff"}
# Fences and code spans come first, so that what looks like a link inside of them is none.
_LINK = re.compile(r"^ {0,3}(?P<fence>```|~~~).*?^ {0,3}(?P=fence)|`[^`\n]*`|\]\((?P<link>[^()\s]+)\)", re.M | re.S)


def site_path(path: str, root: Path = ROOT) -> str:
    """Where a file or folder of the repository lies on the site, seen from docs/."""
    if path in TOP_PAGES:
        return TOP_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (root / path).is_dir():
        return f"{OTHERS}/{path}/index.md"
    suffix = Path(path).suffix
    return f"{OTHERS}/{path}.md" if suffix in _CODE_OF else f"{OTHERS}/{path}"


def rewritten(path: str, text: str, root: Path = ROOT) -> tuple[str, set[str]]:
    """A document as it stands on the site, and the files and folders of the repository that it links to."""
    linked: set[str] = set()
    here = posixpath.dirname(site_path(path, root))

    def replace(match: re.Match[str]) -> str:
        link = match["link"]
        if link is None or re.match(r"[a-z]+:|#", link):
            return match.group()
        name, hash_, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if target.startswith("..") or not (root / target).exists():
            return match.group()
        linked.add(target)
        return f"]({posixpath.relpath(site_path(target, root), here or '.')}{hash_}{anchor})"

    return _LINK.sub(replace, text), linked


def page(path: str, root: Path = ROOT) -> tuple[str | bytes, set[str]]:
    """What the site shows of a file or folder, and what that links to."""
    file = root / path
    if file.is_dir():
        names = sorted(child.name for child in file.iterdir() if child.name not in ("__pycache__", "__init__.py"))
        listing = "".join(f"- [{name}]({name})\n" for name in names)
        return rewritten(f"{path}/index", f"# {path}\n\n{listing}", root)
    if file.suffix == ".md":
        return rewritten(path, file.read_text(encoding="utf-8"), root)
    if file.suffix in _CODE_OF:
        return f"# {path}\n\n``````{_CODE_OF[file.suffix]}\n{file.read_text(encoding='utf-8')}``````\n", set()
    return file.read_bytes(), set()


def document_pages(root: Path = ROOT) -> dict[str, str | bytes]:
    """Path on the site -> content, of all documents and of what they link to."""
    found: dict[str, str | bytes] = {}
    waiting = [path for path in TOP_PAGES if (root / path).exists()]
    waiting += sorted(str(file.relative_to(root)) for file in (root / "docs").rglob("*.md"))
    while waiting:
        path = waiting.pop()
        if site_path(path, root) not in found:
            found[site_path(path, root)], linked = page(path, root)
            waiting += sorted(linked)
    return found


def modules(root: Path = ROOT) -> list[str]:
    """Dotted names of the package's public modules, packages before what they hold."""
    paths = [file.relative_to(root).with_suffix("") for file in (root / PACKAGE).rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    return sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))


def reference_path(module: str, root: Path = ROOT) -> str:
    """The page of a module."""
    inner = module.split(".")[1:]
    folder = (root / PACKAGE).joinpath(*inner).is_dir()
    return "/".join([REFERENCE, *inner]) + ("/index.md" if folder else ".md")


def reference_pages(root: Path = ROOT) -> dict[str, str]:
    """Path on the site -> content, a page a module."""
    return {reference_path(name, root): f"# {name.partition('.')[2] or name}\n\n::: {name}\n" for name in modules(root)}


def reference_nav(root: Path = ROOT) -> list[Any]:
    """The navigation of the reference: a section a package, its own page first."""
    sections: dict[str, list[Any]] = {}
    for name in modules(root):
        path, (above, _, last) = reference_path(name, root), name.rpartition(".")
        if path.endswith("/index.md"):
            sections[name] = [path]
        if above:
            sections[above].append({last: sections.get(name, path)})
    return sections[PACKAGE]


def on_config(config: Any) -> Any:
    """mkdocs: the reference goes to the end of the navigation."""
    config.nav.append({"API reference": reference_nav()})
    return config


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the pages, in place of those of docs/ whose links have been rewritten."""
    from mkdocs.structure.files import File

    for path, content in {**document_pages(), **reference_pages()}.items():
        old = files.get_file_from_path(path)
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, path, content=content))
    return files
