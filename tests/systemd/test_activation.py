"""The listeners that systemd passes are found by name and kept from children."""

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from vllmd.systemd.activation import take_listeners


@pytest.fixture
def passed():
    """Three listeners on consecutive descriptors, inheritable and blocking, as systemd leaves them."""
    first, opened = 100, []
    for fd in range(first, first + 3):
        sock = socket.create_server(("127.0.0.1", 0))
        os.dup2(sock.fileno(), fd, inheritable=True)
        sock.close()
        opened.append(fd)
    yield first
    for fd in opened:
        with contextlib.suppress(OSError):  # the test may have taken it and closed it
            os.close(fd)


def environment(count, names):
    """The variables that a manager sets for this process."""
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "PATH": "/bin"}


def test_several_sockets_share_a_name(passed):
    """One .socket unit with two ListenStream lines gives two descriptors of one name."""
    env = environment(3, "http:http:admin")
    listeners = take_listeners(environ=env, first_fd=passed)
    assert {name: [sock.fileno() for sock in socks] for name, socks in listeners.items()} == {
        "http": [passed, passed + 1],
        "admin": [passed + 2],
    }
    for sock in listeners["http"] + listeners["admin"]:
        assert not os.get_inheritable(sock.fileno())
        assert not sock.getblocking()
        sock.close()
    assert env == {"PATH": "/bin"}


@pytest.mark.parametrize("names", ["", "unknown:unknown", "http"])
def test_a_passer_without_names_is_tolerated(passed, names):
    """systemd-socket-activate without --fdname names nothing; the default name stands in."""
    listeners = take_listeners("http", environment(2, names), passed)
    assert [sock.fileno() for sock in listeners["http"]] == [passed, passed + 1]
    for sock in listeners["http"]:
        sock.close()


@pytest.mark.parametrize(
    "change", [{"LISTEN_PID": "1"}, {"LISTEN_FDS": "two"}, {"LISTEN_FDS": ""}], ids=["other", "word", "none"]
)
def test_sockets_meant_for_another_are_left_alone(passed, change):
    """The variables may be inherited from a parent: the pid says whom they are for."""
    env = environment(3, "http:http:admin") | change
    assert take_listeners(environ=env, first_fd=passed) == {}
    assert env == {"PATH": "/bin"}


def test_systemd_socket_activate_passes_a_listener(tmp_path):
    """The real tool, which does without a manager, hands a socket to a real process."""
    path = tmp_path / "s"
    script = (
        "from vllmd.systemd.activation import take_listeners as t; s = t('http');"
        "c, _ = (s['http'][0].setblocking(True), s['http'][0].accept())[1]; c.sendall(','.join(s).encode())"
    )
    listen = ["systemd-socket-activate", f"--listen={path}", "-E", f"PYTHONPATH={os.getcwd()}"]
    activate = subprocess.Popen(
        [*listen, sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert activate.stderr is not None
    assert "Listening" in activate.stderr.readline()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert client.recv(100) == b"http"
    assert activate.wait(120) == 0
    activate.stderr.close()
