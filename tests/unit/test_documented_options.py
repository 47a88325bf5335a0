"""The documents name every option, policy and decoder that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_d2cache.decoders import DECODER_CLASSES
from vllm_d2cache.options.server import SERVER_FIELDS
from vllm_d2cache.policies import POLICY_CLASSES
from vllm_d2cache.requests.resolve import REQUEST_FIELDS, option_types

ROOT = Path(__file__).resolve().parents[2]
# Put there by the plugin itself.
NOBODYS = {"block_length"}


def rows() -> dict[str, str]:
    """The table of options in README.md: name, and the rest of the line."""
    text = (ROOT / "README.md").read_text().split("## Options")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \|(.*)$", text, re.MULTILINE))


def test_every_option_of_the_server_and_of_all_requests_has_a_line() -> None:
    shared = {*REQUEST_FIELDS, *POLICY_CLASSES["d2cache"].options, *SERVER_FIELDS}
    assert set(rows()) == shared - NOBODYS


@pytest.mark.parametrize(("option", "names"), [("policy", POLICY_CLASSES), ("decoder", DECODER_CLASSES)])
def test_the_lines_of_policy_and_decoder_name_all_of_them(option: str, names: object) -> None:
    assert set(names) <= set(re.findall(r"`(\w+)`", rows()[option]))  # type: ignore[call-overload]


def test_options_of_one_policy_or_decoder_are_described_with_it() -> None:
    text = (ROOT / "docs" / "policies.md").read_text() + (ROOT / "docs" / "decoders.md").read_text()
    own = set(option_types()) - set(rows())
    assert [name for name in sorted(own) if f"`{name}`" not in text] == []
