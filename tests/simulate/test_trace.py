"""Traces are read as they are meant, and what is wrong with one is said with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.simulate.trace import Row, TraceError, load_trace


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_csv_is_sorted_and_starts_at_zero(tmp_path: Path) -> None:
    """Traces come with any clock, and merged from several sources."""
    path = write(tmp_path, "time,model,prompt_tokens,output_tokens,key\n105,b,20,2,\n100.5,a,10,1,alice\n")
    assert load_trace(path) == [Row(0.0, "a", 10, 1, "alice"), Row(4.5, "b", 20, 2)]


def test_columns_may_stand_in_any_order_beside_others(tmp_path: Path) -> None:
    """A log has more columns than a trace needs."""
    path = write(tmp_path, "status,output,prompt,model,time\n200,2,1,a,0\n\n200,4,3,a,1\n")
    assert load_trace(path) == [Row(0.0, "a", 1, 2), Row(1.0, "a", 3, 4)]


def test_json_lines(tmp_path: Path) -> None:
    """The other format, with numbers as numbers."""
    path = write(tmp_path, '{"time": 1, "model": "a", "prompt": 5, "output": 6}\n\n')
    assert load_trace(path) == [Row(0.0, "a", 5, 6)]


def test_names_are_resolved(tmp_path: Path) -> None:
    """A trace taken before the proxy has aliases in it."""
    path = write(tmp_path, "time,model,prompt,output\n0,alias,1,1\n")
    assert load_trace(path, {"alias": "a", "a": "a"})[0].model == "a"


HEAD = "time,model,prompt,output\n"
WRONG = {
    "time,prompt,output\n0,1,1\n": ":1: no column 'model'; the first line must name the columns: time,model,",
    HEAD: ": the trace has no requests",
    "": ":1: no column 'time'",
    HEAD + "0,a,1\n": ":2: 3 cells, but the first line names 4 columns",
    HEAD + "0,a,1,1\nsoon,a,1,1\n": ":3: 'time' must be a number, but is 'soon'",
    HEAD + "inf,a,1,1\n": ":2: 'time' must be a finite number of seconds, not 'inf'",
    HEAD + "0,a,-1,1\n": ":2: 'prompt' must be a whole number of tokens from 0",
    HEAD + "0,a,1,1.5\n": ":2: 'output' must be a whole number of tokens from 0",
    HEAD + "0,a,1,nan\n": ":2: 'output' must be a whole number of tokens from 0",
    HEAD + "0,,1,1\n": ":2: 'model' must be the name of a model, not ''",
    HEAD + "0,aa,1,1\n": ":2: no model is called 'aa'; did you mean 'a'?",
    HEAD + "0,zzz,1,1\n": ":2: no model is called 'zzz'; there are 'a'",
    '{"time": 0, "model": "a", "prompt": 1}\n': ":1: 'output' must be a number, but is missing",
    '{"time": true, "model": "a", "prompt": 1, "output": 1}\n': ":1: 'time' must be a number, but is True",
    '{"time": 0,\n': ":1: not JSON",
    '{"time": 0, "model": "a", "prompt": 1, "output": 1}\n[]\n': ":2: a line must be an object",
}


@pytest.mark.parametrize("text", WRONG)
def test_an_error_names_the_line_and_what_would_be_right(tmp_path: Path, text: str) -> None:
    """Nobody searches a trace of a million lines by hand."""
    path = write(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        load_trace(path, {"a": "a"})
    assert caught.value.message.startswith(f"{path}{WRONG[text]}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file and one that is no text are told apart."""
    with pytest.raises(TraceError, match="cannot read the trace: No such file"):
        load_trace(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not UTF-8"):
        load_trace(tmp_path / "binary")
