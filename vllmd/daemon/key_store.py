"""API keys that were made with ``vllmctl key``: a file of the daemon's own, beside the keys of the configuration.

A key is 256 random bits, shown once, and kept as its SHA-256. A slow hash such as bcrypt protects passwords, which can
be guessed; nobody guesses 256 bits, and a slow hash would cost every request tens of milliseconds.

A change counts at once. The file is written whole or not at all. A file that cannot be read shuts the door: without it
nobody would know whether keys are needed, and a daemon without keys lets everybody in.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from vllmd.api.answers import KeyLine, Keys, NewKey
from vllmd.config.secrets import digest
from vllmd.config.types import AuthConfig, Config, KeyConfig
from vllmd.daemon.state_files import state_file, write_whole
from vllmd.errors import BadRequest, Conflict, NotFound, Unavailable
from vllmd.frozen import frozen

log = logging.getLogger("vllmd.keys")

PREFIX = "sk-vllmd-"
BITS = 256
MOST_KEYS, LONGEST_KEY_NAME = 10_000, 64
MOST = 2**53  # of a limit
NOT_TOLD = frozenset({"name", "digest"})
NUMBERS = ("concurrency", "requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month",
           "device_seconds_per_day", "device_seconds_per_month", "priority", "share")  # fmt: skip
LISTS = {"scopes": ("models", "read", "admin"), "models": ()}
# Stands for a file that cannot be read: so there are keys, and nobody has one. No SHA-256 is "-".
SHUT = KeyConfig("(unreadable)", "-", scopes=())


@frozen
class StoredKey:
    """One key of the file. ``at``: when it was made, in Unix time."""

    config: KeyConfig
    at: float


class KeyStore:
    """The file; without a path no key can be made."""

    def __init__(
        self,
        path: Path | None,
        configured: Callable[[], AuthConfig] = AuthConfig,
        changed: Callable[[KeyStore], None] = lambda keys: None,
    ) -> None:
        """``configured`` gives the keys of the configuration in force; ``changed`` is called when other keys count."""
        self._path = path
        self._configured = configured
        self._changed = changed
        self._keys: dict[str, StoredKey] = {}
        self._unreadable = ""

    def load(self) -> None:
        """Read the file; none is one without keys."""
        if self._path is None:
            return
        try:
            content = json.loads(self._path.read_text())
            self._keys = {name: _parse_key(name, each) for name, each in dict(content["keys"]).items()}
            self._unreadable = ""
        except FileNotFoundError:
            self._keys = {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._unreadable = f"{self._path} cannot be read ({error}); no key opens anything until that is mended"
            log.error("%s; a reload reads it again", self._unreadable)

    def added_to(self, config: Config) -> Config:
        """The configuration with these keys as well; those of the configuration come first, and win by their names."""
        own = {key.name for key in config.auth.keys}
        more = [made.config for name, made in self._keys.items() if name not in own]
        if self._unreadable:
            more.append(SHUT)
        return replace(config, auth=replace(config.auth, keys=(*config.auth.keys, *more))) if more else config

    # -- what operators ask for

    def list(self) -> Keys:
        """All keys, those of the configuration first."""
        configured = [_line(key, None) for key in self._configured().keys]
        own = {each.name for each in configured}
        return Keys((*configured, *(_line(m.config, m.at) for n, m in self._keys.items() if n not in own)))

    def create(self, name: str, settings: Mapping[str, object]) -> NewKey:
        """Make one. Raises BadRequest, Conflict, Unavailable."""
        if not 0 < len(name) <= LONGEST_KEY_NAME or not name.isprintable() or name != name.strip() or name == "-":
            raise BadRequest(f"name must be 1 to {LONGEST_KEY_NAME} printable characters", param="name")
        *parts, last = name.split("/")
        if "\\" in name or {".", ".."} & {*parts, last} or (parts and last == "limits"):  # no verb's path can have it
            what = "no backslash, and no part '.' or '..' between slashes, nor end in '/limits'"
            raise BadRequest(f"name must have {what}", param="name")
        if name in self._keys or any(key.name == name for key in self._configured().keys):
            raise Conflict(f"there is a key called {name!r} already")
        if len(self._keys) >= MOST_KEYS:
            raise Conflict(f"there are {MOST_KEYS} keys already")
        secret = PREFIX + secrets.token_urlsafe(BITS // 8)
        made = StoredKey(_with(KeyConfig(name, digest(secret)), settings), time.time())
        self._write({**self._keys, name: made})
        log.info("the key %s was made", name)
        return NewKey(name, secret)

    def revoke(self, name: str) -> Keys:
        """Revoke a key, which opens nothing from now on. Raises NotFound, Unavailable."""
        self._parse_key(name)
        self._write({each: made for each, made in self._keys.items() if each != name})
        log.info("the key %s was revoked", name)
        return self.list()

    def limit(self, name: str, settings: Mapping[str, object]) -> KeyLine:
        """Change the settings of a key that are named; null takes a limit away.

        Raises NotFound, BadRequest, Unavailable.
        """
        made = self._parse_key(name)
        changed = replace(made, config=_with(made.config, settings))
        self._write({**self._keys, name: changed})
        return _line(changed.config, changed.at)

    def _parse_key(self, name: str) -> StoredKey:
        if name in self._keys:
            return self._keys[name]
        if any(key.name == name for key in self._configured().keys):
            raise NotFound(f"the key {name!r} is in the configuration: change it there, then vllmctl reload")
        raise NotFound(f"there is no key called {name!r}")

    def _write(self, keys: dict[str, StoredKey]) -> None:
        """Replace the file; it is small and seldom written, so the event loop waits for it.

        Raises Unavailable, Conflict.
        """
        if self._path is None:
            raise Conflict("this daemon has no state folder to keep keys in; add them to auth.keys")
        if self._unreadable:
            raise Unavailable(self._unreadable)
        text = json.dumps({"keys": {name: _key_as_json(made) for name, made in keys.items()}}, indent=1)
        try:
            write_whole(self._path, text)
        except OSError as error:
            raise Unavailable(f"keys cannot be kept in {self._path}: {error.strerror}; nothing changed") from None
        self._keys = keys
        self._changed(self)


def _with(key: KeyConfig, settings: Mapping[str, object]) -> KeyConfig:
    """The key with these settings. Raises BadRequest."""
    changes: dict[str, object] = {}
    defaults = {each.name: each.default for each in fields(KeyConfig)}
    for name, value in settings.items():
        if name in LISTS:
            among = LISTS[name]
            if not isinstance(value, list) or not all(
                isinstance(each, str) and each and (not among or each in among) for each in value
            ):
                accepted = f" of {', '.join(among)}" if among else " of names"
                raise BadRequest(f"{name} must be a list{accepted}", param=name)
            changes[name] = tuple(value)
        elif name in NUMBERS:
            least = 0 if name == "priority" else 1
            if value is None:
                changes[name] = defaults[name]
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
                raise BadRequest(f"{name} must be a whole number, {least} or more, or null for none", param=name)
            changes[name] = value
        else:
            known = ", ".join((*LISTS, *NUMBERS))
            raise BadRequest(f"a key has no setting {name!r}; there are {known}", param=name)
    if "scopes" in changes and not changes["scopes"]:
        raise BadRequest("a key without a scope opens nothing", param="scopes")
    return replace(key, **changes)  # type: ignore[arg-type]


def _settings(key: KeyConfig) -> dict[str, object]:
    """The settings of a key that are not the default, but its name and digest."""
    changed: dict[str, object] = {}
    for each in fields(KeyConfig):
        value = getattr(key, each.name)
        if each.name not in NOT_TOLD and value != each.default:
            changed[each.name] = list(value) if isinstance(value, tuple) else value
    return changed


def _line(key: KeyConfig, at: float | None) -> KeyLine:
    return KeyLine(key.name, key.scopes, key.models, at is None, at, _settings(key))


def _key_as_json(made: StoredKey) -> dict[str, object]:
    return {"digest": made.config.digest, "at": made.at, **_settings(made.config)}


def _parse_key(name: str, content: Mapping[str, object]) -> StoredKey:
    """A key as read from the file. Raises ValueError, KeyError, TypeError for anything else."""
    settings = {key: value for key, value in content.items() if key not in ("digest", "at")}
    hexed = digest(f"sha256:{content['digest']}")
    try:
        config = _with(KeyConfig(str(name), hexed), settings)
    except BadRequest as error:
        raise ValueError(f"the key {name!r}: {error.message}") from None
    return StoredKey(config, float(str(content["at"])))


def key_store_path(environment: Mapping[str, str], home: Path | None) -> Path | None:
    """Where the file is, see ``state_file``; VLLMD_KEYS may say another place."""
    return state_file(environment, home, "VLLMD_KEYS", "keys/keys.json")
