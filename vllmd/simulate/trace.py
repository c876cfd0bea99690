"""Traces: when each model was asked for, and for how many tokens. CSV or JSON lines.

A CSV file names its columns in the first line; a JSON-lines file has one
object per line. Columns: ``time`` (seconds, from any origin), ``model``,
``prompt`` and ``output`` (tokens; ``prompt_tokens`` and ``output_tokens`` are
accepted too), and optionally ``key`` (the API key's name).
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllmd.errors import VllmdError
from vllmd.frozen import frozen

MOST_TOKENS = 10_000_000
ALIASES = {"prompt_tokens": "prompt", "output_tokens": "output", "prompt tokens": "prompt", "output tokens": "output"}
REQUIRED = ("time", "model", "prompt", "output")


class TraceError(VllmdError):
    """The trace cannot be read; the message names file:line and what would be right."""

    code = "invalid_trace"


@frozen
class Row:
    """One request: ``time`` in seconds from the first one, lengths in tokens."""

    time: float
    model: str
    prompt: int
    output: int
    key: str = ""


def load_trace(path: str | Path, names: Mapping[str, str] | None = None) -> list[Row]:
    """The requests of a trace in order of time, the first at 0. Raises TraceError.

    ``names``: what each model may be called, and what it is called in truth;
    others are errors. Without it every name stands for itself.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: the trace is not UTF-8 text") from None
    records = _json_lines(path, text) if text.lstrip().startswith("{") else _csv(path, text)
    rows = sorted((_row(where, record, names) for where, record in records), key=lambda row: row.time)
    if not rows:
        raise TraceError(f"{path}: the trace has no requests")
    return [Row(row.time - rows[0].time, row.model, row.prompt, row.output, row.key) for row in rows]


def of_these(rows: Iterable[Row], names: Mapping[str, str]) -> tuple[list[Row], list[str]]:
    """The requests for models of these names, by the names that are theirs; and which models were left out."""
    every = list(rows)
    known = [replace(row, model=names[row.model]) for row in every if row.model in names]
    return known, sorted({row.model for row in every} - names.keys())


Located = tuple[str, Mapping[str, Any]]  # "file:line", and the columns found there


def _json_lines(path: Path, text: str) -> Iterator[Located]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise TraceError(f'{where}: a line must be an object such as {{"time": 0, "model": "small", ...}}')
        yield where, _named(record)


def _csv(path: Path, text: str) -> Iterator[Located]:
    reader = csv.reader(text.splitlines())
    names = [name.strip().lower() for name in next(reader, [])]
    columns = _named(dict.fromkeys(names))
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        wanted = ",".join((*REQUIRED, "key"))
        raise TraceError(f"{path}:1: no column {missing[0]!r}; the first line must name the columns: {wanted}")
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(names):
            raise TraceError(f"{where}: {len(cells)} cells, but the first line names {len(names)} columns")
        yield where, _named(dict(zip(names, cells, strict=True)))


def _named(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return {ALIASES.get(name, name): value for name, value in record.items()}


def _row(where: str, record: Mapping[str, Any], names: Mapping[str, str] | None) -> Row:
    """One request of the trace. Raises TraceError, which names the line and what would be right."""
    model, key = record.get("model"), record.get("key") or ""
    if not isinstance(model, str) or not model.strip():
        raise TraceError(f"{where}: 'model' must be the name of a model, not {model!r}")
    time, model = _number(where, record, "time"), model.strip()
    if not math.isfinite(time):
        raise TraceError(f"{where}: 'time' must be a finite number of seconds, not {record['time']!r}")
    if names is not None and model not in names:
        near = difflib.get_close_matches(model, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, names))}"
        raise TraceError(f"{where}: no model is called {model!r}; {hint}")
    model = names[model] if names else model
    return Row(time, model, _tokens(where, record, "prompt"), _tokens(where, record, "output"), str(key))


def _tokens(where: str, record: Mapping[str, Any], name: str) -> int:
    value = _number(where, record, name)
    if not (0 <= value <= MOST_TOKENS and value == int(value)):
        raise TraceError(f"{where}: {name!r} must be a whole number of tokens from 0 to {MOST_TOKENS}, not {value:g}")
    return int(value)


def _number(where: str, record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    try:
        if value is None or isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        found = "missing" if value is None else f"{value!r}"
        raise TraceError(f"{where}: {name!r} must be a number, but is {found}") from None
