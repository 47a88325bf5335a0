"""Token ids as text, by a tokenizer on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def token_decoder(directory: Path) -> Callable[[int], str]:
    """A function that gives the text of one token.

    A tokenizer.json is read by the tokenizers library alone, which is quick; other formats need transformers.

    Raises:
        ValueError: the directory has no tokenizer that can be read.
    """
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            from tokenizers import Tokenizer

            fast: Any = Tokenizer.from_file(str(file))
            return lambda token: fast.decode([token], skip_special_tokens=False)
        from transformers import AutoTokenizer

        slow: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        return lambda token: slow.decode([token])
    except Exception as error:  # the libraries raise plain Exceptions for a file they cannot read
        raise ValueError(f"{directory}: no tokenizer that can be read: {error}") from error


def texts_of(tokens: Iterable[int], decode: Callable[[int], str]) -> dict[int, str]:
    """Token id -> text, of the distinct tokens. A token that is part of a character has no text of its own."""
    texts = {token: decode(token) for token in set(tokens)}
    return {token: text for token, text in texts.items() if text and "\ufffd" not in text}
