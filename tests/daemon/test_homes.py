"""Whom an engine runs as and where its home is, as the daemon says it."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from vllmd.config.types import ModelConfig
from vllmd.daemon.homes import Homes, ordered_user, own_name, unknown_user
from vllmd.hub import cache_of
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
    assert HOMES.hub(ModelConfig("m")) == Path("/srv/hf/hub")
    assert HOMES.hub(mine) == Path("/var/lib/own") / own_name(mine) / ".cache/huggingface/hub"
    assert HOMES.hub(ModelConfig("m", user=me.pw_name)) == Path(me.pw_dir) / ".cache/huggingface/hub"


@pytest.mark.parametrize(
    ("around", "own", "arguments", "wanted"),
    [
        ({}, {}, (), "/home/e/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "/hub", "HF_HOME": "/hf"}, {}, (), "/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, {}, (), "/old"),
        ({"HF_HUB_CACHE": "/hub"}, {"HF_HOME": "/mine"}, (), "/mine/hub"),
        ({"HF_HOME": "/hf"}, {"HF_HUB_CACHE": "/mine"}, (), "/mine"),
        ({"HF_HOME": "/hf"}, {"HOME": "/elsewhere"}, (), "/hf/hub"),
        ({}, {"HOME": "/elsewhere"}, (), "/elsewhere/.cache/huggingface/hub"),
        ({"HF_HOME": "/hf"}, {}, ("--download-dir", "/models"), "/models"),
    ],
)
def test_a_cache_is_where_the_model_or_everybody_says(
    around: dict[str, str], own: dict[str, str], arguments: tuple[str, ...], wanted: str
) -> None:
    """By the same variables and flags as the engine's own library, which the engine is told as well."""
    homes, model = Homes(Path("/home/e"), None, around), ModelConfig("m", env=own, extra_args=arguments)
    assert homes.hub(model) == Path(wanted)
    told = {**homes.variables(model), **own}
    assert arguments or cache_of(told) == Path(wanted)


def test_only_the_shared_home_is_told_by_the_daemon() -> None:
    """The launcher knows the others better."""
    assert HOMES.variables(ModelConfig("m")) == {"HOME": "/var/lib/shared", "HF_HOME": "/srv/hf"}
    assert HOMES.variables(ModelConfig("m", user="own")) == {}


@pytest.mark.parametrize(
    ("user", "says"), [("", ""), ("own", ""), ("nobody-here", "no user 'nobody-here'"), ("root", "never")]
)
def test_a_user_that_cannot_be_is_told_before_the_start(user: str, says: str) -> None:
    """With the model's place in the configuration."""
    told = unknown_user(ModelConfig("m", user=user))
    assert says in told
    assert bool(told) is bool(says)
