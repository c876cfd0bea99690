"""Several engines of one model, as they are written down.

S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vllmd.config.loader import load, read
from vllmd.config.present import as_yaml
from vllmd.config.replicas import engines_of, is_this_host, of_this_host
from vllmd.config.types import Config, ModelConfig
from vllmd.daemon.engine_process import fingerprint
from vllmd.errors import ConfigError


def config(tmp_path: Path, text: str, *, strict: bool = False) -> Config:
    (tmp_path / "vllmd.yaml").write_text(text)
    return load(tmp_path / "vllmd.yaml", env={}, strict=strict)


def engines(tmp_path: Path, text: str) -> dict[str, ModelConfig]:
    return engines_of(config(tmp_path, text).models)


def test_a_number_is_so_many_alike(tmp_path: Path) -> None:
    """All of them wanted."""
    found = engines(tmp_path, "models: {m: {engine: sim, gpu_memory: 5GiB, replicas: 3}}")
    assert list(found) == ["m@1", "m@2", "m@3"]
    assert {(one.replica_of, one.gpu_memory, one.source) for one in found.values()} == {("m", 5 << 30, "m")}
    assert {one.replicas.min for one in found.values() if one.replicas} == {3}


def test_a_range_is_as_many_as_there_may_be(tmp_path: Path) -> None:
    """One is wanted at first."""
    found = engines(tmp_path, "models: {m: {replicas: {min: 1, max: 2, busy: 3}}}")
    assert [(name, one.replicas and (one.replicas.min, one.replicas.busy)) for name, one in found.items()] == [
        ("m@1", (1, 3)),
        ("m@2", (1, 3)),
    ]


def test_in_a_list_each_has_its_own_settings_beside_the_models(tmp_path: Path) -> None:
    """Mappings are combined entry by entry, as with defaults; a name stands in place of the number."""
    text = """
models:
  m:
    gpu_memory: 0.5
    env: {A: "1"}
    replicas:
      - {devices: [0]}
      - {devices: [1], gpu_memory: 0.8, env: {B: "2"}, name: big}
"""
    first, second = engines(tmp_path, text).values()
    assert (first.name, first.devices, first.gpu_memory, first.env) == ("m@1", (0,), 0.5, {"A": "1"})
    assert (second.name, second.devices, second.gpu_memory, second.env) == ("m@big", (1,), 0.8, {"A": "1", "B": "2"})


def test_one_of_another_kind_gets_nothing_that_is_the_first_kinds(tmp_path: Path) -> None:
    """A remote would not know the flags of vLLM."""
    text = """
models:
  m:
    extra_args: [--enforce-eager]
    options: {x: 1}
    replicas: [{}, {engine: remote, options: {url: "http://gpu2"}}]
"""
    first, second = engines(tmp_path, text).values()
    assert first.extra_args == ("--enforce-eager",)
    assert (second.extra_args, second.options) == ((), {"url": "http://gpu2"})


def test_S_names_of_its_constants_are_understood(tmp_path: Path) -> None:
    """BENCHMAK_MESSAGE, LATENCY_GROWING_RATE and MAX_RETRY, in small letters."""
    text = "models: {m: {replicas: {max: 2, benchmark_message: Hi, latency_growing_rate: 20, max_retry: 20}}}"
    rules = config(tmp_path, text).models["m"].replicas
    assert rules is not None
    assert (rules.probe, rules.growth, rules.retries) == ("Hi", 20.0, 20)


def test_false_and_none_are_one_engine(tmp_path: Path) -> None:
    """Nothing is a group then."""
    assert config(tmp_path, "models: {m: {replicas: false}}").models["m"].replicas is None


def test_S_get_eno1_inet_address_what_is_meant_for_another_machine_is_left_out(tmp_path: Path) -> None:
    """By name or address; a model of which nothing is left is left out whole."""
    text = f"""
models:
  here: {{host: {socket.gethostname()}}}
  there: {{host: gpu99}}
  both:
    replicas: [{{host: 192.0.2.7}}, {{host: 127.0.0.1, devices: [0]}}, {{devices: [1]}}]
  nothing: {{replicas: [{{host: gpu98}}]}}
"""
    left, lost = of_this_host(config(tmp_path, text), is_this_host)
    assert lost == ["there", "nothing"]
    found = engines_of(left.models)
    assert [(name, one.devices) for name, one in found.items()] == [("here", ()), ("both@2", (0,)), ("both@3", (1,))]


def test_a_host_is_this_one_by_its_names_and_addresses_only() -> None:
    """No name is looked up, and the address of nobody is nobody's."""
    assert all(map(is_this_host, (socket.gethostname().upper(), "localhost", "127.0.0.1", "::1", "[::1]")))
    assert not any(map(is_this_host, ("gpu99", "192.0.2.7", "0.0.0.0", "::", "not an address", "")))


def test_a_model_that_gets_replicas_is_the_same_engine(tmp_path: Path) -> None:
    """Its digest does not change, so a reload starts only the others."""
    before = engines(tmp_path, "models: {m: {gpu_memory: 0.5}}")["m"]
    after = engines(tmp_path, "models: {m: {gpu_memory: 0.5, replicas: 2}}")["m@1"]
    assert fingerprint(before) == fingerprint(after)


def test_what_is_shown_is_read_again_and_its_secrets_are_not_shown(tmp_path: Path) -> None:
    """``vllmctl config show``."""
    text = """
models:
  m:
    replicas:
      - {devices: [0], hf_token: hf_secret}
      - {engine: remote, options: {url: "http://x", key: sk-secret}}
"""
    (tmp_path / "vllmd.yaml").write_text(text)
    (tmp_path / "vllmd.yaml").chmod(0o600)
    shown = as_yaml(read(tmp_path / "vllmd.yaml", env={}))
    assert "hf_secret" not in shown
    assert "sk-secret" not in shown
    again = engines(tmp_path, shown)
    assert [(one.name, one.engine, one.devices) for one in again.values()] == [
        ("m@1", "vllm", (0,)),
        ("m@2", "remote", ()),
    ]


@pytest.mark.parametrize(
    ("replicas", "what"),
    [
        ("many", "'many' is not a number; accepted: a whole number, 1 to 1024, or all"),
        ("0", "replicas.min: 0 is out of range"),
        ("{min: 3, max: 2}", "min is 3, and max only 2"),
        ("{max: 2, of: [{}]}", "give either max or of, not both"),
        ("[]", "replicas.of: it lists no replica"),
        ("[3]", "replicas.of: a number is not a mapping; accepted: a list of mappings"),
        ("[{name: a}, {name: a}]", "two of them are called m@a"),
        ("[{aliases: [b]}]", "replicas.of[0].aliases: there is no such setting"),
        ("[{queue_limit: 3}]", "replicas.of[0].queue_limit: there is no such setting"),
        ("[{devices: x}]", "replicas.of[0].devices: "),
        ("[{devices: [7]}]", "models.m@1.devices: there is no device 7"),
        ("{growth: 1}", "replicas.growth: 1 is out of range; accepted: a number above 1"),
        ("{retrys: 1}", 'replicas.retrys: there is no such setting; did you mean "retries"?'),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, replicas: str, what: str) -> None:
    """Each with what would be right."""
    with pytest.raises(ConfigError) as error:
        config(tmp_path, f"devices: [{{memory: 80GiB}}]\nmodels:\n  m:\n    replicas: {replicas}\n", strict=True)
    assert what in error.value.message
    assert "vllmd.yaml:4: models.m" in error.value.message


def test_a_replica_cannot_be_called_as_a_model_is(tmp_path: Path) -> None:
    """Operators could not tell them apart."""
    with pytest.raises(ConfigError, match="'m@2' is another model"):
        config(tmp_path, 'models: {m: {replicas: 2}, "m@2": {}}')
