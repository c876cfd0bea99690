"""What the supervisor of engines does when what it builds on fails: a start has an answer, and nobody is left over."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from vllmd.launcher import engines, process, spawn
from vllmd.launcher import service as launcher_service
from vllmd.launcher.backend import Found, Placed
from vllmd.launcher.cgroup import cgroup_of
from vllmd.launcher.engines import Supervisor
from vllmd.launcher.logs import Pipes
from vllmd.launcher.loop import Loop
from vllmd.launcher.process import Process
from vllmd.launcher.protocol import ExitReport, Failed, Started, StartOrder, decode
from vllmd.launcher.service import Service
from vllmd.launcher.spawn import OURSELVES, User, Users, read_failure


def full(*_: object, **__: object) -> Any:
    """What the kernel says where this process has no file descriptor left."""
    raise OSError(errno.EMFILE, "Too many open files")


class Group:
    """All processes of an engine that has one; what is noted on it fails as told."""

    def __init__(self, process: Process, wrong: str) -> None:
        self.process, self.wrong, self.noted = process, wrong, dict[str, str]()

    def location(self) -> str:
        return "/nowhere"

    def empty(self) -> bool:
        return not os.path.exists(f"/proc/{self.process.pid}/exe")

    def kill(self) -> None:
        self.process.signal(9)

    def oom_killed(self) -> bool:
        return False

    def watch(self, changed: Callable[[], None]) -> None:
        pass

    def annotate(self, values: Mapping[str, str]) -> None:
        if self.wrong in values:
            raise OSError(28, "No space left on device")
        self.noted |= values

    def annotations(self) -> dict[str, str]:
        return self.noted

    def close(self) -> None:
        pass


class Backend:
    """Places every process; ``wrong`` is the note that cannot be written, or "place" for a defect."""

    name, detail, limits, dies_with_us = "fake", "", (), False
    marks: Mapping[str, str] = {}

    def __init__(self, loop: Loop, wrong: str) -> None:
        self.logs, self.wrong, self.groups = Pipes(loop), wrong, list[Group]()

    def place(self, order: StartOrder, process: Process, placed: Placed) -> None:
        if self.wrong == "place":
            raise OverflowError("int too big to convert")
        self.groups.append(Group(process, self.wrong))
        placed(self.groups[-1], "")

    def retire(self, instance: str, retired: Callable[[], None]) -> None:
        retired()

    def adopt(self) -> list[Found]:
        return []


def start(loop: Loop, backend: Backend, order: StartOrder) -> Started | Failed:
    """The answer to an order."""
    answers: list[Started | Failed] = []
    reports: list[ExitReport] = []
    supervisor = Supervisor(loop, backend, Users(), reports.append)

    def answered(answer: Started | Failed) -> None:
        answers.append(answer)
        loop.later(0, loop.stop)

    supervisor.start(order, answered)
    loop.run()
    assert len(answers) == 1
    supervisor.kill_all()
    return answers[0]


def test_a_standby_is_ready_also_where_its_memory_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so once: taken for one that still imports, it was ended after five minutes as one that had failed."""
    loop, ready = Loop(), list[tuple[str, int]]()
    monkeypatch.setattr(process, "open", full, raising=False)

    def waiting(instance: str, memory: int) -> None:
        ready.append((instance, memory))
        loop.stop()

    supervisor = Supervisor(loop, Backend(loop, ""), Users(), lambda report: None, waiting=waiting)
    monkeypatch.setattr(process, "start_time_of", lambda pid: 1)
    supervisor.start(StartOrder("s", (sys.executable, "-c", WAITS), waits=True), lambda answer: None)
    loop.later(60, loop.stop)
    loop.run()
    supervisor.kill_all()
    assert ready == [("s", 0)]


def test_a_connection_that_cannot_be_accepted_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no descriptor for it just now. The loop turned at once, and logged a defect each time."""
    monkeypatch.setattr(launcher_service, "ACCEPT_PAUSE_SECONDS", 0.05)
    loop, asked = Loop(), list[str]()
    real = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    real.bind("\0" + f"vllmd-test-{os.getpid()}")
    real.listen()

    class Listener:
        setblocking, fileno = real.setblocking, real.fileno

        def accept(self) -> tuple[socket.socket, object]:
            asked.append("")
            return full() if len(asked) < 4 else real.accept()

    service = Service(loop, Backend(loop, ""), (os.getuid(),))
    service.listen(Listener())  # type: ignore[arg-type]
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(real.getsockname())
    client.sendall(b'{"id":1,"type":"Info","body":{}}')
    loop.watch(client.fileno(), loop.stop)
    loop.later(60, loop.stop)
    loop.run()
    assert (len(asked), service.clients) == (4, 1)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert all("cannot accept a connection" in record.getMessage() for record in caplog.records)
    client.close()
    real.close()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("launcher.user", "cannot write the engine's notes on its cgroup: No space left on device"),
        ("model", "cannot write the engine's notes on its cgroup: No space left on device"),
        ("place", "the launcher failed: OverflowError"),
    ],
)
def test_a_start_that_cannot_be_noted_fails(wrong: str, why: str) -> None:
    """The next launcher would know nothing of the engine: not whom it runs as, not where it may be tidied."""
    loop = Loop()
    backend = Backend(loop, wrong)
    assert start(loop, backend, StartOrder("a", ("sleep", "1000"), metadata={"model": "m"})) == Failed(why)
    assert all(group.empty() for group in backend.groups)


def test_a_start_that_failed_is_answered_without_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads it for that answer, and reading the journal takes its time."""
    loop = Loop()
    backend = Backend(loop, "launcher.user")
    monkeypatch.setattr(backend.logs, "tail", lambda *_: pytest.fail("its log was read"))
    assert isinstance(start(loop, backend, StartOrder("a", ("sleep", "1000"))), Failed)


@pytest.mark.parametrize(("missing", "known"), [("", True), ("pidfd_open", False), ("open", False)])
def test_an_engine_that_cannot_be_looked_at_is_not_taken_for_one_that_has_ended(
    missing: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that is started anew without a descriptor to spare would end every engine that runs."""
    main = Process(os.getpid())
    group = Group(main, "")
    group.noted = {"launcher.pid": str(main.pid), "launcher.start": str(main.start_time), "launcher.user": "root"}
    killed: list[int] = []
    monkeypatch.setattr(group, "kill", lambda: killed.append(main.pid))
    monkeypatch.setattr(group, "location", lambda: str(found.path.parent) if (found := cgroup_of("self")) else "/")
    loop = Loop()
    backend = Backend(loop, "")
    monkeypatch.setattr(backend, "adopt", lambda: [Found("a", group)])
    supervisor = Supervisor(loop, backend, Users(), lambda report: None)
    with monkeypatch.context() as out:
        if missing:
            out.setattr(os if missing == "pidfd_open" else builtins, missing, full)
        with contextlib.nullcontext() if known else pytest.raises(OSError, match="Too many"):
            supervisor.adopt()
    assert [engine.pid for engine in supervisor.list()] == [main.pid] * known
    assert killed == []
    main.close()


def test_a_failed_start_ends_although_its_processes_cannot_be_killed_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would hear of it, and its name and port would be taken for ever."""
    loop = Loop()
    backend = Backend(loop, "model")
    monkeypatch.setattr(Group, "kill", full)
    order = StartOrder("a", ("sleep", "1000"), metadata={"model": "m"})
    assert start(loop, backend, order) == Failed(
        "cannot write the engine's notes on its cgroup: No space left on device"
    )


def test_the_launchers_notes_are_written_first() -> None:
    """Whatever the metadata is, there is room for them."""
    loop = Loop()
    backend = Backend(loop, "")
    assert isinstance(start(loop, backend, StartOrder("a", ("sleep", "1000"), metadata={"k": "v"})), Started)
    (group,) = backend.groups
    assert list(group.noted) == ["launcher.pid", "launcher.start", "launcher.run_dir", "launcher.user", "k"]


WAITS = (
    "import os, socket, time; link = socket.socket(fileno=int(os.environ['VLLMD_STANDBY_LINK'])); "
    "link.send(b'ready'); link.recv(1 << 20); link.send(b'taken'); time.sleep(1000)"
)


def test_a_standby_is_noted_as_an_engine_when_it_has_taken_the_order(tmp_path: Path) -> None:
    """Before, a launcher that dies leaves a scope without a main process: the next one ends it, and takes no standby
    that waits for ever, or hangs, for an engine that starts."""
    loop = Loop()
    backend = Backend(loop, "")
    answers, noted_before = list[Started | Failed](), list[set[str]]()

    def ready(instance: str, memory: int) -> None:
        backend.groups[0].location = lambda: ""  # type: ignore[method-assign]  # its process leaves it
        os.kill(backend.groups[0].process.pid, signal.SIGSTOP)
        supervisor.start(StartOrder("b", ("x",), run_dir=str(tmp_path / "b"), standby=instance), answered)
        loop.later(0, look)

    def look() -> None:
        if len(backend.groups) < 2 or not backend.groups[1].noted:
            loop.later(0.01, look)
            return
        noted_before.append({*backend.groups[1].noted})
        os.kill(backend.groups[0].process.pid, signal.SIGCONT)

    def answered(answer: Started | Failed) -> None:
        answers.append(answer)
        if len(answers) == 2:
            loop.stop()

    supervisor = Supervisor(loop, backend, Users(), lambda report: None, waiting=ready)
    supervisor.start(StartOrder("s", (sys.executable, "-c", WAITS), waits=True), answered)
    loop.run()
    supervisor.kill_all()
    assert isinstance(answers[1], Started)
    assert answers[1].engine.standby == "s"
    assert noted_before == [{"launcher.run_dir", "launcher.user"}]
    assert {"launcher.pid", "launcher.start"} <= {*backend.groups[1].noted}


def test_a_run_directory_that_is_made_after_its_engines_end_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine made of a standby a child makes it, which may be slower than the end of one that is killed."""
    loop, run_dir = Loop(), tmp_path / "b"
    backend = Backend(loop, "")
    (may_make, go), (made, says_so) = os.pipe(), os.pipe()
    failed: list[Started | Failed] = []

    def prepare_later(order: StartOrder, user: User) -> Process:
        if pid := os.fork():
            return Process(pid)
        os.read(may_make, 1)
        os.mkdir(order.run_dir)
        os.write(says_so, b"x")
        os._exit(0)

    def tidy(path: str, user: User) -> Process:
        child = spawn.tidy(path, user)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        os.write(go, b"x")
        return child

    def ready(instance: str, memory: int) -> None:
        backend.groups[0].location = lambda: ""  # type: ignore[method-assign]  # its process leaves it
        monkeypatch.setattr(engines, "prepare", prepare_later)
        monkeypatch.setattr(engines, "tidy", tidy)
        supervisor.start(StartOrder("b", ("x",), run_dir=str(run_dir), standby=instance), ended)
        supervisor.kill_all()

    def ended(answer: Started | Failed) -> None:
        failed.append(answer)
        loop.later(0, look)

    def look() -> None:
        if supervisor.busy:
            loop.later(0.01, look)
        else:
            loop.stop()

    supervisor = Supervisor(loop, backend, Users(), lambda report: None, waiting=ready)
    supervisor.start(StartOrder("s", (sys.executable, "-c", WAITS), waits=True), lambda answer: None)
    loop.run()
    os.read(made, 1)
    assert isinstance(failed[0], Failed)
    assert not run_dir.exists()


@pytest.mark.parametrize("command", ["/" + "y" * 4000, "/tmp/" + "é" * 900, "/nosuch\x20" * 400])
def test_a_failure_of_any_length_is_the_answer(command: str) -> None:
    """A message that was cut in the pipe could not be read, and the start counted as one that worked."""
    loop = Loop()
    answer = start(loop, Backend(loop, ""), StartOrder("a", (command,)))
    assert isinstance(answer, Failed)
    assert answer.permanent
    assert "/" in answer.message


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"[1, 2]", b'["a", 5]', b"[" * 5000, b"null", b"\xff"])
def test_what_the_child_says_is_not_believed(data: bytes) -> None:
    """It ran as the engine's user by then, whom another process of that user may have got at."""
    assert read_failure(data).permanent is False


def test_a_child_without_a_descriptor_for_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait at its gate, and nobody could signal or reap it; the pipes to it are closed as well."""
    forked: list[int] = []

    def full(pid: int) -> int:
        forked.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(process, "start_time_of", full)
    before = os.listdir("/proc/self/fd")
    with open(os.devnull, "wb") as output, pytest.raises(OSError, match="Too many"):
        spawn.spawn(StartOrder("a", ("/bin/true",)), OURSELVES, output.fileno(), die_with_us=False)
    assert os.listdir("/proc/self/fd") == before
    assert len(forked) == 1 and not os.path.exists(f"/proc/{forked[0]}")


def test_a_service_keeps_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name of their own they are false, but may have a range of ids: engines found again have one of them."""
    loop, users, taken = Loop(), Users(), list[object]()
    monkeypatch.setattr("vllmd.launcher.service.Supervisor", lambda *given: taken.extend(given))
    Service(loop, Backend(loop, ""), (), users=users)
    assert not users and any(each is users for each in taken)


def test_users() -> None:
    """For a user that is not known there is nobody to act as, and nobody is root."""
    assert Users().for_order("") is OURSELVES
    assert Users().from_note("") is OURSELVES
    assert Users().from_note("daemon") is None
    allowed = Users(["daemon", "bin"])
    assert allowed.for_order("").name == "daemon"
    assert allowed.for_order("bin").name == "bin"
    assert allowed.from_note("bin") == allowed.for_order("bin")
    for name in ("", None, "root", "nobody"):
        assert allowed.from_note(name) is None
    with pytest.raises(ValueError, match="'nobody' is not allowed; allowed are: daemon, bin"):
        allowed.for_order("nobody")
    for name, why in (("root", "is root"), ("no-such-user", "there is no user")):
        with pytest.raises(ValueError, match=why):
            Users([name])


# --- every packet has one answer ---

NASTY = [
    b"{", b"[" * 100_000, b"\0", b"9" * 5000, b"\xff\xfe", b"{}" * 2, b" " * 140_000,
    b'{"id":1%s,"type":"List","body":{}}' % (b"0" * 60),
    b'{"id":5,"type":"Kill","body":{"instance":"\\ud800"}}',
    b'{"id":5,"type":"Kill","body":{"instance":"a\\u0000"}}',
    b'{"id":5,"type":"Kill","body":{"instance":"gone"}}',
    b'{"id":5,"type":"Tail","body":{"instance":"gone","lines":1%s}}' % (b"0" * 30),
    b'{"id":5,"type":"Tail","body":{"instance":"gone"}}',
    b'{"id":5,"type":"Follow","body":{"instance":"gone"}}',
    b'{"id":5,"type":"Started","body":{}}',
    b'{"id":5,"type":"Exited","body":{"report":{"instance":"a"}}}',
    b'{"id":5,"type":"%s","body":{}}' % (b"x" * 100_000),
    b'{"id":5,"type":"Start","body":{"order":{"instance":"n-1","argv":["true","\\ud800"]}}}',
    b'{"id":5,"type":"Start","body":{"order":{"instance":"n-2","argv":["true"],"limits":{"cpu_quota":9e18}}}}',
    b'{"id":5,"type":"Start","body":{"order":{"instance":"n-3","argv":["/%s"]}}}' % (b"y" * 5000),
    b'{"id":5,"type":"Start","body":{"order":{"instance":"n-4","argv":["/nosuch"]}}}',
    b'{"id":5,"type":"Start","body":{"order":{"instance":"n-5","argv":["true"],"user":"root"}}}',
    b'{"id":5,"type":"Start","body":{"order":{"instance":"n-6","argv":["true"],"timeout":0.0001}}}',
    b'{"id":5,"type":"Start","body":{"order":{"instance":"n-7","argv":["true"],"cwd":"/%s"}}}' % (b"x" * 5000),
    b'{"id":5,"type":"Annotate","body":{"instance":"gone","metadata":{"a":"\\ud800"}}}',
    b'{"id":5,"type":"Info","body":{}}', b'{"id":5,"type":"List","body":{}}', b'{"id":5,"type":"List","body":[]}',
]  # fmt: skip


def test_every_packet_has_one_answer() -> None:
    """Whatever is in it. One without leaves its sender waiting; one with two answers somebody else's question."""
    loop = Loop()
    backend = Backend(loop, "")
    service = Service(loop, backend, ())
    ours, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    service.serve(child_end, loop.stop)
    ours.setblocking(False)
    answers: list[int] = []

    def take() -> None:
        id, message = decode(ours.recv(1 << 18))
        if type(message).__name__ not in ("Exited", "Logged") and not getattr(message, "more", False):
            answers.append(id)
            after(len(answers))

    def after(number: int) -> None:
        """The next packet, once the last one has been answered; at the end a look for answers too many."""
        if number < len(NASTY):
            ours.send(NASTY[number])
        elif number == len(NASTY):
            loop.later(0.2, lambda: ours.send(b'{"id":77,"type":"Info","body":{}}'))
        else:
            ours.close()

    loop.watch(ours.fileno(), take)
    loop.later(20, loop.stop)
    ours.send(NASTY[0])
    loop.run()
    assert answers == [5 if b'"id":5' in packet else 0 for packet in NASTY] + [77]


def test_a_run_directory_is_swept_when_it_is_seen_without_an_engine_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time it may be that of an order on its way. Its age counts for nothing: clocks are set."""
    monkeypatch.setattr(engines, "FIRST_SWEEP_SECONDS", 0.5)
    (tmp_path / "left").mkdir()
    os.utime(tmp_path / "left", (0, 0))
    loop, looks, told = Loop(), list[bool](), list[ExitReport]()
    users = Users()
    monkeypatch.setattr(users, "all", lambda: (OURSELVES,))
    supervisor = Supervisor(loop, Backend(loop, ""), users, told.append, [str(tmp_path)])
    real = engines.unused

    def look(root: str, kept: Collection[str]) -> set[str]:
        looks.append((tmp_path / "left").exists())
        return real(root, kept)

    def end_when_it_is_gone() -> None:
        if (tmp_path / "left").exists():
            loop.later(0.01, end_when_it_is_gone)
        else:
            loop.stop()

    monkeypatch.setattr(engines, "unused", look)
    supervisor.adopt()
    end_when_it_is_gone()
    loop.run()
    assert looks == [True, True]
