"""The vllm-d2cache command, as far as it needs no engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_d2cache.cli import UsageError, main
from vllm_d2cache.cli.compare import _family_options
from vllm_d2cache.cli.grid import Cell, Prompt, Setting, agreement, general_questions, pairs_of, read_prompts
from vllm_d2cache.cli.report import HEADS, markdown_table, text_table, write_json
from vllm_d2cache.decoders.frequencies import count_frequencies, load_frequencies
from vllm_d2cache.options.server import ServerOptions
from vllm_d2cache.options.types import OptionError

MODEL = Path(__file__).resolve().parents[3] / "models" / "tiny-llada"


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


class TestSettings:
    """What may be compared, checked before an engine starts."""

    def test_names_and_options(self) -> None:
        assert vars(Setting.parse("decoder", "eb")) == {"label": "eb", "options": {"decoder": "eb"}}
        text = "d2cache:current_k=16,rollout_p=0.5,confidence_memory=latest"
        want = {"policy": "d2cache", "current_k": 16, "rollout_p": 0.5, "confidence_memory": "latest"}
        assert vars(Setting.parse("policy", text)) == {"label": text, "options": want}

    def test_pairs_that_cannot_be_are_left_out_and_said(self) -> None:
        policies = [Setting.parse("policy", name) for name in ("full", "d2cache")]
        decoders = [Setting.parse("decoder", name) for name in ("eb", "wino")]
        pairs, left_out = pairs_of(policies, decoders, ServerOptions({}))
        assert [(p.label, d.label) for p, d in pairs] == [("full", "eb"), ("d2cache", "eb"), ("full", "wino")]
        assert len(left_out) == 1
        assert left_out[0].startswith(
            "d2cache, wino: d2cache_decoder: 'wino' does not go with d2cache_policy 'd2cache'"
        )
        with pytest.raises(UsageError, match="with 'full' alone"):
            pairs_of(policies[1:], decoders[1:], ServerOptions({}))

    def test_with_blocks_only_what_is_asked_for_must_have_a_meaning(self) -> None:
        blocks = ServerOptions({"policy": "block"}, block_length=4)
        policies = [Setting.parse("policy", name) for name in ("full", "block", "dkv")]
        decoders = [Setting.parse("decoder", name) for name in ("confidence", "wino")]
        pairs, left_out = pairs_of(policies, decoders, blocks, (False, False))
        assert [(p.label, d.label) for p, d in pairs] == [("full", "confidence"), ("block", "confidence")]
        assert len(left_out) == 4
        with pytest.raises(UsageError, match="d2cache_policy: must be 'd2cache' or 'full' or 'block'"):
            pairs_of(policies, decoders, blocks, (True, False))
        with pytest.raises(UsageError, match="'wino' does not go with"):
            pairs_of(policies, decoders, blocks, (False, True))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--policies", "fast"], "d2cache_policy: must be one of"),
            (["--decoders", "eb:gama=1"], "unknown request option"),
            (["--decoders", "eb:threshold=0.9"], "not an option of d2cache_decoder 'eb'"),
            (["--decoders", "eb:gamma"], "options are KEY=VALUE"),
            (["--decoders", "pc"], "needs token_frequencies"),
            (["--batch", "0"], "--batch must be >= 1"),
            (["--plot", "x.gif"], r"--plot must end in"),
            (["--out", "x.csv"], r"--out must end in \.json"),
            (["--out", "absent/x.json"], "no such directory: absent"),
            (["--prompts", "absent.jsonl"], "no such file: absent"),
            (["--token-frequencies", "absent.npy"], r"token_frequencies: absent\.npy: no such file"),
        ],
    )
    def test_bad_arguments(self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
        assert main(["compare", "--model", str(MODEL), *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "config.json is missing"), ("{bad", "config.json cannot be read"), ("[]", "is not a JSON object")],
    )
    def test_a_config_that_cannot_be_read(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert main(["compare", "--model", str(tmp_path)]) == 2
        assert f"--model {tmp_path}: " in (said := capsys.readouterr().err)
        assert message in said

    @pytest.mark.parametrize(
        "config",
        [
            {"architectures": 3},
            {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": "x", "block_size": []},
        ],
    )
    def test_what_else_is_wrong_with_a_config_is_the_engines_to_say(
        self, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert _family_options(str(tmp_path)) == {}

    def test_plots_without_matplotlib_are_refused_with_the_remedy(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vllm_d2cache.cli.compare.find_spec", lambda name: None)
        assert main(["compare", "--model", str(MODEL), "--plot", "x.png"]) == 2
        assert "pip install 'vllm-d2cache[plot]'" in capsys.readouterr().err


class TestPrompts:
    """JSON lines, checked by line."""

    def test_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        chat = [{"role": "user", "content": "x"}]
        path.write_text(f'{{"prompt": "a", "max_tokens": 8}}\n\n{json.dumps({"messages": chat, "max_tokens": 4})}\n')
        assert read_prompts(path) == [Prompt(8, text="a"), Prompt(4, messages=chat)]

    @pytest.mark.parametrize(
        "line",
        [
            "hello",
            "[]",
            '{"max_tokens": 8}',
            '{"prompt": "a", "messages": [], "max_tokens": 8}',
            '{"prompt": "a"}',
            '{"prompt": "a", "max_tokens": 0}',
            '{"prompt": "a", "max_tokens": 8, "stop": "x"}',
        ],
    )
    def test_bad_lines_are_named(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"prompt": "a", "max_tokens": 8}\n' + line)
        with pytest.raises(UsageError, match="line 2"):
            read_prompts(path)

    def test_empty_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "none.jsonl").write_text("\n")
        with pytest.raises(UsageError, match="no prompts"):
            read_prompts(tmp_path / "none.jsonl")

    def test_general_questions_where_none_are_given(self) -> None:
        assert all(p.messages and p.text is None for p in general_questions(chat=True))
        assert all(p.text and p.messages is None for p in general_questions(chat=False))


def cell(policy: str, outputs: list[list[int]], texts: list[str] | None = None) -> Cell:
    return Cell(
        policy, "confidence", {}, outputs, texts or [""] * len(outputs), 16, 12, 8, 10, 200, 400, 2.0, 3_000_000
    )


class TestReport:
    """The figures of a table, by hand."""

    def test_agreement(self) -> None:
        assert agreement([1, 2, 3], [1, 2, 3]) == 1
        assert agreement([1, 9, 3], [1, 2, 3, 4]) == 0.5
        assert agreement([], []) == 0
        assert agreement([], [1]) == 0

    def test_every_figure(self) -> None:
        full, other = (
            cell("full", [[1, 2, 3, 4], [5, 6]], ["ab ", "c"]),
            cell("d2cache", [[1, 2, 3, 9], [5, 6]], ["x", "c"]),
        )
        prompts = [Prompt(8, text="p", answer="ab"), Prompt(8, text="q", answer="c")]
        for one in (full, other):
            one.compare(full, prompts)
            one.set_against(full)
        table = markdown_table([full, other], ["a note"]).splitlines()
        assert table[0].count("|") == len(HEADS) + 1
        figures = [line.strip("| ").split(" | ") for line in table[2:4]]
        # 6 output tokens, 8 forwards, 10 steps, 200 rows, 400 keys, 2 s, 3 MB.
        costs = ["0.75", "20.0", "33.3", "40.0", "200.00", "3.0", "3"]
        # One of two problems lost: (0 + 1) / 4 and (1 + 1) / 4 after a problem on either side.
        assert figures[0] == ["full", "confidence", "100.0", "", "", "100.0", "100.0", *costs]
        assert figures[1] == ["d2cache", "confidence", "50.0", "-50.0 [-100.0, +56.3]", "1", "87.5", "50.0", *costs]
        assert "a note" in table

    def test_columns_that_nobody_can_fill_are_left_out(self) -> None:
        one = cell("full", [[1]])
        one.peak_bytes = None
        one.compare(one, [Prompt(8, text="p")])
        one.set_against(one)
        assert "right" not in text_table([one])
        assert "from full" not in text_table([one])
        assert "peak" not in text_table([one])
        assert len({len(line) for line in text_table([one]).splitlines()}) == 1

    def test_json_has_the_difference_and_what_it_was_made_from(self, tmp_path: Path) -> None:
        full, other = cell("full", [[1], [2]], ["a", "b"]), cell("d2cache", [[1], [3]], ["a", "c"])
        for one in (full, other):
            one.compare(full, [Prompt(8, text="p", answer="a"), Prompt(8, text="q", answer="b")])
            one.set_against(full)
        write_json(tmp_path / "x.json", [full, other], {"device": "d"}, {"batch": 1})
        found = json.loads((tmp_path / "x.json").read_text())["cells"][1]["difference"]
        assert {name: found[name] for name in ("pairs", "gained", "lost", "points", "p_value")} == {
            "pairs": 2, "gained": 0, "lost": 1, "points": -50.0, "p_value": 1.0,
        }  # fmt: skip
        assert len(found["interval"]) == 2

    def test_json_has_each_count_by_its_name(self, tmp_path: Path) -> None:
        one = cell("full", [[1, 2], [3]])
        write_json(tmp_path / "x.json", [one], {"device": "d"}, {"batch": 1})
        (row,) = json.loads((tmp_path / "x.json").read_text())["cells"]
        counts = ("output_tokens", "canvas_tokens", "committed_tokens", "steps", "forwards", "rows", "keys")
        assert [row[name] for name in counts] == [3, 16, 12, 10, 8, 200, 400]
        assert "outputs" not in row
