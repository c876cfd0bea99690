"""Secrets that are kept in files or systemd credentials, and keys as digests."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.config.user_home import expanded

LARGEST_BYTES = 64 << 10  # of a file with a secret
DAEMON_GROUP = "vllmd"  # of the system's daemon, see units/vllmd.sysusers


def read(name: str, beside: Path, env: Mapping[str, str]) -> str:
    """The secret in the file that a setting names, see ``place``.

    Raises OSError where it cannot be read, ValueError where it is not one line of text.
    """
    from vllmd.foreign import Folder  # 5 ms that configurations without such files need not pay

    path = place(name, beside, env)
    data = Folder(path.parent).read(path.name, LARGEST_BYTES)
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("the file is not text") from None
    if not text or not text.isprintable():
        raise ValueError("the file is empty" if not text else "the file has more than one line")
    return text


def place(name: str, beside: Path, env: Mapping[str, str]) -> Path:
    """The path of a file that a setting names: in systemd's credentials, absolute, or beside the configuration."""
    path = expanded(name)
    credentials = env.get("CREDENTIALS_DIRECTORY")
    if credentials and not path.is_absolute() and (Path(credentials) / path).exists():
        return Path(credentials) / path
    return path if path.is_absolute() else beside / path


def readable_by_all(file: Path) -> str:
    """What to do about a file with a secret that every user of this machine can read; "" where only some can.

    The daemon must go on reading it: the system's own has a user of its own, and a group that is nobody else's.
    """
    try:
        status = os.stat(file)
    except OSError:
        return ""
    if not status.st_mode & stat.S_IROTH:
        return ""
    if status.st_uid == 0 or file.is_relative_to("/etc"):
        with contextlib.suppress(KeyError):
            grp.getgrnam(DAEMON_GROUP)
            mode = f"chown root:{DAEMON_GROUP} {file} && chmod 640 {file}"
            return f"{mode}, or keep it in a file of its own that has these"
    return f"chmod 600 {file}, or keep it in a file of its own that has this mode"


def digest(key: str) -> str:
    """SHA-256 in hex of a key; a key written as ``sha256:HEX`` is one already. Raises ValueError if that is not hex."""
    if not key.startswith("sha256:"):
        import hashlib  # 5 ms that configurations without keys need not pay

        return hashlib.sha256(key.encode()).hexdigest()
    value = key.removeprefix("sha256:").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("sha256: is followed by 64 hexadecimal digits")
    return value


# ---- secrets in places where they are not looked for: flags, variables, options --------------------------------

SECRET_NAME = r"(?i)key|token|secret|passw|credential|authorization"  # how secrets are mostly called
NOT_ITSELF = r"(?i)(file|path|_env)$|tokens?[_-]|[_-]tokens$|tokenizer"  # where one is, or how many
SHORTEST_CHARS = 6  # a shorter value would be found everywhere in a text


def is_secret_name(name: str) -> bool:
    """Whether a flag, variable or option of this name is likely to hold a secret itself."""
    return bool(re.search(SECRET_NAME, name)) and not re.search(NOT_ITSELF, name)


def flags_without_secrets(argv: Sequence[str], instead: str) -> tuple[str, ...]:
    """The words of a command line, with ``instead`` in place of the values of flags that are named like secrets."""
    words = list(argv)
    for place in _places(argv):
        flag, equals, _ = words[place].partition("=")
        words[place] = f"{flag}={instead}" if words[place].startswith("-") and equals else instead
    return tuple(words)


def _places(argv: Sequence[str]) -> Iterator[int]:
    """The places in a command line of values whose flags are named like secrets, in a word of their own or not."""
    for place, word in enumerate(argv):
        flag, equals, _ = word.partition("=")
        if word.startswith("-") and is_secret_name(flag):
            if equals:
                yield place
            elif place + 1 < len(argv) and not argv[place + 1].startswith("-"):
                yield place + 1


def flags_with_secrets(argv: Sequence[str]) -> list[str]:
    """The flags in a command line whose values are likely to be secrets."""
    return [argv[at if argv[at].startswith("-") else at - 1].partition("=")[0] for at in _places(argv)]


def known_of(model: ModelConfig) -> tuple[str, ...]:
    """The secrets in a model's settings, the longest first, to be kept out of what its engine writes."""
    values = {model.hf_token or ""}
    values |= {value for name, value in model.env.items() if is_secret_name(name)}
    values |= set(_in_options(model.options))
    for argv in (model.command, model.extra_args):
        values |= {word if not (word := argv[at]).startswith("-") else word.partition("=")[2] for at in _places(argv)}
    return tuple(sorted((value for value in values if len(value) >= SHORTEST_CHARS), key=len, reverse=True))


def _in_options(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _in_options(value)
        elif isinstance(value, str) and is_secret_name(str(name)):
            yield value


def kept_out(text: str, known: Iterable[str]) -> str:
    """``text`` with "(hidden)" in place of each known secret."""
    for secret in known:
        text = text.replace(secret, "(hidden)")
    return text
