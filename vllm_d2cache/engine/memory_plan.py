"""Memory that steps take on each rank beside weights, KV cache and the plain forward pass: worked out in advance.

What running requests hold from step to step is limited: the scheduler admits a request when its share is free, and a
request whose share is larger than the limit is refused. What one step takes follows from the rows it can have. vLLM
sizes the KV cache by the peak of a profile run; :class:`Rehearsal` makes the plan a part of that peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_d2cache.canvas.states import CanvasStates
from vllm_d2cache.canvas.traits import FamilyTraits
from vllm_d2cache.decoders.registry import DECODER_CLASSES
from vllm_d2cache.graphs.step_graphs import graph_bytes, graph_sizes
from vllm_d2cache.mechanisms.base import KEYS, RequestSize, Worker
from vllm_d2cache.mechanisms.partial_forward import ROWS_AT_ONCE
from vllm_d2cache.ops.row_stats import statistics_bytes
from vllm_d2cache.ops.split import parts_bytes
from vllm_d2cache.options.request import PREFIX, SECTION, RequestOptions
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError
from vllm_d2cache.policies.base import CachePolicy
from vllm_d2cache.policies.budget import row_budget, uses_of
from vllm_d2cache.policies.registry import POLICY_CLASSES, policy_class
from vllm_d2cache.requests.resolve import resolve

GIB = 1 << 30
DEFAULT_REQUEST_MEMORY = 2 * GIB


@dataclass(frozen=True)
class Network:
    """What the plan needs to know of a rank's network."""

    layers: int
    hidden_size: int
    heads: int  # of this rank
    intermediate_size: int  # of this rank, of all MLPs that a row passes in a layer
    head_size: int
    vocab_size: int
    itemsize: int  # bytes of a number of the model's type

    @classmethod
    def of(cls, config: Any) -> Network:
        """That of a VllmConfig for one of our models."""
        model, parallel = config.model_config, config.parallel_config
        shape = model.hf_config.shape()
        heads = shape.num_heads // parallel.tensor_parallel_size
        width = shape.mlp_width // parallel.tensor_parallel_size
        return cls(
            shape.num_layers, shape.hidden_size, heads, width, shape.head_size, shape.vocab_size, model.dtype.itemsize
        )  # fmt: skip

    def request_bytes(self, options: RequestOptions, prompt_len: int, canvas_len: int, budget: int | None) -> int:
        """What a request holds while it runs: maps, stored outputs and hidden states for its policy and decoder.

        Args:
            budget: ServerOptions.refresh_budget.
        """
        rows = row_budget(options, prompt_len, canvas_len, budget)
        size = RequestSize(self.layers, self.hidden_size * self.itemsize, prompt_len, canvas_len, rows)
        return DECODER_CLASSES[options.decoder].request_bytes(size) + sum(
            u.request_bytes(size) for u in uses_of(options)
        )

    def partial_bytes(self, rows: int, part: int) -> int:
        """Of a PartialForward of ``rows`` rows, beyond what the plain loop over the layers takes.

        While the layer runs: copies of its two inputs, and their sum in fp32. Behind it, when its own numbers are gone
        (an MLP's, and queries and outputs of attention where it works in parts): its outputs, of some rows in fp32 too,
        and both parts of the stream anew; then what is stored of rows in place of the fp32 sum.

        Args:
            part: most rows that a layer computes at a time.
        """
        own = 3 * self.intermediate_size * min(rows, part)
        if part < rows:
            own += 2 * self.heads * self.head_size * rows
        beside = self.hidden_size * rows * (2 * self.itemsize + 4)
        outputs = rows * (5 * self.itemsize + 4) + min(rows, ROWS_AT_ONCE) * (self.itemsize + 12)
        behind = self.hidden_size * max(outputs, rows * 8 * self.itemsize)
        return max(beside, behind - own * self.itemsize)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    canvases: int  # there from the start
    policies: int  # state of all policies and decoders, made when the first request asks for one
    requests: int  # what all running requests together may hold (Network.request_bytes)
    graphs: int  # CUDA graphs: recorded when the KV cache has its size, and held from then on
    queries: int  # kept in a step that computes its maps again, with log-sum-exps: all rows of all layers
    parts: int  # of attention and maps that are cut for the card, in one layer; graphs and eager steps have their own
    partial: int  # copies of rows, where policies have layers compute a part of them
    statistics: int  # logits of a tile of rows, and what is made of them; hidden states of the predicted rows
    rollout: int  # products of one layer, of each head

    @property
    def in_forward(self) -> int:
        """Beside what the forward pass itself takes."""
        return self.policies + self.requests + self.graphs + self.queries + self.parts + self.partial

    @property
    def after_forward(self) -> int:
        """Beside ``in_forward``, once the forward pass is over."""
        return max(self.statistics, self.rollout)


def request_memory(options: ServerOptions, network: Network, max_len: int) -> int:
    """Bytes that all running requests together may hold.

    Unless the operator has chosen, it suffices for the longest request of the server's own policy, half of it canvas.
    """
    if options.request_memory is not None:
        return int(options.request_memory * GIB)
    prompt = max_len // 2
    longest = network.request_bytes(resolve(options, {}), prompt, max_len - prompt, options.refresh_budget)
    return max(DEFAULT_REQUEST_MEMORY, longest)


def check_memory(options: RequestOptions, server: ServerOptions, config: Any, prompt_len: int, canvas_len: int) -> None:
    """Refuse a request that could never be admitted.

    Args:
        options: the request's.
        config: the engine's VllmConfig.

    Raises:
        OptionError: it takes more than all running requests together may.
    """
    network = Network.of(config)
    needed = network.request_bytes(options, prompt_len, canvas_len, server.refresh_budget)
    limit = request_memory(server, network, config.model_config.max_model_len)
    if needed > limit:
        raise OptionError(
            f"max_tokens: with {PREFIX}policy {options.policy!r}, {prompt_len} prompt tokens and a canvas of "
            f"{canvas_len} take {needed / GIB:.2f} GiB beside K and V; this server allows {limit / GIB:.2f} GiB "
            f'(additional_config["{SECTION}"]["request_memory"])'
        )


def plan_memory(config: Any, options: ServerOptions) -> MemoryPlan:
    """The plan of an engine with that VllmConfig."""
    network, model, scheduler = Network.of(config), config.model_config, config.scheduler_config
    slots, rows, length = scheduler.max_num_seqs, scheduler.max_num_batched_tokens, model.max_model_len
    graphs = graph_sizes(graph_rows(config, options), slots, options.block_length)
    handed_on = rows * network.hidden_size * network.itemsize
    # Maps and the queries they are made of are for policies that look at what rows attend to.
    looks = any(KEYS in use.needs for policy in _policies(options) for use in policy.uses)
    return MemoryPlan(
        canvases=state_bytes(slots, length),
        policies=_policy_bytes(slots, length, options, network.layers),
        requests=request_memory(options, network, length),
        graphs=graph_bytes(graphs, length, network.layers, network.hidden_size, network.itemsize, options.block_length),
        queries=looks * network.layers * rows * network.heads * (network.head_size * network.itemsize + 4),
        parts=parts_bytes(network.heads, network.head_size, length) * (2 if graphs else 1),
        partial=network.partial_bytes(rows, options.part_rows or rows),
        statistics=statistics_bytes(network.vocab_size, network.itemsize) + handed_on,
        rollout=looks * slots * (network.heads + 4) * length * 4,
    )


def graph_rows(config: Any, options: ServerOptions) -> int:
    """Rows of the largest CUDA graph of an engine with that VllmConfig; 0 = it has none."""
    if config.device_config.device_type != "cuda" or config.model_config.enforce_eager:
        return 0
    return min(options.graph_rows, config.scheduler_config.max_num_batched_tokens)


def _policies(options: ServerOptions) -> list[type[CachePolicy]]:
    """Those that requests of this server may ask for."""
    classes = [policy_class(name, options.block_length) for name in POLICY_CLASSES]
    return [cls for cls in classes if cls.keeps_blocks or not options.block_length]


def _policy_bytes(slots: int, length: int, options: ServerOptions, layers: int) -> int:
    """State of every policy, decoder and mechanism of this server."""
    worker = Worker(slots, length, torch.device("meta"), FamilyTraits(0, num_layers=layers), options)
    owners: list[Any] = [*_policies(options), *DECODER_CLASSES.values()]
    made: list[Any] = [cls(worker) for cls in owners]
    mechanisms = {type(use): use.make(worker) for cls in owners for use in cls.uses}
    for mechanism in mechanisms.values():
        mechanism.allocate()
    return sum(map(tensor_bytes, [*made, *mechanisms.values()]))


def state_bytes(num_slots: int, max_len: int) -> int:
    """Bytes of the tensors of :class:`CanvasStates`, but for the columns that grow with the number of stop tokens."""
    return tensor_bytes(CanvasStates(num_slots, max_len, torch.device("meta"), FamilyTraits(mask_token_id=0)))


def tensor_bytes(owner: object) -> int:
    """Bytes of the tensors that are attributes of ``owner``, or in a dictionary that is one."""
    values = vars(owner).values()
    held = [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


class Rehearsal:
    """Holds what the plan has while vLLM measures the peak of its profile run, in the same order as a step.

    Args:
        device: on a CPU, whose KV cache is not sized by what is measured, nothing is held.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self._held: torch.Tensor | None = None

    def forward(self) -> None:
        """The forward pass of a profile run follows."""
        if self.device.type != "cpu":
            self._held = self._take(self.plan.in_forward)

    def sample(self) -> None:
        """A dummy forward pass is over; if it was that of a profile run, so is the rehearsal."""
        if self._held is not None:
            self._take(self.plan.after_forward)
            self._held = None

    def _take(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"vllm-d2cache needs {num_bytes / GIB:.2f} GiB beside the weights for {self.plan}, in bytes; there is "
                "less. Lower --max-num-batched-tokens, --max-num-seqs or --max-model-len, or "
                'additional_config["d2cache"]["request_memory"] (docs/performance.md).'
            ) from error
