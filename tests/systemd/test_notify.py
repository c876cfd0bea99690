"""What the service says to its manager, and that it is silent without one."""

import os
import socket

import pytest

from vllmd.systemd.notify import Notifier


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """The manager's end of the notification socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield sock
    sock.close()


def test_each_call_is_one_datagram(manager):
    """The manager reads assignments, one per line."""
    notifier = Notifier()
    notifier.ready("2 models")
    notifier.status("loading\nREADY=1")
    notifier.extend_timeout(1.5)
    notifier.stopping()
    said = [manager.recv(1000).decode() for _ in range(4)]
    assert said == ["READY=1\nSTATUS=2 models", "STATUS=loading READY=1", "EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1"]


def test_a_reload_is_stamped(manager):
    """Type=notify-reload wants the monotonic time, so that an old READY=1 is not taken for the new one."""
    Notifier().reloading()
    first, second = manager.recv(1000).decode().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def test_nobody_waits_for_a_manager_that_does_not_read(manager):
    """PID 1 may be stopped for long: the event loop goes on, and what does not fit the queue is lost."""
    notifier = Notifier()
    for _ in range(10_000):
        notifier.watchdog()
    assert manager.recv(1000) == b"WATCHDOG=1"


def test_silent_without_a_manager(monkeypatch):
    """Started by hand, there is nobody to tell."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.ready("nobody listens")
    assert not notifier.enabled
    assert notifier.watchdog_interval is None


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [("30000000", None, 15), ("30000000", "self", 15), ("30000000", "1", None), ("0", None, None), ("x", None, None)],
)
def test_watchdog_interval(monkeypatch, usec, pid, interval):
    """Half the limit, and only if the watchdog is meant for this process."""
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "self" else pid)
    assert Notifier().watchdog_interval == interval
    assert "WATCHDOG_USEC" not in os.environ
