"""Cache policies by name: the package's own, and those that other distributions add through an entry point.

A distribution adds a policy with an entry point in the group ``vllm_d2cache.policies``: its name is the policy's name,
its value "module:Class" a subclass of policies.CachePolicy (docs/policies.md, examples/policy_plugin). Listing the
names loads no class; a class is loaded, and checked, when it is asked for. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from vllm_d2cache.options.types import Choice, Number

if TYPE_CHECKING:
    from vllm_d2cache.policies.base import CachePolicy

GROUP = "vllm_d2cache.policies"

BUILT_IN = {
    "d2cache": "vllm_d2cache.policies.d2cache:D2CachePolicy",
    "full": "vllm_d2cache.policies.full:FullPolicy",
    "prefix": "vllm_d2cache.policies.fast_dllm:PrefixPolicy",
    "dual": "vllm_d2cache.policies.fast_dllm:DualPolicy",
    "dkv": "vllm_d2cache.policies.dkv:DKVPolicy",
    "vicinity": "vllm_d2cache.policies.vicinity:VicinityPolicy",
    "entropy": "vllm_d2cache.policies.entropy:EntropyPolicy",
    "window_diffusion": "vllm_d2cache.policies.window_diffusion:WindowDiffusionPolicy",
    "streaming": "vllm_d2cache.policies.streaming:StreamingPolicy",
    "dllm_cache": "vllm_d2cache.policies.dllm_cache:DLLMCachePolicy",
    "spa": "vllm_d2cache.policies.spa:SPAPolicy",
    "sparse_dllm": "vllm_d2cache.policies.sparse_dllm:SparseDLLMPolicy",
    "es": "vllm_d2cache.policies.es:ESPolicy",
    "elastic": "vllm_d2cache.policies.elastic:ElasticPolicy",
}


class PolicyError(ValueError):
    """A cache policy from outside the package cannot be used. The message names it and says why."""


class PolicyRegistry(Mapping[str, "type[CachePolicy]"]):
    """Name -> class, read-only.

    Args:
        sources: entry points by name; more than one for a name means that distributions compete for it.
    """

    def __init__(self, sources: Mapping[str, list[EntryPoint]]) -> None:
        self._sources = dict(sources)
        self._classes: dict[str, type[CachePolicy]] = {}

    def __getitem__(self, name: str) -> type[CachePolicy]:
        """The class of that name.

        Raises:
            KeyError: there is no such policy.
            PolicyError: there is, but it cannot be used.
        """
        if name not in self._classes:
            self._classes[name] = _load(name, self._sources[name])
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def discover() -> PolicyRegistry:
    """The built-in policies and all installed ones."""
    sources = {name: [EntryPoint(name, path, GROUP)] for name, path in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        known = sources.setdefault(entry.name, [])
        # The same distribution may be found twice, by two entries of sys.path.
        if entry.value not in [other.value for other in known]:
            known.append(entry)
    return PolicyRegistry(sources)


def _load(name: str, sources: list[EntryPoint]) -> type[CachePolicy]:
    described = " and ".join(f"{entry.value!r}" for entry in sources)
    if len(sources) > 1:
        raise PolicyError(f"cache policy {name!r}: the name is claimed by {described}; rename or uninstall one")
    try:
        cls = sources[0].load()
    except (ImportError, AttributeError) as error:
        raise PolicyError(f"cache policy {name!r}: {described} cannot be loaded: {error}") from error
    problem = _problem(name, cls)
    if problem:
        raise PolicyError(f"cache policy {name!r}: {described} {problem}")
    return cls


def _problem(name: str, cls: object) -> str | None:
    """What keeps ``cls`` from being a policy of that name, or None."""
    from vllm_d2cache.mechanisms.base import KEYS, ROWS
    from vllm_d2cache.policies.base import CachePolicy

    if not (isinstance(cls, type) and issubclass(cls, CachePolicy)):
        return "is not a subclass of vllm_d2cache.policies.CachePolicy"
    if getattr(cls, "name", None) != name:
        return f"calls itself {getattr(cls, 'name', None)!r}"
    needs = {use.name: use.needs for use in cls.uses}
    if cls.reads_importance:
        needs["reads importance"] = frozenset({KEYS, ROWS})
    for use in cls.uses:
        for other, wanted in needs.items():
            if other != use.name and (taken := use.takes & wanted):
                return f"{other} and {use.name}: the one needs all {' and '.join(taken)}, the other leaves some out"
    for option, spec in cls.options.items():
        if not isinstance(spec, Number | Choice):
            return f"has an option {option!r} that is neither a Number nor a Choice of vllm_d2cache.options.types"
    return None


POLICY_CLASSES = discover()
