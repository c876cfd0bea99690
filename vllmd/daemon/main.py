"""argv -> configuration -> listeners -> Daemon -> exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllmd.config.loader import load
from vllmd.config.types import Config
from vllmd.config.user_home import user_home
from vllmd.daemon import collector, identity
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon.disabled import disabled_path
from vllmd.daemon.event_loop import name_of, new_loop
from vllmd.daemon.key_store import key_store_path
from vllmd.daemon.listen import Listeners, in_words, listeners
from vllmd.daemon.private_folder import private_folder
from vllmd.daemon.records import store_path
from vllmd.daemon.service import Daemon, for_this_host
from vllmd.errors import ConfigError
from vllmd.systemd.activation import take_listeners
from vllmd.systemd.journal import setup_logging
from vllmd.text import make_legible

log = logging.getLogger("vllmd")

WANTED_FILES = 65536
EX_UNAVAILABLE, EX_SOFTWARE, EX_CONFIG = 69, 70, 78


def main(argv: list[str] | None = None) -> int:
    """Run vllmd; returns an exit status of sysexits(3)."""
    make_legible(sys.stdout, sys.stderr)
    file, check_only, overrides = _arguments(sys.argv[1:] if argv is None else argv)
    given_sockets = take_listeners()
    config, broken = Config(), ""
    try:
        with collector.paused():
            config = load(file, os.environ, overrides, strict=check_only)
            collector.exempt_existing()
    except ConfigError as error:
        broken = error.message
    if check_only and not broken:
        from vllmd.config.as_daemon import problems_of_daemon  # of a check only

        broken = "\n".join(map(str, problems_of_daemon(file, os.environ)))
    if broken and (check_only or not given_sockets):
        print(broken, file=sys.stderr)
        return EX_CONFIG
    if check_only:
        from vllmd.daemon.check import check  # imported by nothing else, so that a start does not wait for it

        return check(config, os.environ)
    setup_logging(config.log_level)
    with contextlib.suppress(ValueError, OSError):  # clients' prompts and keys are in our memory
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for warning in config.warnings:
        log.warning("%s", warning)
    first = [config]
    del config
    return _serve(first, broken, given_sockets, lambda: load(file, os.environ, overrides))


def _arguments(given: Sequence[str]) -> tuple[Path | None, bool, Mapping[str, str]]:
    """The configuration file, whether it is only to be checked, and settings by their paths."""
    if not given:  # as systemd starts it
        return None, False, {}
    from vllmd.daemon import command_line  # the parser, with help for all flags, takes as long as the configuration

    return command_line.arguments(given)


def _serve(first: list[Config], broken: str, given: Listeners, reload: Any) -> int:
    """Listen, and run the daemon, which takes the configuration out of ``first``. Returns an exit status.

    Nobody else keeps it: what a reload replaces is freed, which of ten thousand models is megabytes.
    With a broken configuration every client gets an error, and a reload repairs it: exit statuses would soon make
    systemd close the sockets for good.
    """

    async def live(around: RuntimeEnvironment) -> int:
        log.info("the event loop is %s", name_of(asyncio.get_running_loop()))
        daemon = Daemon(await for_this_host(first.pop(), around), around, reload, sockets, broken)
        await daemon.run()
        return EX_SOFTWARE if daemon.failed else 0

    if broken:
        log.error("the configuration is invalid, every request is answered with this:\n%s", broken)
    _raise_file_limit()
    server = first[0].server
    with contextlib.ExitStack() as stack:
        try:
            owner = identity.given(first[0])
        except OSError as error:
            print(f"cannot run as {server.user}: {error}", file=sys.stderr)
            return EX_CONFIG
        try:
            sockets = given or stack.enter_context(listeners(server.listen, os.environ, owner))
        except OSError as error:
            print(f"cannot listen on {error.strerror}", file=sys.stderr)
            return EX_UNAVAILABLE
        log.info("listening on %s", in_words(sockets))
        identity.become(first[0], os.environ, activated=bool(given))
        try:
            around = stack.enter_context(runtime(os.environ, activated=bool(given)))
        except ConfigError as error:
            print(error.message, file=sys.stderr)
            return EX_CONFIG
        with asyncio.Runner(loop_factory=lambda: new_loop(server.event_loop)) as runner:
            return runner.run(live(around))


def _raise_file_limit() -> None:
    """Raise the soft limit of open files: a client takes two; the usual 1024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def learnt_of(environment: Mapping[str, str]) -> Path | None:
    """The file in which a daemon without a unit keeps learnt figures for the next ``vllmd serve``.

    In the user's cache, or where ``VLLMD_LEARNT`` says; None where that is empty, and for a user without a home:
    nothing is kept.
    """
    if "VLLMD_LEARNT" in environment:
        return Path(environment["VLLMD_LEARNT"]) if environment["VLLMD_LEARNT"] else None
    home = user_home(environment)
    cache = environment.get("XDG_CACHE_HOME") or (home and home / ".cache")
    return Path(cache) / "vllmd" / "learnt.json" if cache else None


@contextlib.contextmanager
def runtime(environment: Mapping[str, str], *, activated: bool) -> Iterator[RuntimeEnvironment]:
    """What the unit file sets by environment variables; without a run directory a private one, while this lasts."""
    home, cache = environment.get("VLLMD_ENGINE_HOME", ""), environment.get("CACHE_DIRECTORY", "").split(":")[0]
    with contextlib.ExitStack() as stack:
        given = environment.get("VLLMD_ENGINE_RUN_DIR")
        run_dir = stack.enter_context(private_folder()) if given is None else Path(given)
        yield RuntimeEnvironment(
            launcher=environment.get("VLLMD_LAUNCHER", ""),
            run_dir=run_dir,
            home=Path(home) if home else None,
            homes=Path(environment["VLLMD_ENGINE_HOMES"]) if environment.get("VLLMD_ENGINE_HOMES") else None,
            cache=Path(cache) if cache else None,
            learnt=Path(cache) / "learnt.json" if cache else learnt_of(environment),
            sessions=Path(cache) / "sessions.json" if cache else None,
            keys=key_store_path(environment, user_home(environment)),
            disabled=disabled_path(environment, user_home(environment)),
            usage=store_path(environment, user_home(environment)),
            logs=_logs(environment),
            activated=activated,
            environment=environment,
        )


def _logs(environment: Mapping[str, str]) -> Path:
    """Where engines' log files go: the unit's LogsDirectory=, else the user's state folder."""
    given = environment.get("LOGS_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    state = environment.get("XDG_STATE_HOME")
    if not state:
        import tempfile  # most daemons need none

        state = f"{user_home(environment) or tempfile.gettempdir()}/.local/state"
    return Path(state) / "vllmd" / "log"
