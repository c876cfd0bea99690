"""Models that programs bring along at run time: who may say what, and how long it holds.

L is the Python library: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.client.site import Vllmd, running
from vllmd import errors
from vllmd.config.runtime_model import changed, runtime_model
from vllmd.config.types import Config, DeviceConfig, ModelConfig
from vllmd.sizes import GiB

TEMPLATE = ModelConfig("", extra_args=("--seed", "1"), env={"A": "1"}, max_model_len=4096)
CONFIG = Config(template=TEMPLATE, models={"org/known": ModelConfig("org/known", aliases=("k",))})


def asked(settings: Mapping[str, Any], *, trusted: bool = False) -> ModelConfig:
    return runtime_model("org/new", settings, CONFIG, trusted=trusted)


def test_what_is_not_said_is_as_in_the_defaults() -> None:
    """An administrator's defaults hold for guests, too; lists and mappings are added to."""
    model = asked({"model": "/m", "dtype": "half", "extra_args": ["--max-num-seqs", "2"]})
    assert (model.name, model.model, model.dtype, model.max_model_len) == ("org/new", "/m", "half", 4096)
    assert model.extra_args == ("--seed", "1", "--max-num-seqs", "2")
    assert asked({"env": {"B": "2"}}, trusted=True).env == {"A": "1", "B": "2"}
    assert asked({"max_model_len": 8}).max_model_len == 8


def test_texts_stay_texts() -> None:
    """A path that YAML would read as a number, or as a mapping, is still that path."""
    model = asked({"model": "1e5", "extra_args": ["--limit-mm-per-prompt", '{"image": 2}', "--revision", "on"]})
    assert model.model == "1e5"
    assert model.extra_args[2:] == ("--limit-mm-per-prompt", '{"image": 2}', "--revision", "on")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"engin": "vllm"}, 'did you mean "engine"'),
        ({"max_model_len": "long"}, "a whole number"),
        ({"aliases": ["k"]}, "alias of 'org/known' already"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
    ],
)
def test_what_is_wrong_in_a_file_is_wrong_here(settings: dict[str, Any], why: str) -> None:
    """The same table, the same words."""
    with pytest.raises(errors.BadRequest, match=why):
        asked(settings, trusted=True)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"gpu_memory": "100GiB"}, "gpu_memory: it needs 100 GiB"), ({"devices": [3]}, "there is no device 3")],
)
def test_what_no_declared_device_has_is_refused(settings: dict[str, Any], why: str) -> None:
    """At once, not at its first request; a model of a file that can never be loaded either is no reason."""
    never = ModelConfig("org/never", gpu_memory=200 * GiB)
    config = replace(CONFIG, devices=(DeviceConfig(80 * GiB),), models={"org/never": never, **CONFIG.models})
    with pytest.raises(errors.BadRequest, match=why) as error:
        runtime_model("org/new", settings, config, trusted=True)
    assert "org/never" not in str(error.value)
    assert runtime_model("org/new", {"gpu_memory": "10GiB"}, config, trusted=True).gpu_memory == 10 * GiB
    with pytest.raises(errors.BadRequest, match=why):
        changed("org/known", settings, config)


@pytest.mark.parametrize(
    "settings",
    [
        {"command": "/bin/sh"},
        {"env": {"LD_PRELOAD": "/tmp/x.so"}},
        {"hf_token_file": "/etc/hostname"},
        {"trust_remote_code": True},
        {"options": {"rpc_dir": "/tmp"}},
        {"engine": "command"},
        {"extra_args": ["--middleware", "mine.steal"]},
        {"extra_args": {"worker_cls": "mine.Worker"}},
        {"extra_args": ["--tool-parser-plugin=/tmp/x.py"]},
        {"extra_args": ["-cc", "{}"]},
    ],
)
def test_an_operator_cannot_run_code_as_the_engines_user(settings: dict[str, Any]) -> None:
    """All users' prompts pass through that user's processes; root, and the daemon's own user, may anyway."""
    with pytest.raises(errors.BadRequest, match="administrator"):
        asked(settings)
    assert asked(settings, trusted=True).name == "org/new"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("g", {"model": "--trust-remote-code", "extra_args": ["attacker/repo"]}),
        ("g", {"model": "--config=/tmp/evil.yaml"}),
        ("g", {"dtype": "--trust-remote-code"}),
        ("g", {"aliases": ["--trust-remote-code"]}),
        ("--", {"model": "/home/m"}),
        ("--trust-remote-code", {"extra_args": ["attacker/repo"]}),
    ],
)
def test_nothing_of_a_guest_poses_as_a_flag(name: str, settings: dict[str, Any]) -> None:
    """Its name and source are words of the engine's command line, which a flag would turn into another one."""
    with pytest.raises(errors.BadRequest, match=r"first of them not '-'|begins with '-'"):
        runtime_model(name, settings, CONFIG, trusted=False)


def test_L_arguments_of_the_document_are_harmless() -> None:
    """What L's users write needs no administrator."""
    from vllmd.client import VLLMEngineArgs

    args = VLLMEngineArgs(
        model="/home/models/Qwen/Qwen2.5-0.5B-Instruct/",
        tensor_parallel_size=1,
        max_model_len=8192,
        gpu_memory_utilization=0.2,
        enforce_eager=True,
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        max_num_seqs=2,
        max_num_batched_tokens=8192,
        seed=-1,
    )
    assert asked(args.settings()).gpu_memory == 0.2


# -- at a running daemon ------------------------------------------------------------------------------------------


def test_a_guest_is_listed_served_and_dropped(vllmd: Vllmd) -> None:
    """Like a configured model, but for where it is written: nowhere."""
    with vllmd.client() as client:
        answer = client.put_model("guest/a", {"engine": "sim"})
        assert (answer.model, answer.configured, answer.differs) == ("guest/a", False, ())
        assert f"http://{answer.listen[0]}" == vllmd.url
        client.load_model("guest/a")
        assert client.drop_model("guest/a").dropped is True
        with pytest.raises(errors.UnknownModel):
            client.drop_model("guest/a")
        with pytest.raises(errors.UnknownModel):
            client.get_model("guest/a")


def test_a_guest_changes_only_while_nobody_uses_it(vllmd: Vllmd) -> None:
    """Two programs that ask for different things share what the first one asked for."""
    with vllmd.client() as client:
        client.put_model("guest/b", {"engine": "sim", "max_model_len": 100})
        client.lease_model("guest/b", "mine")
        assert client.put_model("guest/b", {"engine": "sim", "max_model_len": 200}).differs == ("max_model_len",)
        client.release_model("guest/b", "mine")
        assert client.put_model("guest/b", {"engine": "sim", "max_model_len": 200}).differs == ()


def test_a_configured_model_is_never_changed(vllmd: Vllmd) -> None:
    """Nor by one of its other names; and only a file can take it away."""
    with vllmd.client() as client:
        answer = client.put_model("t", {"engine": "sim", "max_model_len": 7})
        assert (answer.model, answer.configured) == ("org/tiny", True)
        assert "max_model_len" in answer.differs
        with pytest.raises(errors.Conflict, match="configured in a file"):
            client.drop_model("org/tiny")


def test_a_guest_survives_a_reload_and_not_the_daemon(tmp_path: Path) -> None:
    """In memory only, but an administrator's reload does not end other people's work."""
    config = {"devices": [], "models": {"org/a": {"engine": "sim"}}}
    with running(tmp_path, config) as daemon, daemon.client() as client:
        client.put_model("guest/c", {"engine": "sim"})
        pid = client.load_model("guest/c").pid
        assert client.reload().removed == ()
        assert daemon.line("guest/c").pid == pid
    (tmp_path / "admin.sock").unlink()
    with running(tmp_path, config) as daemon, daemon.client() as client:
        assert "guest/c" not in [model["id"] for model in client.list_models()]


def test_only_operators_bring_models_along(vllmd: Vllmd) -> None:
    """Over TCP it needs a key with the scope admin."""
    from vllmd.client import Client

    with Client(vllmd.url) as client, pytest.raises(errors.Unauthorized):
        client.put_model("guest/d", {"engine": "sim"})
