"""PyTorch/NumPy twins of the bookkeeping Triton kernels of vLLM's Model Runner V2, for CPUs without Triton.

A twin does what all programs of one launch of the Triton kernel do together, but for what our models replace (see
`unread`). It names its parameters as the kernel does and takes only those it needs, so that one body serves every
vLLM release of the supported range (`cpu_runner.bind` matches the launch arguments by name). All tensors live in host
memory, where a NumPy call on a small array costs a fraction of a torch operator: the twins work on NumPy views of
what they are handed.

`cpu_runner` registers them; vLLM itself is not imported here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_d2cache.compat.raw_memory import Array, flat, int32_at, view

Twin = Callable[..., None]


def _ragged(starts: Array, lengths: Array, total: int) -> Array:
    """concatenate([arange(s, s + n) for s, n in zip(starts, lengths)]), which is `total` long, vectorised."""
    if len(lengths) == 1:
        return np.arange(starts[0], starts[0] + total)
    before = lengths.cumsum() - lengths
    return np.arange(total) + np.repeat(starts - before, lengths)


# --- buffer_utils -------------------------------------------------------------------------------------------


def apply_write(
    output_ptr: torch.Tensor,
    output_stride: int | torch.Tensor,
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
    write_group_ids_ptr: torch.Tensor | None,
    MULTI_GROUP: bool,
) -> None:
    """Write each staged run of elements at its (row, start) of the output, or of its group's output."""
    rows = view(write_indices_ptr).astype(np.int64)
    starts, ends, contents = view(write_starts_ptr), view(write_cu_lens_ptr), view(write_contents_ptr)
    if len(rows) == 0:
        return
    if not MULTI_GROUP:
        lengths = np.diff(ends, prepend=0)
        total = int(ends[-1])
        flat(output_ptr)[_ragged(rows * output_stride + starts, lengths, total)] = contents[:total]
        return
    assert write_group_ids_ptr is not None and isinstance(output_stride, torch.Tensor)
    addresses, strides = view(output_ptr).tolist(), view(output_stride).tolist()
    begin = 0
    for group, row, start, end in zip(
        view(write_group_ids_ptr).tolist(), rows.tolist(), starts.tolist(), ends.tolist(), strict=True
    ):
        # One write per request and group that got new blocks: a handful, on few steps.
        offset = row * strides[group] + start
        int32_at(addresses[group] + 4 * offset, end - begin)[:] = contents[begin:end]
        begin = end


# --- block_table --------------------------------------------------------------------------------------------


def gather_block_tables(
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks_ptr: torch.Tensor,
    num_reqs: int,
    num_computed_tokens_ptr: torch.Tensor | None = None,
    sliding_window_reach_ptr: torch.Tensor | None = None,
    block_sizes_ptr: torch.Tensor | None = None,
    MASK_SLIDING_WINDOW: bool = False,
) -> None:
    """Copy the used part of each request's block-table row into the row of the batch.

    The Triton kernel also zeroes rows past `num_reqs`; their number is in the launch grid alone, which vLLM's
    override registry does not hand on. Only CUDA graphs and data parallelism pad a batch with such rows.
    """
    if num_reqs == 0:
        return
    rows = view(batch_idx_to_req_idx)[:num_reqs]
    top = max(rows.tolist()) + 1
    counts = view(num_blocks_ptr)
    sources, targets = view(src_block_table_ptrs).tolist(), view(dst_block_table_ptrs).tolist()
    for group, stride in enumerate(view(block_table_strides).tolist()):
        used = counts[group, rows]
        width = max(used.tolist())
        blocks = int32_at(sources[group], top, stride)[rows, :width]
        if MASK_SLIDING_WINDOW:
            assert num_computed_tokens_ptr is not None
            assert sliding_window_reach_ptr is not None and block_sizes_ptr is not None
            reach = int(sliding_window_reach_ptr[group])
            if reach > 0:
                below = np.maximum(view(num_computed_tokens_ptr)[rows] - reach, 0)
                blocks[np.arange(width) < (below // int(block_sizes_ptr[group]))[:, None]] = 0
        target = int32_at(targets[group], num_reqs, stride)[:, :width]
        np.copyto(target, blocks, where=True if num_reqs == 1 else np.arange(width) < used[:, None])


# --- input_batch --------------------------------------------------------------------------------------------


def seq_lens_of_batch(
    seq_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    max_num_reqs: int,
    **_: Any,
) -> None:
    """The sequence lengths after the step. The kernel has the positions of a step as well (see `unread`)."""
    rows = view(idx_mapping_ptr)
    num_reqs = len(rows)
    seq_lens = view(seq_lens_ptr)
    seq_lens[num_reqs:max_num_reqs] = 0
    if num_reqs:
        bounds = view(query_start_loc_ptr)
        lengths = bounds[1 : num_reqs + 1] - bounds[:num_reqs]
        np.add(view(num_computed_tokens_ptr)[rows], lengths, out=seq_lens[:num_reqs])


def any_logits_rows(logits_indices_ptr: torch.Tensor, **_: Any) -> None:
    """Rows of the batch to compute logits for: the first one for all, which exists (see `unread`).

    A warm-up batch of vLLM's reads them. The kernel has the sampled and draft tokens among the inputs as well.
    """
    logits_indices_ptr.zero_()


def unread(**_: Any) -> None:
    """Nothing: the kernel works out what every model of ours has of its own, in each step.

    These are token ids and positions (D2CacheModelState.prepare_inputs), where K and V go (prepare_attn), which rows
    lead to logits (preprocess_state), and the text so far (canvas/states.py), which vLLM's sampler would read, in whose
    place ours stands. All of it lies in buffers that vLLM makes with zeros.
    """


def get_num_sampled_and_rejected(
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
) -> None:
    """A request still in its prefill samples and rejects nothing; else what was not sampled was rejected."""
    rows = view(idx_mapping_ptr)
    num_reqs = len(rows)
    finished = view(seq_lens_ptr)[:num_reqs] >= view(prefill_len_ptr)[rows]
    sampled = view(num_sampled_ptr)[:num_reqs]
    sampled *= finished
    bounds = view(cu_num_logits_ptr)[: num_reqs + 1]
    view(num_rejected_ptr)[:num_reqs] = (bounds[1:] - bounds[:-1] - sampled) * finished


def advance(
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor | None,
    **_: Any,
) -> None:
    """Advance the numbers of computed tokens. The kernel keeps the sampled tokens as well (see `unread`)."""
    rows = view(idx_mapping_ptr)
    num_reqs = len(rows)
    if num_reqs == 0:
        return
    delta = -view(num_rejected_ptr)[:num_reqs]
    if query_start_loc_ptr is not None:
        bounds = view(query_start_loc_ptr)
        delta += bounds[1 : num_reqs + 1] - bounds[:num_reqs]
    if min(rows.tolist()) < 0:  # a negative row is skipped
        rows, delta = rows[rows >= 0], delta[rows >= 0]
    view(num_computed_tokens_ptr)[rows] += delta


def post_update_num_computed_tokens(
    idx_mapping_ptr: torch.Tensor, num_computed_tokens_ptr: torch.Tensor, query_start_loc_ptr: torch.Tensor
) -> None:
    """Advance the numbers of computed tokens by the query lengths."""
    rows = view(idx_mapping_ptr)
    bounds = view(query_start_loc_ptr)[: len(rows) + 1]
    view(num_computed_tokens_ptr)[rows] += bounds[1:] - bounds[:-1]


def expand_idx_mapping(
    idx_mapping_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
) -> None:
    """Request row of every logit, and its index within the request."""
    rows = view(idx_mapping_ptr)
    bounds = view(cu_num_logits_ptr)[: len(rows) + 1]
    begin, end = int(bounds[0]), int(bounds[-1])
    if end == begin:
        return
    counts = bounds[1:] - bounds[:-1]
    view(expanded_idx_mapping_ptr)[begin:end] = np.repeat(rows, counts)
    view(expanded_local_pos_ptr)[begin:end] = _ragged(np.zeros_like(counts), counts, end - begin)


# --- by kernel -------------------------------------------------------------------------------------------

_PACKAGE = "vllm.v1.worker.gpu"
TWINS: dict[str, Twin] = {
    f"{_PACKAGE}.buffer_utils._apply_write_kernel": apply_write,
    f"{_PACKAGE}.block_table._gather_block_tables_kernel": gather_block_tables,
    f"{_PACKAGE}.block_table._compute_slot_mappings_kernel": unread,
    f"{_PACKAGE}.input_batch._prepare_prefill_inputs_kernel": unread,
    f"{_PACKAGE}.input_batch._prepare_pos_seq_lens_kernel": seq_lens_of_batch,
    f"{_PACKAGE}.input_batch._combine_sampled_and_draft_tokens_kernel": any_logits_rows,
    f"{_PACKAGE}.input_batch._get_num_sampled_and_rejected_kernel": get_num_sampled_and_rejected,
    f"{_PACKAGE}.input_batch._post_update_kernel": advance,
    f"{_PACKAGE}.input_batch._post_update_num_computed_tokens_kernel": post_update_num_computed_tokens,
    f"{_PACKAGE}.input_batch._expand_idx_mapping_kernel": expand_idx_mapping,
}
# Kernel parameters without a say in the result: tile sizes, and strides that a tensor carries itself. A
# parameter in neither this list nor the twin's signature is news from an unknown vLLM release, and refused.
IGNORED = frozenset({"BLOCK_SIZE", "num_blocks_stride"})
