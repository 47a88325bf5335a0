"""make test-gpu: what it says without a GPU, and that it fails where there is one and nothing has run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.test_gpu import ENGINE, KERNELS, ROOT, Outcome, fingerprint, main, passed_before, run_pytest


def outcome(code: int = 0, passed: int = 1, skipped: tuple[str, ...] = ()) -> Outcome:
    return Outcome(code, passed, list(skipped))


def test_no_gpu_is_no_failure_but_loud(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], None, lambda paths: pytest.fail("nothing may run")) == 0
    assert "Not one GPU test has run" in capsys.readouterr().err


def test_all_groups_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    note = tmp_path / "build/note.json"
    ran: list[list[str]] = []

    def run(paths: list[str]) -> Outcome:
        ran.append(paths)
        return outcome(passed=3, skipped=("reason",))

    assert main([], "card", run, note) == 0
    assert ran == [*KERNELS.values(), *ENGINE.values()]
    assert passed_before("card", False, note) and passed_before("card", True, note)
    assert not passed_before("another card", True, note)
    assert "kernels: 3 passed, 1 skipped" in capsys.readouterr().out
    ran.clear()
    assert main(["--no-engine"], "card", run, note) == 0
    assert ran == [*KERNELS.values()]
    assert passed_before("card", True, note) and not passed_before("card", False, note)
    note.write_text(note.read_text().replace(fingerprint(), "other source"))
    assert not passed_before("card", True, note)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (outcome(code=1), "kernels: pytest ended with exit code 1"),
        (outcome(passed=0, skipped=("no graphs", "no graphs")), "kernels: no test has run: no graphs"),
        (outcome(code=5, passed=0), "kernels: pytest ended with exit code 5"),
        (outcome(passed=0), "kernels: no test has run: none was found"),
    ],
)
def test_a_group_that_fails_or_runs_nothing(
    bad: Outcome, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    note = tmp_path / "note.json"
    assert main(["--no-engine"], "card", lambda paths: bad, note) == 1
    assert not note.exists() and not passed_before("card", True, note)
    assert words in capsys.readouterr().out


def test_what_pytest_reports(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('why')\n")
    assert run_pytest([str(file)]) == (0, 1, ["why"])
    file.write_text("def test_a(): pass\ndef test_b(): assert False\n")
    assert run_pytest([str(file)]) == (1, 1, [])
    file.write_text("")
    assert run_pytest([str(file)]) == (5, 0, [])


def test_the_groups_name_tests_that_exist() -> None:
    for paths in (*KERNELS.values(), *ENGINE.values()):
        for path in paths:
            assert (ROOT / path.removeprefix("--ignore=").partition("::")[0]).exists(), path
