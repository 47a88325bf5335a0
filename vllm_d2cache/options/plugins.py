"""Classes by name: the package's own, and those that other distributions add through an entry point.

A distribution adds a cache policy with an entry point in the group ``vllm_d2cache.policies``, a decoder with one in
``vllm_d2cache.decoders``: its name is the class's name, its value "module:Class" (docs/policies.md, docs/decoders.md,
examples). Listing the names loads no class; a class is loaded, and checked, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from vllm_d2cache.options.types import Choice, Number

T = TypeVar("T")


class PluginError(ValueError):
    """A class from outside the package cannot be used. The message names it and says why."""


class Plugins(Mapping[str, type[T]]):
    """Name -> class, read-only.

    Args:
        kind: what the classes are, for messages: "cache policy".
        sources: entry points by name; more than one for a name means that distributions compete for it.
        problem: what keeps a class from being used, or None.
    """

    def __init__(
        self, kind: str, sources: Mapping[str, list[EntryPoint]], problem: Callable[[Any], str | None]
    ) -> None:
        self.kind = kind
        self._sources = dict(sources)
        self._problem = problem
        self._classes: dict[str, type[T]] = {}

    def __getitem__(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            KeyError: there is no such name.
            PluginError: there is, but it cannot be used.
        """
        if name not in self._classes:
            self._classes[name] = self._load(name, self._sources[name])
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _load(self, name: str, sources: list[EntryPoint]) -> type[T]:
        described = " and ".join(f"{entry.value!r}" for entry in sources)
        label = f"{self.kind} {name!r}"
        if len(sources) > 1:
            raise PluginError(f"{label}: the name is claimed by {described}; rename or uninstall one")
        try:
            cls = sources[0].load()
        except (ImportError, AttributeError) as error:
            raise PluginError(f"{label}: {described} cannot be loaded: {error}") from error
        problem = self._problem(cls) or _misnamed(name, cls) or _bad_option(cls)
        if problem:
            raise PluginError(f"{label}: {described} {problem}")
        return cls


def _misnamed(name: str, cls: Any) -> str | None:
    found = getattr(cls, "name", None)
    return None if found == name else f"calls itself {found!r}"


def _bad_option(cls: Any) -> str | None:
    for option, spec in cls.options.items():
        if not isinstance(spec, Number | Choice):
            return f"has an option {option!r} that is neither a Number nor a Choice of vllm_d2cache.options.types"
        if spec.default is None or spec.parse(spec.default) is None:
            return f"has an option {option!r} whose default {spec.default!r} is not {spec.describe()}"
    return None


def discover(group: str, built_in: Mapping[str, str]) -> dict[str, list[EntryPoint]]:
    """Entry points by name: those of ``built_in``, name -> "module:Class", and all installed ones of ``group``."""
    sources = {name: [EntryPoint(name, path, group)] for name, path in built_in.items()}
    for entry in entry_points(group=group):
        known = sources.setdefault(entry.name, [])
        # The same distribution may be found twice, by two entries of sys.path.
        if entry.value not in [other.value for other in known]:
            known.append(entry)
    return sources
