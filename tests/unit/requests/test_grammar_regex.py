"""Regular expressions that xgrammar takes for something else than they say are told from others."""

from __future__ import annotations

import re

import pytest

from vllm_d2cache.options.types import OptionError
from vllm_d2cache.requests.grammar_regex import check_regex

REFUSED = [
    *((pattern, r"'\$'") for pattern in ("^a$b", "(a$)b", "(a$)*", "((a$)b?)", "(?:a$|b)c", "a$+b")),
    *((pattern, r"'\^'") for pattern in ("a^b", "a(^b|c)", "(^a)+", "((?:^a)){2,}", "(?<n>x)^a")),
    *((pattern, r"'\\\\A'") for pattern in (r"\Aa", r"\\\A", r"[\A]", r"[^x\A]")),
    *((rf"a\{letter}", rf"'\\\\{letter}'") for letter in "ZzhGRNXQiqy"),
    *((pattern, r"'\\\\x'") for pattern in (r"\x4", r"\x{41}", r"\xZZ")),
    (r"\01", r"'\\\\0'"),
    *((f"[{around}[:alpha:]0-9]+", r"'\[:alpha:\]'") for around in ("", "^", "x-z")),
    ("[[:^alpha:]]", r"'\[:\^alpha:\]'"),
    *((f"{mark}a)b", "would ignore") for mark in ("(?=", "(?!", "(?<=", "(?<!", "x(?=")),
]
TAKEN = [
    *("", "a", "^a$", "(^a$)", "^a|b$", "a|^b$", "(^a)b", "(a$|b)", "a(b$|c)", "(?:^a|b$)", "^^a$$", "(a|b)?$"),
    *("^(?:a|b){2,3}$", "(?<n>a$)", "(?P<n>a)b", "(?i:^a)b", r"^\d{4}-\d\d$"),
    *(r"\$a\^", "[$^]a", r"[a\]$]b", r"\\A", r"\\Z", "[(?=]a", r"\(?=a"),
    *(r"\x41\u0041\u{41}\U00000041", r"\0", r"\cJ", r"[\b]", r"\-\_\/\.", r"\é", "[:alpha:]", "a+?b*?c??"),
    *("(", ")", "a)|^b", "[", "\\"),  # no expressions: xgrammar says so
]


@pytest.mark.parametrize(("pattern", "named"), REFUSED, ids=str)
def test_refused_by_name(pattern: str, named: str) -> None:
    with pytest.raises(OptionError, match=rf"^structured_outputs: the regex has .*{named}"):
        check_regex(pattern, "regex")


@pytest.mark.parametrize("pattern", TAKEN, ids=str)
def test_taken_at_its_word(pattern: str) -> None:
    check_regex(pattern, "regex")


def test_what_passes_is_what_python_reads() -> None:
    """Of those that both read, xgrammar takes the same texts."""
    testing = pytest.importorskip("xgrammar.testing")
    from xgrammar import Grammar

    texts = ["", *"abcA$^xZ-", "ab", "aa", "ba", "bc", "$a^", "$a", "a0", "2026-01", "2026-01-02"]
    read = 0
    for pattern in TAKEN:
        try:
            python, theirs = re.compile(pattern), Grammar.from_regex(pattern)
        except (re.error, RuntimeError):
            continue
        read += 1
        for text in texts:
            fits = python.fullmatch(text) is not None
            assert testing._is_grammar_accept_string(theirs, text) == fits, (pattern, text)
    assert read > 20
