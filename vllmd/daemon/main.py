"""argv -> configuration -> listeners -> Daemon -> exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import vllmd
from vllmd.config.loader import load
from vllmd.config.settings import flags
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
EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE, EX_CONFIG = 64, 69, 70, 78


def main(argv: list[str] | None = None) -> int:
    """Run vllmd; returns an exit status of sysexits(3)."""
    make_legible(sys.stdout, sys.stderr)
    arguments = _parser().parse_args(argv)
    given = {leaf.path: getattr(arguments, flag.lstrip("-").replace("-", "_")) for flag, leaf in flags().items()}
    overrides = {path: value for path, value in given.items() if value is not None}
    given_sockets = take_listeners()
    config, broken = Config(), ""
    try:
        with collector.paused():
            config = load(arguments.config, os.environ, overrides, strict=arguments.check)
            collector.exempt_existing()
    except ConfigError as error:
        broken = error.message
    if arguments.check and not broken:
        from vllmd.config.as_daemon import problems_of_daemon  # of a check only

        broken = "\n".join(map(str, problems_of_daemon(arguments.config, os.environ)))
    if broken and (arguments.check or not given_sockets):
        print(broken, file=sys.stderr)
        return EX_CONFIG
    if arguments.check:
        from vllmd.daemon.check import check  # imported by nothing else, so that a start does not wait for it

        return check(config, os.environ)
    setup_logging(config.log_level)
    with contextlib.suppress(ValueError, OSError):  # clients' prompts and keys are in our memory
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for warning in config.warnings:
        log.warning("%s", warning)
    return _serve(config, broken, given_sockets, lambda: load(arguments.config, os.environ, overrides))


def _serve(config: Config, broken: str, given: Listeners, reload: Any) -> int:
    """Listen, and run the daemon. Returns an exit status.

    With a broken configuration every client gets an error, and a reload repairs it: exit statuses would soon make
    systemd close the sockets for good.
    """

    async def live(around: RuntimeEnvironment) -> int:
        log.info("the event loop is %s", name_of(asyncio.get_running_loop()))
        daemon = Daemon(await for_this_host(config, around), around, reload, sockets, broken)
        await daemon.run()
        return EX_SOFTWARE if daemon.failed else 0

    if broken:
        log.error("the configuration is invalid, every request is answered with this:\n%s", broken)
    _raise_file_limit()
    with contextlib.ExitStack() as stack:
        try:
            owner = identity.given(config)
        except OSError as error:
            print(f"cannot run as {config.server.user}: {error}", file=sys.stderr)
            return EX_CONFIG
        try:
            sockets = given or stack.enter_context(listeners(config.server.listen, os.environ, owner))
        except OSError as error:
            print(f"cannot listen on {error.strerror}", file=sys.stderr)
            return EX_UNAVAILABLE
        log.info("listening on %s", in_words(sockets))
        identity.become(config, os.environ, activated=bool(given))
        try:
            around = stack.enter_context(runtime(os.environ, activated=bool(given)))
        except ConfigError as error:
            print(error.message, file=sys.stderr)
            return EX_CONFIG
        with asyncio.Runner(loop_factory=lambda: new_loop(config.server.event_loop)) as runner:
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


class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage ends with EX_USAGE."""

    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"{self.prog}: {message}\n{self.format_usage()}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("vllmd", description="A shared model server for the GPUs of this machine.")
    parser.add_argument("verb", nargs="?", choices=["serve"], help="serve is what it does anyway")
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of the standard places, see vllmd.yaml(5)")
    parser.add_argument("--check", action="store_true", help="say whether the configuration is valid, and exit")
    parser.add_argument("--version", action="version", version=f"vllmd {vllmd.__version__}")
    for flag, leaf in flags().items():
        parser.add_argument(flag, help=leaf.row.doc)
    return parser
