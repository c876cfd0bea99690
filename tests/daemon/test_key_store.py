"""Keys that are made while the daemon runs: shown once, kept hashed, in force at once; a file that is broken shuts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vllmd.config.secrets import digest
from vllmd.config.types import AuthConfig, Config, KeyConfig
from vllmd.daemon.key_store import SHUT, KeyStore, key_store_path
from vllmd.errors import BadRequest, Conflict, NotFound, Unavailable

CONFIG = Config(auth=AuthConfig((KeyConfig("own", digest("x"), tokens_per_day=5),)))


def store(
    path: Path | None, config: Config = CONFIG, changed: Callable[[KeyStore], None] = lambda keys: None
) -> KeyStore:
    found = KeyStore(path, lambda: config.auth, changed)
    found.load()
    return found


def test_a_key_is_shown_once_and_counts_at_once(tmp_path: Path) -> None:
    """What is kept opens nothing for whoever reads it, and nobody but the daemon does."""
    changes: list[int] = []
    path = tmp_path / "keys" / "keys.json"
    keys = store(path, changed=lambda keys: changes.append(len(keys.added_to(CONFIG).auth.keys)))
    made = keys.create("alice", {"models": ["small"], "tokens_per_month": 1000})
    assert len(made.key) > 50
    assert changes == [2]
    text = path.read_text()
    assert made.key not in text
    assert digest(made.key) in text
    assert os.stat(path).st_mode & 0o777 == 0o600
    for each in (keys, store(path)):  # and the next daemon's
        alice = each.added_to(CONFIG).auth.keys[1]
        assert alice == KeyConfig("alice", digest(made.key), models=("small",), tokens_per_month=1000)
    assert [(line.name, line.configured) for line in keys.list().keys] == [("own", True), ("alice", False)]
    assert made.key not in repr(keys.list())


def test_limits_change_and_keys_are_revoked(tmp_path: Path) -> None:
    """What is not named stays; null takes a limit away."""
    keys = store(tmp_path / "keys.json")
    keys.create("alice", {"tokens_per_day": 10, "priority": 3})
    assert keys.limit("alice", {"tokens_per_day": None, "share": 2}).settings == {"priority": 3, "share": 2}
    assert [line.name for line in keys.revoke("alice").keys] == ["own"]
    assert keys.added_to(CONFIG) == CONFIG
    with pytest.raises(NotFound, match="no key called"):
        keys.revoke("alice")
    with pytest.raises(NotFound, match="in the configuration"):
        keys.limit("own", {"share": 2})


@pytest.mark.parametrize(
    "settings", [{"share": 0}, {"share": True}, {"tokens_per_day": "9"}, {"scopes": ["root"]}, {"scopes": []},
                 {"models": "m"}, {"colour": 1}, {"digest": "x"}],
)  # fmt: skip
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    """And nothing was made."""
    keys = store(tmp_path / "keys.json")
    with pytest.raises(BadRequest):
        keys.create("alice", settings)
    assert not (tmp_path / "keys.json").exists()


def test_names_are_had_once(tmp_path: Path) -> None:
    """Of both kinds; the configuration's wins where it comes later."""
    keys = store(tmp_path / "keys.json")
    keys.create("alice", {})
    for name in ("alice", "own"):
        with pytest.raises(Conflict):
            keys.create(name, {})
    for name in ("", " a", "a\n", "-", "x" * 65):
        with pytest.raises(BadRequest):
            keys.create(name, {})
    later = Config(auth=AuthConfig((KeyConfig("alice", digest("y")),)))
    assert keys.added_to(later) == later


@pytest.mark.parametrize("text", ["", "{", '{"keys": {"a": {"digest": "no", "at": 1}}}', '{"keys": {"a": {}}}', "[]"])
def test_a_file_that_cannot_be_read_opens_no_door(tmp_path: Path, text: str) -> None:
    """Without it nobody knows whether keys are needed, so they are; and it is not written over."""
    path = tmp_path / "keys.json"
    path.write_text(text)
    keys = store(path, Config())
    assert keys.added_to(Config()).auth.keys == (SHUT,)
    assert len(digest("anything")) != len(SHUT.digest)
    with pytest.raises(Unavailable, match="cannot be read"):
        keys.create("alice", {})
    assert path.read_text() == text
    path.write_text(json.dumps({"keys": {}}))
    keys.load()
    assert keys.added_to(Config()) == Config()


def test_where_nothing_can_be_written_nothing_changes(tmp_path: Path) -> None:
    """It says so, and no key is known that the next daemon would not know."""
    (tmp_path / "file").write_text("")
    keys = store(tmp_path / "file" / "keys.json")
    keys._unreadable = ""
    with pytest.raises(Unavailable, match="nothing changed"):
        keys.create("alice", {})
    assert len(keys.list().keys) == 1
    with pytest.raises(Conflict, match="no state folder"):
        store(None).create("alice", {})


def test_where_the_file_is() -> None:
    """The unit's folder, the user's, or none."""
    assert key_store_path({"STATE_DIRECTORY": "/v/usage:/v/keys"}, None) == Path("/v/keys/keys.json")
    assert key_store_path({}, Path("/home/me")) == Path("/home/me/.local/state/vllmd/keys.json")
    assert key_store_path({"VLLMD_KEYS": ""}, Path("/home/me")) is None
    assert key_store_path({}, None) is None
