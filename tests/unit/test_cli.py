"""The vllm-d2cache command, as far as it needs no engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_d2cache.cli import main
from vllm_d2cache.config import OptionError
from vllm_d2cache.samplers.frequencies import count_frequencies, load_frequencies

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-llada"


def test_frequencies_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    text, out = tmp_path / "corpus.txt", tmp_path / "table.npy"
    text.write_text("aab\nab\n")
    assert main(["frequencies", "--model", str(MODEL), "--text", str(text), "--out", str(out)]) == 0
    assert "320 tokens" in capsys.readouterr().out
    table = load_frequencies(str(out), 320)
    ids = AutoTokenizer.from_pretrained(str(MODEL)).encode("ab\n", add_special_tokens=False)
    assert len(ids) == 3
    np.testing.assert_allclose(table[ids], [3 / 7, 2 / 7, 2 / 7], rtol=1e-6)
    unseen = np.setdiff1d(np.arange(320), ids)
    np.testing.assert_allclose(table[unseen], 1 / 7, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "out", "message"),
    [(None, "t.npy", "no such file"), ("", "t.npy", "no tokens"), ("a", "t.txt", "--out must end in .npy")],
)
def test_frequencies_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, out: str, message: str
) -> None:
    corpus = tmp_path / "corpus.txt"
    if text is not None:
        corpus.write_text(text)
    assert main(["frequencies", "--model", str(MODEL), "--text", str(corpus), "--out", str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["frequency"])
    assert stop.value.code == 2
    assert "frequencies" in capsys.readouterr().err


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.3"):
        count_frequencies([[1, 2], [4]], 4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.full(5, 0.1), "must hold 4 numbers"),
        (np.full((4, 1), 0.1), "one number for each token id"),
        (np.array(["a"] * 4), "one number for each token id"),
        (np.array([0.1, np.nan, 0.1, 0.1]), r"must lie in 0\.\.1"),
        (np.array([0.1, -0.1, 0.1, 0.1]), r"must lie in 0\.\.1"),
        (np.array([3, 1, 1, 1]), r"must lie in 0\.\.1"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path: Path, table: np.ndarray, message: str) -> None:
    path = tmp_path / "table.npy"
    np.save(path, table)
    with pytest.raises(OptionError, match=rf"token_frequencies: .*{message}"):
        load_frequencies(str(path), 4)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        load_frequencies(str(tmp_path / "absent.npy"))
    (tmp_path / "text.npy").write_text("0.1 0.2")
    with pytest.raises(OptionError, match=r"must be a \.npy file"):
        load_frequencies(str(tmp_path / "text.npy"))
