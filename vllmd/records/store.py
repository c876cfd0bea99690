"""Use and arrivals in SQLite. Everything here may wait for the disk: it belongs into a thread.

The record must never cost the service. So writes come in batches, the caller keeps what could not be written and tries
again, and whatever is wrong with the file is one sentence, ``StoreError``:

=============================  ===================================================================
a full disk, a locked file     what has gathered is written later
a damaged file                 put aside as ``usage.db.damaged``, and begun anew
one of a later version         left alone; nothing is recorded until that version is back
=============================  ===================================================================

Use is kept by the hour for two months and by the day for as long as the configuration says: any question is answered
from rows that are few, however many requests there were. Days and hours are those of UTC.

What is too old is deleted by the clock of the third last day of use, so that a clock that is wrong for a day or two
deletes nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllmd.api.answers import UsageRow
from vllmd.errors import VllmdError
from vllmd.records.sums import DAY, FIELDS, HOUR, Row
from vllmd.records.trace import Arrival, Damaged, packed, unpacked

VERSION = 1
BUSY = 2.0  # seconds that a write waits for another one
HOURS_KEPT = 62 * 24
LAG = 2  # days of use by which the clock must have moved on before it is believed
MOST_TRACE = 64 << 20  # bytes of arrivals; the oldest go
DIMENSIONS = ("key", "model", "day", "hour", "month")
BUSIEST = 100_000  # rows that a question may have for an answer

COLUMNS = ", ".join(f"{name} REAL NOT NULL" for name in FIELDS)
SCHEMA = f"""
CREATE TABLE hours (hour INTEGER, key TEXT, model TEXT, {COLUMNS}, PRIMARY KEY (hour, key, model)) WITHOUT ROWID;
CREATE TABLE days (day INTEGER, key TEXT, model TEXT, {COLUMNS}, PRIMARY KEY (day, key, model)) WITHOUT ROWID;
CREATE TABLE arrivals (first INTEGER NOT NULL, segment BLOB NOT NULL);
CREATE INDEX arrivals_by_time ON arrivals (first);
PRAGMA user_version = {VERSION};
"""
ADD = ", ".join(f"{name} = {name} + excluded.{name}" for name in FIELDS)
PUT = (
    "INSERT INTO {table} VALUES (" + ", ".join("?" * (3 + len(FIELDS))) + ") "
    "ON CONFLICT ({first}, key, model) DO UPDATE SET " + ADD
)  # fmt: skip
PUT_HOUR, PUT_DAY = PUT.format(table="hours", first="hour"), PUT.format(table="days", first="day")
SUMS = ", ".join(f"SUM({name})" for name in FIELDS)


class StoreError(VllmdError):
    """The store cannot be used; the message says why, and what becomes of the record."""

    status = 503


class Question(NamedTuple):
    """A question to the store: use ``by`` these dimensions, from ``since`` until ``until`` (Unix time)."""

    by: tuple[str, ...]
    since: float
    until: float
    key: str | None = None
    model: str = ""


class Store:
    """One file. ``write`` is for one thread; questions have a connection of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began_anew = ""  # the sentence for the log, once a damaged file was put aside
        self._connection: sqlite3.Connection | None = None
        self._pruned = 0  # the hour in which what is too old was last deleted

    # -- writing

    def write(
        self, rows: Mapping[Row, Sequence[float]], arrivals: Iterable[tuple[Any, ...]], days: float, trace: float
    ) -> None:
        """Add all of it, or nothing. ``days`` and ``trace``: seconds for which use and arrivals are kept.

        Raises StoreError.
        """
        with self._translated():
            connection = self._open()
            with connection:
                connection.executemany(PUT_HOUR, [(*row, *values) for row, values in rows.items()])
                connection.executemany(
                    PUT_DAY, [(hour * HOUR // DAY, key, model, *v) for (hour, key, model), v in rows.items()]
                )
                first, segment = packed(arrivals)
                if first:
                    connection.execute("INSERT INTO arrivals VALUES (?, ?)", (first, segment))
                newest = max((row[0] for row in rows), default=self._pruned)
                if newest != self._pruned:  # it may also be an earlier one: the clock was set back
                    self._prune(connection, newest, days, trace)
                    self._pruned = newest

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._connection = self._opened()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # locked, full, not permitted: not damaged
                    raise
                self._put_aside(str(error))
                self._connection = self._opened()
        return self._connection

    def _opened(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY, check_same_thread=False)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise StoreError(f"{self.path} was written by a later vllmd; nothing is recorded until that is back")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if version == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
            elif connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its pages are damaged")
        except BaseException:
            connection.close()
            raise
        return connection

    def _put_aside(self, why: str) -> None:
        """Begin a new file; the damaged one stays beside it, to be looked into."""
        aside = self.path.with_name(f"{self.path.name}.damaged")
        os.replace(self.path, aside)
        for more in ("-wal", "-shm"):  # of the old file: with them the new one would be damaged as well
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.path}{more}")
        self.began_anew = f"{self.path} was damaged ({why}): put aside as {aside.name}, the record begins anew"

    def _prune(self, connection: sqlite3.Connection, hour: int, days: float, trace: float) -> None:
        """Delete what is too old in this hour, as far as the days of use before it bear it out."""
        seen = connection.execute("SELECT DISTINCT day FROM days WHERE day <= ? ORDER BY day DESC LIMIT 1 OFFSET ?",
                                  (hour * HOUR // DAY, LAG)).fetchone()  # fmt: skip
        if seen:
            hour = min(hour, (seen[0] + LAG) * DAY // HOUR + hour % (DAY // HOUR))
            self._prune_before(connection, hour, days, trace)
        (size,) = connection.execute("SELECT TOTAL(LENGTH(segment)) FROM arrivals").fetchone()
        if size > MOST_TRACE:
            connection.execute(
                "DELETE FROM arrivals WHERE rowid IN (SELECT rowid FROM arrivals ORDER BY first "
                "LIMIT (SELECT COUNT(*) / 10 + 1 FROM arrivals))"
            )

    @staticmethod
    def _prune_before(connection: sqlite3.Connection, hour: int, days: float, trace: float) -> None:
        connection.execute("DELETE FROM hours WHERE hour < ?", (hour - HOURS_KEPT,))
        connection.execute("DELETE FROM days WHERE day < ?", ((hour * HOUR - days) // DAY,))
        connection.execute("DELETE FROM arrivals WHERE first < ?", ((hour * HOUR - trace) * 1000,))

    # -- asking

    def ask(self, question: Question) -> list[UsageRow]:
        """Rows with the question's dimensions and the sums of ``FIELDS``. Raises StoreError, ValueError.

        Hours are read for a question by the hour or of less than three days; else whole days.
        """
        unknown = [name for name in question.by if name not in DIMENSIONS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(DIMENSIONS)}")
        hourly = "hour" in question.by or question.until - question.since < 3 * DAY
        table, unit, size = ("hours", "hour", HOUR) if hourly else ("days", "day", DAY)
        seconds = f"{unit} * {size}"
        of = {"key": "key", "model": "model", "day": f"date({seconds}, 'unixepoch')",
              "hour": f"strftime('%Y-%m-%dT%H:00Z', {seconds}, 'unixepoch')",
              "month": f"strftime('%Y-%m', {seconds}, 'unixepoch')"}  # fmt: skip
        where = [f"{unit} >= ?", f"{unit} < ?"]
        values: list[object] = [question.since // size, -(-question.until // size)]
        for name, value in (("key", question.key), ("model", question.model or None)):
            if value is not None:
                where.append(f"{name} = ?")
                values.append(value)
        # By the unit itself first: dates are made of few rows then, not of all.
        timed = any(name not in ("key", "model") for name in question.by)
        groups = [*([unit] if timed else []), *(name for name in ("key", "model") if name in question.by)]
        whole = len(groups) == 3  # every row by itself: nothing is to be added up
        summed = ", ".join([*groups, *(name if whole else f"SUM({name}) AS {name}" for name in FIELDS)])
        grouped = f" GROUP BY {', '.join(groups)}" if groups and not whole else ""
        source = f"SELECT {summed} FROM {table} WHERE {' AND '.join(where)}{grouped}"
        names, again = [of[name] for name in question.by], timed and unit not in question.by
        more = f" GROUP BY {', '.join(names)}" if again else ""
        source = f"SELECT {', '.join([*names, *([SUMS] if again else FIELDS)])} FROM ({source}){more}"
        with self._translated(), self._reading() as connection:
            rows = connection.execute(f"{source} LIMIT {BUSIEST}", values).fetchall()
        columns = (*question.by, *FIELDS)
        return [UsageRow(**dict(zip(columns, row, strict=True))) for row in rows if row[len(question.by)] is not None]

    def arrivals(self, since: float) -> Iterator[Arrival]:
        """The arrivals since a Unix time, about in their order. Raises StoreError."""
        with self._translated(), self._reading() as connection:
            rows = connection.execute(
                "SELECT first, segment FROM arrivals WHERE first >= ? ORDER BY first", (since * 1000,)
            )
            for first, segment in rows:
                with contextlib.suppress(Damaged):
                    yield from unpacked(first, segment)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that changes nothing. Raises StoreError where there is no file."""
        if not self.path.exists():
            raise StoreError("nothing has been recorded yet")
        connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=BUSY, check_same_thread=False)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise StoreError(f"{self.path} was written by a later vllmd, which alone can read it")
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Within this, errors of SQLite and of the file become StoreError."""
        try:
            yield
        except sqlite3.Error as error:
            damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            self.close()  # what was wrong may be past at the next try, and a damaged file is put aside then
            what = "is damaged" if damaged else "cannot be used now"
            raise StoreError(f"the record of use, {self.path}, {what}: {error}") from None
        except OSError as error:
            self.close()
            raise StoreError(f"the record of use, {self.path}, cannot be used now: {error.strerror or error}") from None
