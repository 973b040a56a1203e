"""Progress on a terminal, and in a log file."""

import io
import re
import sys

import pytest

from hfkit import cli
from hfkit.runtime import bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_nothing_of_what_is_done_soon(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bars.Bar(range(1000), "encoding train")) == list(range(1000))
    with bars.Bar(desc="reading", unit="B", unit_scale=True, leave=True) as bar:
        bar.update(10**9)
    assert capsys.readouterr() == ("", "")


def test_a_log_file_gets_lines_of_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "LINE_SECONDS", 1e-9)  # every update is as far from the last as a line wants
    with bars.Bar(desc="teacher", total=4_000, unit="tok", unit_scale=True, leave=True) as bar:
        bar.update(1_000)
        bar.update(2_000)
    told = capsys.readouterr()
    assert told.err == ""
    assert (
        told.out
        == "  teacher: 1.00k of 4.00k tok in 0:00, 0:00 left\n  teacher: 3.00k of 4.00k tok in 0:00, 0:00 left\n"
    )
    with bars.Bar(desc="preparing", unit=" rows") as bar:
        bar.update(1_234)
    assert capsys.readouterr().out == "  preparing: 1,234 rows in 0:00\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(bars.Bar(range(10), "encoding train"))
    assert "\rencoding train: " in terminal.getvalue() and capsys.readouterr().out == ""


def test_other_processes_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(bars, "LINE_SECONDS", 1e-9)
    assert len(list(bars.Bar(range(10), "encoding train"))) == 10
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36_610, "10:10:10")])
def test_durations(seconds: float, text: str) -> None:
    assert bars.duration(seconds) == text


def test_a_training_logs_a_line_a_logging_step_and_an_evaluation(
    ready: object, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train.max_steps=4", "train.logging_steps=1", "train.eval_steps=2", "train.torch_compile=false"]
    assert cli.main(["run", "recipes/pretrain.yaml", *options, "train.eval_strategy=steps"]) == 0
    told = capsys.readouterr()
    assert "\r" not in told.out + told.err and "it/s" not in told.out + told.err
    lines = [line for line in told.out.splitlines() if line.startswith("  step ")]
    trained = [line for line in lines if "evaluation" not in line]
    shape = r"  step (\d)/4  loss \d+\.\d{3}  [\d,]+ tok/s  \d+% of peak  \d:\d\d left"
    assert [re.fullmatch(shape, line)[1] for line in trained[1:]] == ["2", "3", "4"]  # type: ignore[index]
    assert trained[0].startswith("  step 1/4  loss ")
    evaluations = [line for line in lines if "evaluation" in line]
    assert [line.split("  ")[1] for line in evaluations] == ["step 2/4", "step 4/4"]
    assert all("loss " in line and "perplexity " in line and "bits_per_byte " in line for line in evaluations)


def test_a_training_on_a_terminal_draws_the_bar(
    ready: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    options = ["train.max_steps=2", "train.logging_steps=1", "train.torch_compile=false", "train.eval_strategy=no"]
    assert cli.main(["run", "recipes/pretrain.yaml", *options]) == 0
    assert "2/2 [" in terminal.getvalue() and "  step " not in capsys.readouterr().out
