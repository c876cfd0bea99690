"""Whom an engine runs as and where its home is, as the daemon says it."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from vllmd.config.types import ModelConfig
from vllmd.daemon.homes import Homes, ordered_user, own_name, unknown_user
from vllmd.launcher.own_users import NAME, PREFIX

HOMES = Homes(Path("/var/lib/shared"), Path("/var/lib/own"), {"HF_HOME": "/srv/hf"})


def test_models_of_similar_names_have_different_users() -> None:
    """What is readable of them is the same."""
    names = [own_name(ModelConfig(name, user="own")) for name in ("org/m", "org-m", "Org/M", "m" * 90)]
    assert len(set(names)) == 4
    assert all(NAME.match(name) for name in names)


def test_replicas_of_a_model_are_one_user() -> None:
    """They load the same files."""
    assert own_name(ModelConfig("m@2", replica_of="m")) == own_name(ModelConfig("m"))


def test_the_launcher_is_told_whom() -> None:
    """By name, as its own, or not at all."""
    assert [ordered_user(ModelConfig("m", user=user)) for user in ("", "alice")] == ["", "alice"]
    assert ordered_user(ModelConfig("m", user="own")).startswith(f"{PREFIX}m-")


def test_each_looks_for_models_in_his_own_cache() -> None:
    """The daemon's HF_HOME is that of the shared user."""
    mine, me = ModelConfig("m", user="own"), pwd.getpwuid(os.getuid())
    assert HOMES.hf_home(ModelConfig("m")) == Path("/srv/hf")
    assert HOMES.hf_home(mine) == Path("/var/lib/own") / own_name(mine) / ".cache/huggingface"
    assert HOMES.hf_home(ModelConfig("m", user=me.pw_name)) == Path(me.pw_dir) / ".cache/huggingface"


def test_only_the_shared_home_is_told_by_the_daemon() -> None:
    """The launcher knows the others better."""
    assert HOMES.variables(ModelConfig("m")) == {"HOME": "/var/lib/shared"}
    assert HOMES.variables(ModelConfig("m", user="own")) == {}


@pytest.mark.parametrize(
    ("user", "says"), [("", ""), ("own", ""), ("nobody-here", "no user 'nobody-here'"), ("root", "never")]
)
def test_a_user_that_cannot_be_is_told_before_the_start(user: str, says: str) -> None:
    """With the model's place in the configuration."""
    told = unknown_user(ModelConfig("m", user=user))
    assert says in told
    assert bool(told) is bool(says)
