"""Log records reach journald whole and structured, or people readable."""

import io
import logging
import os
import select
import socket
import struct

import pytest

from vllmd.systemd.journal import JournalHandler, PrefixFormatter, TextFormatter, setup_logging


@pytest.fixture
def journald(tmp_path):
    """journald's end of its native socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "socket"))
    sock.settimeout(5)
    yield sock
    sock.close()


@pytest.fixture
def log(journald):
    """A logger that ends in it."""
    logger = logging.getLogger("test.journal")
    logger.propagate, logger.level = False, logging.DEBUG
    handler = JournalHandler("vllmd", journald.getsockname())
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    handler.close()


@pytest.fixture
def root_handlers():
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def parse(data):
    """A record in the native protocol, back to a dictionary."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", data)
            value, data = data[8 : 8 + size], data[9 + size :]
        fields[name.decode()] = value.decode()
    return fields


def receive_memfd(sock):
    """The content of the descriptor that came instead of a datagram."""
    _, (fd,), _, _ = socket.recv_fds(sock, 100, 1)
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read()


def test_fields_are_structured(journald, log):
    """journalctl MODEL=m finds the record."""
    log.warning("evicted %s", "m", extra={"journal": {"MODEL": "m", "DECISION": "evict"}})
    fields = parse(journald.recv(100_000))
    assert fields["MESSAGE"] == "evicted m"
    assert (fields["PRIORITY"], fields["MODEL"], fields["DECISION"]) == ("4", "m", "evict")
    assert (fields["SYSLOG_IDENTIFIER"], fields["CODE_FUNC"]) == ("vllmd", "test_fields_are_structured")


def test_a_newline_cannot_forge_a_field(journald, log):
    """A model's name comes from a client: it must not write other fields, nor may a field name."""
    log.info("x\nPRIORITY=0", extra={"journal": {"MODEL": "m\nDECISION=evil", "_PID": "1", "lower": "1", "A\nB": "1"}})
    fields = parse(journald.recv(100_000))
    assert fields["MESSAGE"] == "x\nPRIORITY=0"
    assert fields["MODEL"] == "m\nDECISION=evil"
    assert {"DECISION", "_PID", "lower", "A\nB"}.isdisjoint(fields)
    assert fields["PRIORITY"] == "6"


def test_a_large_record_goes_as_a_memfd(journald, log):
    """A record larger than a datagram is not lost."""
    log.error("x" * (4 << 20))
    assert parse(receive_memfd(journald))["MESSAGE"] == "x" * (4 << 20)


def test_a_traceback_stays_one_record(journald, log):
    """One error is one record, its traceback included."""
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    message = parse(journald.recv(100_000))["MESSAGE"]
    assert message.startswith("failed\nTraceback")
    assert message.endswith("ValueError: no")


def test_a_stalled_journald_loses_records_and_says_so(journald, log):
    """The daemon relays tokens: it must not wait for journald."""
    for number in range(2000):
        log.info("n %d", number)
    arrived = len(drain(journald))
    assert 0 < arrived < 2000
    log.info("again")
    said = [parse(journald.recv(100_000))["MESSAGE"] for _ in range(2)]
    assert said == [f"{2000 - arrived} log records lost while journald did not read", "again"]


def test_a_restarted_journald_is_found_again(journald, log, tmp_path):
    """After a restart of journald its socket is a new one at the old place."""
    journald.close()
    os.unlink(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as new:
        new.bind(str(tmp_path / "socket"))
        new.settimeout(5)
        log.info("hello")
        assert parse(new.recv(100_000))["MESSAGE"] == "hello"


def drain(sock):
    """All that has arrived by now."""
    records = []
    while select.select([sock], [], [], 0)[0]:
        records.append(sock.recv(100_000))
    return records


def record(level, message, **fields):
    """A record as logging makes it."""
    made = logging.LogRecord("x", level, "f.py", 1, message, (), None)
    made.journal = fields
    return made


def test_prefixed_lines_carry_the_priority():
    """Every line of stderr is a record of its own to journald."""
    text = PrefixFormatter().format(record(logging.ERROR, "one\ntwo", MODEL="m"))
    assert text == "<3>one  [MODEL=m]\n<3>two"


def test_text_is_plain_unless_on_a_terminal():
    """Escape codes have no place in a file."""
    plain = TextFormatter(colour=False).format(record(logging.WARNING, "low", MODEL="m"))
    assert plain[8:] == " warning: low  [MODEL=m]"
    coloured = TextFormatter(colour=True).format(record(logging.WARNING, "low"))
    assert coloured.startswith("\x1b[33m")
    assert coloured.endswith("\x1b[0m")


def test_setup_chooses_text_for_other_streams(root_handlers, monkeypatch):
    """JOURNAL_STREAM may be inherited by a process whose stderr goes elsewhere."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    stream = io.StringIO()
    setup_logging("warning", stream=stream)
    logging.getLogger("x").info("hidden")
    logging.getLogger("x").warning("shown")
    assert stream.getvalue()[9:] == "warning: shown\n"


def test_setup_prefixes_where_only_the_stream_is_journalds(root_handlers, monkeypatch, tmp_path):
    """Without the native socket, a line of stderr still tells its priority."""
    monkeypatch.setattr("vllmd.systemd.journal.JournalHandler.__init__", _unreachable)
    with open(tmp_path / "err", "w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        setup_logging("info", stream=stream)
        logging.getLogger("x").info("hello")
    assert (tmp_path / "err").read_text() == "<6>hello\n"


def _unreachable(self, identifier):
    raise FileNotFoundError(2, "No such file or directory")


def test_what_others_said_is_no_escape_sequence(log, journald):
    """A record quotes engines, names and answers; it is read in a terminal. Its own line breaks stay."""
    log.warning("%s", "a\x1b]0;title\x07\x1b[31mb\x9b\nc", extra={"journal": {"MODEL": "m\x1b[1m"}})
    record = parse(journald.recv(1 << 16))
    assert (record["MESSAGE"], record["MODEL"]) == ("ab\\x9b\nc", "m")


def test_nor_for_people(capsys):
    """The same where the log is a terminal."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(TextFormatter(colour=False))
    handler.emit(logging.makeLogRecord({"msg": "a\x1b[2Jb\r"}))
    assert out.getvalue().endswith("ab\\r\n")
