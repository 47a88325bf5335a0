"""Corpus frequencies of tokens: the table that the pc decoder debiases confidences with. NumPy alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vllm_d2cache.options.types import OptionError


def count_frequencies(documents: Iterable[list[int]], vocab_size: int) -> np.ndarray:
    """Share of each token in the documents; a token that does not occur counts as one occurrence.

    Args:
        documents: token ids of each.

    Returns:
        [vocab_size] float32.

    Raises:
        ValueError: there is no token at all, or one outside the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids in documents:
        array = np.asarray(ids, dtype=np.int64)
        if len(array) and not (array.min() >= 0 and array.max() < vocab_size):
            raise ValueError(f"token ids must lie in 0..{vocab_size - 1}, got {array.min()}..{array.max()}")
        counts += np.bincount(array, minlength=vocab_size)
    total = counts.sum()
    if total == 0:
        raise ValueError("the corpus has no tokens")
    return (np.maximum(counts, 1) / total).astype(np.float32)


def load_frequencies(path: str, vocab_size: int | None = None) -> np.ndarray:
    """The table of a ``.npy`` file, checked.

    Args:
        vocab_size: of the model that will use it; None = any.

    Returns:
        [vocab_size] float32, each in [0, 1].

    Raises:
        OptionError: the file cannot be read or is no such table.
    """
    label = f"token_frequencies: {path}"
    if not Path(path).is_file():
        raise OptionError(f"{label}: no such file; `vllm-d2cache frequencies` writes one")
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise OptionError(f"{label}: must be a .npy file of numbers ({error})") from error
    if not isinstance(table, np.ndarray) or table.ndim != 1 or table.dtype.kind not in "fiu":
        raise OptionError(f"{label}: must hold one number for each token id")
    if vocab_size is not None and len(table) != vocab_size:
        raise OptionError(f"{label}: must hold {vocab_size} numbers, one for each token id, got {len(table)}")
    if not (np.isfinite(table).all() and (table >= 0).all() and (table <= 1).all()):
        raise OptionError(f"{label}: frequencies must lie in 0..1")
    return table.astype(np.float32)
