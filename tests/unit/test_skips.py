"""tools/skips.py and .ci/skips: what CI may skip, and that nothing else passes unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.skips import listed, main, skipped

LIST = Path(__file__).resolve().parents[2] / ".ci/skips"
LOG = """
SKIPPED [12] tests/triton/test_attention.py:162: real shapes need a GPU
SKIPPED [3] tests/triton/test_cuda_graphs.py: no GPU (test_step_graphs.py has an emulator)
=========== 5 passed, 15 skipped in 3.21s ===========
SKIPPED [1] tests/e2e/test_examples.py:137: {}
"""


def test_what_was_skipped_is_counted_by_file_and_reason() -> None:
    assert skipped(LOG.format("no nginx on this machine")) == {
        ("tests/triton/test_attention.py", "real shapes need a GPU"): 12,
        ("tests/triton/test_cuda_graphs.py", "no GPU (test_step_graphs.py has an emulator)"): 3,
        ("tests/e2e/test_examples.py", "no nginx on this machine"): 1,
    }


@pytest.mark.parametrize(
    "reason",
    [
        "no nginx on this machine",
        "no Chromium on this machine (looked for chromium)",
        "no curl on this machine",
        "could not import 'xgrammar': No module named 'xgrammar'",
    ],
)
def test_a_reason_that_is_not_listed_fails(reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text(LOG.format(reason))
    assert main(log, LIST) == 1
    assert f"skipped 1 in tests/e2e/test_examples.py: {reason} (not in skips: fails)" in capsys.readouterr().out


def test_listed_reasons_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text(LOG.format("no GPU"))
    assert main(log, LIST) == 0
    assert "fails" not in capsys.readouterr().out
    log.write_text("=== 5 passed in 3.21s ===\n")
    assert main(log, LIST) == 0


def test_every_reason_on_the_list_is_one_that_a_test_gives() -> None:
    tests = "".join(path.read_text() for path in LIST.parents[1].glob("tests/**/*.py") if path.name != "test_skips.py")
    assert [reason for reason in listed(LIST.read_text()) if reason not in tests] == []
