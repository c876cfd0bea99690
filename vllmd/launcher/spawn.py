"""Fork a child that drops its privileges, waits at a gate, and executes the engine when the gate opens.

The gate is a pipe: the letter G opens it; its end (the launcher died, or gave up) means exit. An error in the child
comes back as text through a second pipe, which a successful exec closes.

Everything in the engine's directories is done by the child as the engine's user, never by the launcher as root: that
user could put a link there at any time. Between fork and exec only the child's own thread exists, and no lock of
another one can be held, because the launcher has no other threads.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import pwd
import resource
import signal
import stat
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from vllmd.frozen import frozen
from vllmd.launcher import shared_memory
from vllmd.launcher.affinity import set_affinity
from vllmd.launcher.own_users import PREFIX, OwnUsers
from vllmd.launcher.process import PR_SET_PDEATHSIG, Process, prctl
from vllmd.launcher.protocol import Failed, StartOrder, clip
from vllmd.text import printable

MARKER = "VLLMD_INSTANCE"
LINK = "VLLMD_STANDBY_LINK"  # the descriptor of a standby's end of the pair of sockets
NOT_DONE = 1  # status of a child that failed
AGAIN = 75  # status of a child that failed because the disk is read-only now (EX_TEMPFAIL)
KEY_FILE = "vllmd-key.yaml"  # written by an engine's command, see engines/sglang.py
LAST_SYSTEM_USER = 999  # by systemd and all distributions; above it are people, and models' own users
PATH = "/usr/local/bin:/usr/bin:/bin"
_PERMANENT = {errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.E2BIG, errno.EISDIR, errno.ELOOP}
_PERMANENT |= {errno.ENAMETOOLONG, errno.EINVAL}
MAX_ERROR_CHARACTERS = 600  # as JSON they fit a pipe's page, which is written and read in one piece
# Variables of the launcher's own, from its service manager or its daemon, which no engine gets.
_OURS = (
    "LISTEN_",
    "NOTIFY_",
    "WATCHDOG_",
    "JOURNAL_",
    "MAINPID",
    "INVOCATION_ID",
    "SYSTEMD_",
    "VLLMD_",
    "MEMORY_",
)


@frozen
class User:
    """The user that an engine runs as. ``name``: as in orders and notes. ``ours``: the launcher's own user.

    ``sockets``: the group of the folders in which run directories and homes are made, which only the daemon has
    beside the launcher; None for none. ``makes_home``: the home is made at the user's first start.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    ours: bool = False
    sockets: int | None = None
    makes_home: bool = False

    @classmethod
    def named(cls, name: str, sockets: int | None = None) -> User:
        """Raises KeyError if there is no such user."""
        entry = pwd.getpwnam(name)
        groups = tuple(os.getgrouplist(name, entry.pw_gid))
        return cls(name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir, sockets=sockets)


OURSELVES = User("", os.getuid(), os.getgid(), (), "", ours=True)


class Users:
    """The users that engines may run as: those named on the command line, models' own users, or the launcher's user.

    Every fork of the launcher gets its ``User`` from here. For a name that is not allowed there is none, so nothing can
    be done as root for an engine whose user is not known.
    """

    def __init__(self, names: Sequence[str] = (), own: OwnUsers | None = None, socket_group: str = "") -> None:
        """Raises ValueError, with a message for operators, for a user or a group that does not exist, or is root."""
        self._allowed: dict[str, User] = {}
        self._own = own
        self._sockets = _group(socket_group)
        for name in names:
            try:
                self._allowed[name] = User.named(name, self._sockets)
            except KeyError:
                raise ValueError(f"there is no user {name!r}") from None
            if self._allowed[name].uid == 0 or self._allowed[name].gid == 0:
                raise ValueError(f"{name!r} is root, or in root's group: engines are never run as that")
        self._default = next(iter(self._allowed.values()), OURSELVES)

    def __bool__(self) -> bool:
        return bool(self._allowed)

    def for_order(self, name: str) -> User:
        """The user that an order names; "" is the first one. Raises ValueError for one that is not allowed."""
        if not name:
            return self._default
        if name.startswith(PREFIX):
            if self._own is None or not self._allowed:
                raise ValueError("no model can have a user of its own here: the launcher has no --own-users")
            return self._own_user(name, self._own.allocate(name.removeprefix(PREFIX)))
        if name not in self._allowed:
            raise ValueError(f"user {name!r} is not allowed; allowed are: {', '.join(self._allowed) or 'none'}")
        return self._allowed[name]

    def all(self) -> tuple[User, ...]:
        """The users named on the command line, and models' own users so far."""
        own = self._own.all() if self._own else {}
        return (*self._allowed.values(), *(self._own_user(PREFIX + name, uid) for name, uid in own.items()))

    def from_note(self, name: str | None) -> User | None:
        """The user in a launcher's note on an engine's cgroup; None for one that is not allowed, and without a note."""
        if name == OURSELVES.name and not self._allowed:
            return OURSELVES
        if name and name.startswith(PREFIX):
            number = self._own.find(name.removeprefix(PREFIX)) if self._own else None
            return None if number is None else self._own_user(name, number)
        return self._allowed.get(name or "")

    def _own_user(self, name: str, number: int) -> User:
        """A model's own user. It has the default user's supplementary groups, which give access to devices."""
        assert self._own
        groups = tuple(group for group in self._default.groups if group != self._default.gid)
        home = self._own.home(name.removeprefix(PREFIX))
        return User(name, number, number, groups, home, sockets=self._sockets, makes_home=True)


def _group(name: str) -> int | None:
    """The id of a group, None for "". Raises ValueError for a group that does not exist, or is root's."""
    if not name:
        return None
    try:
        number = grp.getgrnam(name).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {name!r}") from None
    if number == 0:
        raise ValueError("engines' run directories are never of root's group")
    return number


@frozen
class Child:
    """A child at its gate. ``errors`` is the pipe for its error; the caller closes both descriptors."""

    process: Process
    gate: int
    errors: int


def spawn(order: StartOrder, user: User, output: int, *, die_with_us: bool, link: int | None = None) -> Child:
    """Fork a child that becomes ``user``, writes to ``output``, and waits at its gate. Raises OSError.

    ``link``: a descriptor that its command inherits, and finds in the variable ``LINK``.
    """
    gate_reader, gate_writer = os.pipe()
    try:
        error_reader, error_writer = os.pipe()
    except OSError:
        os.close(gate_reader)
        os.close(gate_writer)
        raise
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become_engine(order, user, (gate_reader, error_writer, output, link), die_with_us)
        child = _held(pid)
    except OSError:
        os.close(gate_writer)
        os.close(error_reader)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(gate_reader)
        os.close(error_writer)
    os.set_blocking(error_reader, False)
    return Child(child, gate_writer, error_reader)


def _held(pid: int) -> Process:
    """The child just forked, by its pidfd. If there is no descriptor for it, it is killed, and OSError raised."""
    try:
        return Process(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def prepare(order: StartOrder, user: User) -> Process:
    """Fork a child that, as the engine's user, makes the run directory and the home. It ends with status 0 if it could.

    For an engine that is made of a standby; others do it themselves (``spawn``). Raises OSError.
    """
    return _in_child(user, lambda: _prepare_folders(order, user))


def tidy(run_dir: str, user: User) -> Process:
    """Fork a child that, as the engine's user, removes the sockets, the key and then the empty run directory.

    Other files stay, and the directory with them: it may have been one with data in it. With a user who is there for
    engines alone the shared memory that they have left goes, too: last, for looking at a process that a driver holds
    may not return. Raises OSError.
    """

    def tidied() -> None:
        try:
            _empty(run_dir)
        finally:
            _free_shared_memory(user)

    return _in_child(user, tidied)


def unused(root: str, kept: Collection[str]) -> set[str]:
    """The paths of the directories in ``root`` whose names are not in ``kept``. Raises OSError."""
    return {entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False) and entry.name not in kept}


def sweep(run_dirs: Collection[str], user: User) -> Process | None:
    """Fork a child that, as ``user``, removes those of the run directories that belong to that user.

    They stay behind when an engine ends while there is no launcher. None if there is nothing to do. Raises OSError.
    """
    own = []
    for path in run_dirs:
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_uid == user.uid:
                own.append(path)

    def empty_all() -> None:
        for path in own:
            with contextlib.suppress(OSError):
                _empty(path)
        _free_shared_memory(user)

    return _in_child(user, empty_all) if own else None


def _in_child(user: User, work: Callable[[], None]) -> Process:
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            _reset_signals()
            _become(user, keeping=True)
            work()
        except OSError as error:
            status = AGAIN if error.errno == errno.EROFS else NOT_DONE
        finally:
            os._exit(status)
    return _held(pid)


def _free_shared_memory(user: User) -> None:
    """Remove what engines have left in /dev/shm; not of a person, whose other programs may have left it to be found."""
    if not user.ours and (user.makes_home or user.uid <= LAST_SYSTEM_USER):
        with contextlib.suppress(OSError):
            shared_memory.remove_unused()


def _empty(run_dir: str) -> None:
    for entry in os.scandir(run_dir):
        if stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode) or entry.name == KEY_FILE:
            os.unlink(entry.path)
    os.rmdir(run_dir)


def read_failure(data: bytes) -> Failed:
    """The error that a child wrote into its pipe. It ran as the engine's user, so the bytes are not trusted."""
    try:
        message, permanent = json.loads(data)
    except (ValueError, TypeError, RecursionError):
        return Failed("the process failed before the command was executed, and its error cannot be read")
    return Failed(printable(str(message)[:MAX_ERROR_CHARACTERS]), permanent is True)


# --- in the child ---


def _become_engine(order: StartOrder, user: User, fds: tuple[int, int, int, int | None], die_with_us: bool) -> NoReturn:
    gate, errors, output, link = fds
    try:
        # 1. A process of its own: signals, session, descriptors.
        _reset_signals()
        if die_with_us:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        os.setsid()
        _redirect(output, keep={gate, errors} | ({link} if link is not None else set()))
        # 2. The engine's user, its directories, as many open files as are allowed.
        _become(user, lambda: _prepare_folders(order, user))
        if order.cwd or order.run_dir:
            os.chdir(order.cwd or order.run_dir)
        hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
        # 3. The gate, which opens when the process is in its scope. Being moved there resets its CPUs, so those are set
        #    only now.
        if os.read(gate, 1) != b"G":
            os._exit(125)
        set_affinity(order.cpus, order.node)
        # 4. The command.
        env = environment(order, user)
        if link is not None:
            os.set_inheritable(link, True)
            env[LINK] = str(link)
        try:
            os.execvpe(order.argv[0], order.argv, env)
        except OSError as error:  # without its file name, which is that of the last folder of PATH
            raise OSError(error.errno, error.strerror) from None
    except BaseException as error:
        permanent = isinstance(error, OSError) and error.errno in _PERMANENT
        os.write(errors, json.dumps([_describe(order, user, error)[:MAX_ERROR_CHARACTERS], permanent]).encode())
    finally:
        os._exit(127)


def _reset_signals() -> None:
    """Restore the defaults. The launcher's handlers would write into its wake-up pipe; ignored signals stay ignored."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _redirect(output: int, keep: set[int]) -> None:
    """stdin from /dev/null, stdout and stderr to ``output``; all others are closed, such as other children's gates."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((output, 1), (output, 2), (null, 0)):
        os.dup2(source, target)
    low = 3
    for fd in (*sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        os.closerange(low, fd)
        low = fd + 1


def _become(user: User, prepare: Callable[[], None] = lambda: None, *, keeping: bool = False) -> None:
    """Become the user, for good. ``keeping``: keep the group of sockets, for a child that does not exec.

    ``prepare`` is called as that user already, so that root follows no link in one of the user's folders, but with the
    group of sockets, which lets it make and remove its own files beside those of other users, and not touch theirs.
    """
    if user.ours:
        prepare()
        return
    more = () if user.sockets is None else (user.sockets,)
    os.setgroups((*user.groups, *more))
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(-1, user.uid, -1)  # the effective id alone: root comes back after ``prepare``
    prepare()
    os.setresuid(-1, 0, -1)
    if not keeping:
        os.setgroups(user.groups)
    os.setresuid(user.uid, user.uid, user.uid)


def _prepare_folders(order: StartOrder, user: User) -> None:
    os.umask(0o007)
    if user.makes_home:
        with contextlib.suppress(FileExistsError):
            os.mkdir(user.home, 0o750)
        if os.stat(user.home, follow_symlinks=False).st_uid != user.uid:
            raise PermissionError(errno.EPERM, "it belongs to another user", user.home)
    if order.run_dir:
        os.makedirs(order.run_dir, mode=0o750, exist_ok=True)
    if order.listen_uds:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(order.listen_uds)


def _describe(order: StartOrder, user: User, error: BaseException) -> str:
    """The error of a start, for operators: which command or folder, and what to do."""
    command = clip(order.argv[0], MAX_ERROR_CHARACTERS // 3)
    if not isinstance(error, OSError):
        return f"{command} could not be started: {error!r}"
    root = os.path.dirname(order.run_dir)
    if order.run_dir and not user.ours and not os.path.isdir(root):
        return f"{command} could not be started: there is no {root}; `systemd-tmpfiles --create` makes it"
    if error.filename is not None:  # a folder or a socket, from _prepare_folders
        return f"{command} could not be started: {error.strerror}: {error.filename}"
    if error.errno == errno.ENOENT and "/" not in command:
        path = environment(order, user).get("PATH", PATH)
        return f"there is no command {command!r}: looked in {path}; install it, or give the full path as `command`"
    if error.errno == errno.ENOENT and os.path.exists(order.argv[0]):
        return f"{command} cannot be executed: the interpreter that its first line names does not exist"
    if error.errno == errno.ENOENT:
        return f"there is no command {command}"
    return f"{command} cannot be executed: {error.strerror}"


def environment(order: StartOrder, user: User) -> dict[str, str]:
    """The order's variables over a clean base, or over the launcher's own environment if the user stays the same."""
    login = user.name.removeprefix(PREFIX)
    if not user.ours:
        base = {"PATH": PATH, "HOME": user.home, "USER": login, "LOGNAME": login, "SHELL": "/bin/sh"}
    else:
        base = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return {"LANG": "C.UTF-8", **base, **order.env, MARKER: order.instance}
