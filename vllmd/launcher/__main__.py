"""``vllmd-launcher``: argv, backend, loop, exit status.

With systemd it is started by its socket and named the users on its command line;
``--fd`` makes it the private launcher of the process at the other end.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence

from vllmd.launcher.engines import Supervisor
from vllmd.launcher.loop import Callback, Loop
from vllmd.launcher.own_users import OwnUsers
from vllmd.launcher.service import Service, allowed_uids
from vllmd.launcher.sessions import Sessions
from vllmd.launcher.spawn import Users
from vllmd.systemd.activation import take_listeners
from vllmd.systemd.journal import setup_logging
from vllmd.systemd.notify import Notifier
from vllmd.text import make_legible

log = logging.getLogger("vllmd.launcher")
RUN_ROOT = "/run/vllmd-engine"  # where the launcher that is root lets run directories be
END_LIMIT = 10.0  # seconds for the engines of a private launcher to be gone
FAILED_SECONDS = 1.0  # after which systemd tries again what the machine refuses us: descriptors, the bus


def main(argv: Sequence[str] | None = None) -> int:
    """Run until not needed any more. 2 for a wrong command line, 1 where it cannot work."""
    make_legible(sys.stdout, sys.stderr)
    options = _parse(sys.argv[1:] if argv is None else argv)
    setup_logging(options.log_level, identifier="vllmd-launcher")
    try:
        users = Users(options.user, OwnUsers.parse(options.own_users, options.own_homes), options.socket_group)
        if options.fd is None:
            _run_with_systemd(options, users)
        else:
            _run_privately(options, users)
    except (ValueError, OSError) as error:
        log.critical("%s", error)
        if isinstance(error, OSError) and options.fd is None:
            time.sleep(FAILED_SECONDS)
        return 1
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllmd-launcher", description="Starts vllmd's engines and watches over them.")
    parser.add_argument(
        "--user",
        action="append",
        default=[],
        metavar="NAME",
        help="engines may run as this user; may be repeated, the first is the default (needed when started as root)",
    )
    parser.add_argument(
        "--own-users",
        default="",
        metavar="FIRST-LAST",
        help="user ids out of which a model gets one of its own (user: own in vllmd.yaml(5)); without it none does",
    )
    parser.add_argument(
        "--own-homes",
        default="",
        metavar="DIR",
        help="where those users have their homes, which are the record of who has which id",
    )
    parser.add_argument(
        "--socket-group",
        default="",
        metavar="NAME",
        help="the group, which only the daemon is in, of the directories in which run directories and homes are made",
    )
    parser.add_argument(
        "--client-user",
        action="append",
        default=[],
        metavar="NAME",
        help="the daemon's user, who may connect; may be repeated (without it the launcher's own user may; root may "
        "only where it is named)",
    )
    parser.add_argument(
        "--run-root",
        action="append",
        default=[],
        metavar="DIR",
        help="engines' run directories lie beneath it; may be repeated (as root, if it is not given, "
        f"{RUN_ROOT}; else anywhere)",
    )
    parser.add_argument("--user-bus", action="store_true", help="make scopes in the user's own systemd")
    parser.add_argument(
        "--fd",
        type=int,
        metavar="N",
        help="serve this connected socket only, without systemd, and kill every engine when it closes",
    )
    parser.add_argument("--session", default="", metavar="TOKEN", help="with --fd: marks the engines of one daemon")
    parser.add_argument("--no-cgroups", action="store_true", help="with --fd: make no control groups")
    parser.add_argument(
        "--idle-exit", type=float, default=30.0, metavar="SECONDS", help="end after so long with nothing to do"
    )
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser.parse_args(argv)


def _roots(options: argparse.Namespace) -> list[str]:
    """Where run directories may be. Raises ValueError for a path that could not be compared with theirs."""
    for root in options.run_root:
        if not root.startswith("/") or os.path.normpath(root) != root or root == "/":
            raise ValueError(f"--run-root {root} is not an absolute path without '..' and a slash at its end")
    return options.run_root or ([RUN_ROOT] if os.geteuid() == 0 else [])


def _run_with_systemd(options: argparse.Namespace, users: Users) -> None:
    """Scopes; clients by the socket named ``launcher``. Engines outlive us."""
    if os.geteuid() == 0 and not users:
        raise ValueError("started as root: --user NAME must say whom engines run as")
    if os.geteuid() != 0 and users:
        raise ValueError("--user NAME needs root")
    listeners = take_listeners("launcher").get("launcher", [])
    if not listeners:
        raise ValueError("no socket named `launcher` was passed: start vllmd-launcher.socket, or use --fd")
    from vllmd.launcher.orphans import Orphans
    from vllmd.launcher.scopes import Scopes  # pystemd is not needed without systemd

    notifier, loop = Notifier(), Loop()
    backend = Scopes(
        loop, user=options.user_bus, stop_requested=lambda instance: service.supervisor.stop_requested(instance)
    )
    service = Service(
        loop, backend, allowed_uids(options.client_user), options.idle_exit, users=users, roots=_roots(options)
    )
    loop.on_signals(dict.fromkeys((signal.SIGTERM, signal.SIGINT), loop.stop))
    service.supervisor.adopt()
    for listener in listeners:
        service.listen(listener)
    Orphans(loop, backend, service).watch()
    notifier.ready(backend.detail)
    if notifier.watchdog_interval:
        _show_life(notifier, loop, notifier.watchdog_interval)
    loop.run()
    notifier.stopping()


def _show_life(notifier: Notifier, loop: Loop, interval: float) -> None:
    """Tell systemd, now and every so many seconds, that the loop turns: one that hangs is replaced (WatchdogSec=)."""
    notifier.watchdog()
    loop.later(interval, lambda: _show_life(notifier, loop, interval))


def _run_privately(options: argparse.Namespace, users: Users) -> None:
    """Sessions, for one client; nothing outlives its connection."""
    loop = Loop()
    backend = Sessions(loop, token=options.session or str(os.getpid()), use_cgroups=not options.no_cgroups)
    service = Service(loop, backend, (), users=users, roots=options.run_root)
    finish = _finisher(loop, service.supervisor)
    loop.on_signals({signal.SIGTERM: finish, signal.SIGINT: lambda: None, signal.SIGCHLD: backend.reap_orphans})
    service.serve(socket.socket(fileno=options.fd), finish)
    loop.run()
    backend.kill_unmanaged()


def _finisher(loop: Loop, supervisor: Supervisor) -> Callback:
    """Kills all engines and ends when the last one and its run directory are gone, or after ``END_LIMIT``."""

    def finish() -> None:
        loop.later(END_LIMIT, loop.stop)
        supervisor.kill_all()
        wait()

    def wait() -> None:
        if supervisor.busy:
            loop.later(0.01, wait)
        else:
            loop.stop()

    return finish


if __name__ == "__main__":
    sys.exit(main())
