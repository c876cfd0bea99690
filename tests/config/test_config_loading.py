"""The configuration as the daemon gets it: every section, every other system's name, precedence, merging.

V is the Ollama-like manager; P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.config.loader import load, read
from vllmd.config.names import instance_name, unit_pattern
from vllmd.config.offers import lora_modules
from vllmd.config.reload import shared
from vllmd.config.types import (
    AdapterConfig,
    Config,
    ModelConfig,
    PoolConfig,
    RequestRules,
    VariantConfig,
)
from vllmd.core.types import IdleRules, WhenFree
from vllmd.errors import ConfigError

GiB, MiB = 1 << 30, 1 << 20


def of(tmp_path: Path, text: str, env: dict[str, str] | None = None, **overrides: object) -> Config:
    """The configuration that a file with ``text`` makes."""
    file = tmp_path / "vllmd.yaml"
    file.write_text(text)
    file.chmod(0o640)
    return load(file, env=env or {}, overrides={key.replace("__", "."): value for key, value in overrides.items()})


def model(tmp_path: Path, settings: str) -> ModelConfig:
    """A single model with these settings."""
    return of(tmp_path, f"models: {{m: {settings}}}").models["m"]


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    """A machine without a line of configuration listens on both loopback addresses and sleeps at 300 s."""
    config = of(tmp_path, "# nothing\n")
    assert config.server.listen == ("127.0.0.1:33258", "[::1]:33258")
    assert config.models == {}
    assert config.devices is None


def test_V_yaml_every_key_of_its_models_file(tmp_path: Path) -> None:
    """V's keys are understood under their own names."""
    config = of(
        tmp_path,
        """
models:
  Qwen/Qwen3-0.6B:
    gpu_memory_utilization: 0.85
    max_model_len: 32768
    devices: [0]
    tensor_parallel_size: 1
    trust_remote_code: false
    dtype: auto
    extra_args: {}
""",
    )
    found = config.models["Qwen/Qwen3-0.6B"]
    assert (found.gpu_memory, found.max_model_len, found.devices) == (0.85, 32768, (0,))
    assert (found.tensor_parallel_size, found.trust_remote_code, found.dtype, found.extra_args) == (
        1,
        False,
        "auto",
        (),
    )
    assert found.source == "Qwen/Qwen3-0.6B"


def test_V_flat_file_dropped_into_models_d(tmp_path: Path) -> None:
    """V's models.yaml works as it is, as a file in models.d."""
    (tmp_path / "models.d").mkdir()
    (tmp_path / "models.d" / "vllama.yaml").write_text("Qwen/Qwen3-0.6B:\n  devices: [0]\nBAAI/bge-m3:\n")
    (tmp_path / "models.d" / "ours.yaml").write_text("models: {m: {pin: true}}\n")
    assert list(of(tmp_path, "models: {first: }").models) == ["first", "m", "Qwen/Qwen3-0.6B", "BAAI/bge-m3"]


def test_P_config_every_section(tmp_path: Path) -> None:
    """P's document's own example, sections and all."""
    config = of(
        tmp_path,
        """
gpu: {gpu_id: 1, reserved_memory_mb: 2048, memory_utilization: 0.9}
proxy: {host: "0.0.0.0", port: 8080, idle_timeout_seconds: 600, api_key: "your-secret-key"}
models:
  llama2-7b-chat:
    model_path: "meta-llama/Llama-2-7b-chat-hf"
    param_count: 7
    precision: "fp16"
    max_model_len: 4096
    api_key: "hf_xxxx"
""",
    )
    found = config.models["llama2-7b-chat"]
    assert (found.devices, found.gpu_memory, config.reserve) == ((1,), 0.9, 2048 * MiB)
    assert config.server.listen == ("0.0.0.0:8080",)
    assert found.idle.sleep_after == 600
    assert found.source == "meta-llama/Llama-2-7b-chat-hf"
    assert (found.param_count, found.precision, found.max_model_len, found.hf_token) == (7.0, "fp16", 4096, "hf_xxxx")
    assert config.auth.keys[0].digest == hashlib.sha256(b"your-secret-key").hexdigest()
    assert config.auth.keys[0].scopes == ("models", "admin")
    assert [warning.split(": ", 1)[1] for warning in config.warnings] == [
        "models.llama2-7b-chat.api_key: a Hugging Face token is called hf_token here; it is taken as that"
    ]


P_ENVIRONMENT: list[tuple[str, str, Any, Any]] = [
    ("PROXY_PORT", "8081", lambda c: c.server.listen, ("127.0.0.1:8081", "[::1]:8081")),
    ("IDLE_TIMEOUT", "60", lambda c: c.models["m"].idle.sleep_after, 60.0),
    ("GPU_ID", "2", lambda c: c.models["m"].devices, (2,)),
    ("RESERVED_MEMORY_MB", "1024", lambda c: c.reserve, GiB),
    ("LOG_LEVEL", "DEBUG", lambda c: c.log_level, "debug"),
    ("VLLMD_IDLE_STOP_AFTER", "1h", lambda c: c.models["m"].idle.stop_after, 3600.0),
    ("VLLMD_SERVER_LISTEN", "127.0.0.1:1,[::1]:2", lambda c: c.server.listen, ("127.0.0.1:1", "[::1]:2")),
    ("VLLMD_DEFAULTS_GPU_MEMORY", "20GiB", lambda c: c.models["m"].gpu_memory, 20 * GiB),
]


@pytest.mark.parametrize(("name", "value", "get", "expected"), P_ENVIRONMENT, ids=[row[0] for row in P_ENVIRONMENT])
def test_P_env_overrides_the_file(tmp_path: Path, name: str, value: str, get: Any, expected: Any) -> None:
    """Each variable, the documents' own and ours, wins over the file."""
    text = (
        "gpu: {gpu_id: 0, reserved_memory_mb: 512, memory_utilization: 0.5}\nproxy: {port: 9999}\n"
        "log_level: error\nidle: {sleep_after: 9m, stop_after: 40m}\nmodels: {m: {}}"
    )
    assert get(of(tmp_path, text, {name: value})) == expected


def test_P_env_equal_to_the_default_still_wins(tmp_path: Path) -> None:
    """Presence counts, not value."""
    config = of(tmp_path, "log_level: error\nreserve: 4GiB", {"LOG_LEVEL": "info", "RESERVED_MEMORY_MB": "512"})
    assert (config.log_level, config.reserve) == ("info", 512 * MiB)


def test_precedence_command_line_environment_file(tmp_path: Path) -> None:
    """A host in the file, a port in the environment and a port on the command line come together."""
    file = "server: {host: 127.0.0.1, port: 1}"
    assert of(tmp_path, file).server.listen == ("127.0.0.1:1",)
    assert of(tmp_path, file, {"PROXY_PORT": "2"}).server.listen == ("127.0.0.1:2",)
    assert of(tmp_path, file, {"PROXY_PORT": "2"}, server__port=3).server.listen == ("127.0.0.1:3",)
    listen = of(tmp_path, file, {"VLLMD_SERVER_LISTEN": "[::1]:9"})
    assert listen.server.listen == ("[::1]:9",)
    assert of(tmp_path, "server: {listen: '[::1]:9'}", {}, server__port=3).server.listen[0] == "127.0.0.1:3"


HOSTS = [
    ("{host: '::1', port: 1}", ("[::1]:1",)),
    ("{host: localhost}", ("localhost:33258",)),
    ("{port: '8080'}", ("127.0.0.1:8080", "[::1]:8080")),
    ("{port: 0x1F90}", ("127.0.0.1:8080", "[::1]:8080")),
]


@pytest.mark.parametrize(("yaml", "addresses"), HOSTS)
def test_V_serve_host_and_port(tmp_path: Path, yaml: str, addresses: tuple[str, ...]) -> None:
    """Either alone has the other's default; any way that YAML writes a number."""
    assert of(tmp_path, f"server: {yaml}").server.listen == addresses


def test_our_variable_wins_over_another_systems(tmp_path: Path) -> None:
    """Where both are set, the one that can only mean vllmd counts."""
    env = {"PROXY_PORT": "1", "VLLMD_SERVER_PORT": "2"}
    assert of(tmp_path, "", env).server.listen[0] == "127.0.0.1:2"


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    """Compose files pass empty variables on."""
    assert of(tmp_path, "log_level: error", {"LOG_LEVEL": ""}).log_level == "error"


LISTENS = [
    ("8080", ("127.0.0.1:8080", "[::1]:8080")),
    ("/run/x.sock", ("/run/x.sock",)),
    ("['unix:/run/x.sock', '0.0.0.0:1']", ("/run/x.sock", "0.0.0.0:1")),
]


@pytest.mark.parametrize(("yaml", "addresses"), LISTENS)
def test_listen(tmp_path: Path, yaml: str, addresses: tuple[str, ...]) -> None:
    """A port alone never opens the machine to others."""
    text = f"auth: {{allow_anonymous: true}}\nserver: {{listen: {yaml}}}"
    assert of(tmp_path, text).server.listen == addresses


SIZES = [("20GiB", 20 * GiB), ("512MiB", 512 * MiB), ("2g", 2 * GiB), ("2G", 2 * GiB),
         ("1GB", 10**9), ("1.5GiB", 3 * GiB // 2),
         ("1073741824", GiB), ("1 GiB", GiB), ("0", 0)]  # fmt: skip


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(tmp_path: Path, text: str, size: int) -> None:
    """GiB and G are powers of 1024, GB of 1000."""
    assert of(tmp_path, f"reserve: {text}").reserve == size


DURATIONS = [("300", 300.0), ("5m", 300.0), ("1h30m", 5400.0), ("1h 30m", 5400.0), ("90s", 90.0), ("2.5", 2.5),
             ("500ms", 0.5), ("1d", 86400.0), ("never", None), ("off", None)]  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), DURATIONS)
def test_durations(tmp_path: Path, text: str, seconds: float | None) -> None:
    """Seconds, units in a row, or never."""
    assert of(tmp_path, f"server: {{idle_exit: {text}}}").server.idle_exit == seconds


SHARES = [("0.35", 0.35), ("35%", 0.35), ("1", 1.0), ("20GiB", 20 * GiB), ("auto", None), ("21474836480", 20 * GiB)]


@pytest.mark.parametrize(("text", "share"), SHARES)
def test_gpu_memory(tmp_path: Path, text: str, share: float | int | None) -> None:
    """A share is a float, a size an int, auto None."""
    found = model(tmp_path, f"{{gpu_memory: {text}}}").gpu_memory
    assert found == share
    assert type(found) is type(share)


ARGS = [
    ("{enable-chunked-prefill: true}", ("--enable-chunked-prefill",)),
    ("{enable_prefix_caching: false}", ("--no-enable-prefix-caching",)),
    ("{max_num_seqs: 64, O: 3}", ("--max-num-seqs", "64", "-O", "3")),
    ("{served: [a, b]}", ("--served", "a", "b")),
    ("{speculative-config: {model: x, n: 2}}", ("--speculative-config", '{"model": "x", "n": 2}')),
    ("{seed: null}", ()),
    ("{rope-theta: 1e6, version: 1.10}", ("--rope-theta", "1e6", "--version", "1.10")),
    ("[--max-num-seqs, 64]", ("--max-num-seqs", "64")),
    ("'--chat-template \"a b\"'", ("--chat-template", "a b")),
    ("", ()),
]


@pytest.mark.parametrize(("yaml", "argv"), ARGS)
def test_V_extra_args_become_argv(tmp_path: Path, yaml: str, argv: tuple[str, ...]) -> None:
    """Booleans, lists, mappings and numbers are rendered as the engine's command line wants them."""
    assert model(tmp_path, f"{{extra_args: {yaml}}}").extra_args == argv


DEVICES = [("0", (0,)), ("[0, 1]", (0, 1)), ("'0,1'", (0, 1)), ("auto", ()), ("[]", ())]


@pytest.mark.parametrize(("yaml", "devices"), DEVICES)
def test_devices(tmp_path: Path, yaml: str, devices: tuple[int, ...]) -> None:
    """One number, a list, or the choice left open."""
    assert model(tmp_path, f"{{devices: {yaml}}}").devices == devices


def test_a_scope_may_have_no_swap_at_all(tmp_path: Path) -> None:
    """The commonest limit of swap; of memory itself nothing is a slip."""
    yaml = "models: {a: {engine: sim, limits: {memory_max: 1GiB, memory_swap_max: 0}}}"
    assert of(tmp_path, yaml).models["a"].limits.memory_swap_max == 0
    with pytest.raises(ConfigError, match="memory_max: 0 bytes is too small"):
        of(tmp_path, "models: {a: {engine: sim, limits: {memory_max: 0}}}")


def test_defaults_lie_beneath_every_model(tmp_path: Path) -> None:
    """A model's own setting wins; mappings are combined entry by entry."""
    config = of(
        tmp_path,
        """
idle: {sleep_after: 1m, stop_after: 2h}
defaults:
  dtype: half
  env: {A: 1, B: 2}
  extra_args: {max-num-seqs: 8}
  idle: {level: 2}
models:
  a: {}
  b: {dtype: auto, env: {B: 3}, extra_args: {seed: 1}, idle: {stop_after: never}}
""",
    )
    a, b = config.models["a"], config.models["b"]
    assert (a.dtype, a.env, a.extra_args) == ("half", {"A": "1", "B": "2"}, ("--max-num-seqs", "8"))
    assert a.idle == IdleRules(60.0, 2, 900.0, 7200.0)
    assert (b.dtype, b.env, b.extra_args) == ("auto", {"A": "1", "B": "3"}, ("--max-num-seqs", "8", "--seed", "1"))
    assert b.idle == IdleRules(60.0, 2, 900.0, None)


IDLES = [
    ("never", IdleRules(None, 1, None, None)),
    ("{level: stop, sleep_after: 5m}", IdleRules(None, 1, None, 300.0)),
    ("{level: sleep2}", IdleRules(300.0, 2, 900.0, 1800.0)),
    ("{sleep_after: 3600}", IdleRules(3600.0, 1, 4200.0, 5100.0)),
    ("{sleep_after: never}", IdleRules(None, 1, 900.0, 1800.0)),
    ("{stop_after: 1m}", IdleRules(None, 1, None, 60.0)),
    ("{sleep_after: 2, stop_after: 4}", IdleRules(2.0, 1, None, 4.0)),
]


@pytest.mark.parametrize(("yaml", "rules"), IDLES)
def test_idle_rules(tmp_path: Path, yaml: str, rules: IdleRules) -> None:
    """Level 3 stops where others sleep; a later sleep pushes the stages that nobody set."""
    assert model(tmp_path, f"{{idle: {yaml}}}").idle == rules


FREE = [
    ("true", WhenFree(10_000 << 20, {0.95: 0.8, 0.85: 0.7})),
    ("{}", WhenFree()),
    ("{used_below: 10GB}", WhenFree(10**10)),
    ("{shares: none}", WhenFree(shares={})),
    ("{shares: {50%: 0.4, 0.9: 85%}}", WhenFree(shares={0.9: 0.85, 0.5: 0.4})),
    ("false", None),
    ("off", None),
    ("", WhenFree(5 * GiB)),
]


@pytest.mark.parametrize(("yaml", "rule"), FREE)
def test_when_free(tmp_path: Path, yaml: str, rule: WhenFree | None) -> None:
    """In short or in full; a model can do without what the defaults say."""
    config = of(tmp_path, f"defaults: {{when_free: {{used_below: 5GiB}}}}\nmodels: {{m: {{when_free: {yaml}}}}}")
    assert config.models["m"].when_free == rule


def test_names_that_yaml_would_read_as_something_else(tmp_path: Path) -> None:
    """A model may be called no, 1.50 or null; texts keep their spelling."""
    config = of(tmp_path, "models: {no: , 1.50: {env: {V: 1.10, B: yes}}, null: }")
    assert list(config.models) == ["no", "1.50", "null"]
    assert config.models["1.50"].env == {"V": "1.10", "B": "yes"}


def test_null_is_as_if_it_were_not_written(tmp_path: Path) -> None:
    """A key that is left empty neither fails nor overrides."""
    config = of(tmp_path, "server:\nidle: {stop_after: }\ndefaults: {dtype: half}\nmodels: {m: {dtype: , env: }}")
    assert (config.models["m"].dtype, config.models["m"].idle.stop_after) == ("half", 1800.0)


def test_merge_keys_work(tmp_path: Path) -> None:
    """YAML's own anchors and << may be used; an overriding key is no duplicate."""
    config = of(tmp_path, "models:\n  a: &a {dtype: half, pin: true}\n  b:\n    <<: *a\n    dtype: auto\n")
    assert (config.models["b"].dtype, config.models["b"].pin) == ("auto", True)


def test_limits_and_options(tmp_path: Path) -> None:
    """systemd's limits and the engine kind's own settings."""
    found = model(tmp_path, "{limits: {memory_max: 64GiB, cpu_quota: 150%, tasks_max: 500}, options: {load_time: 2}}")
    assert (found.limits.memory_max, found.limits.cpu_quota, found.limits.tasks_max) == (64 * GiB, 1.5, 500)
    assert found.options == {"load_time": 2}


def test_auth_keys(tmp_path: Path) -> None:
    """Keys inline, hashed, from a file or a systemd credential; their text is not kept."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "ci").write_text("ci-key\n")
    (tmp_path / "boss").write_text("boss-key\n")
    digest = hashlib.sha256(b"x").hexdigest()
    config = of(
        tmp_path,
        f"""
auth:
  public: health
  keys:
    - {{name: alice, key: plain, models: [m], concurrency: 4, requests_per_minute: 60, tokens_per_minute: 90000}}
    - {{key: "sha256:{digest}"}}
    - {{name: ci, key_file: ci}}
    - {{name: boss, key_file: boss, scopes: [models, admin]}}
models: {{m: {{}}}}
""",
        {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")},
    )
    alice, hashed, ci, boss = config.auth.keys
    assert (alice.models, alice.concurrency, alice.requests_per_minute, alice.tokens_per_minute) == (
        ("m",),
        4,
        60,
        90000,
    )
    assert (hashed.name, hashed.digest) == ("key2", digest)
    assert ci.digest == hashlib.sha256(b"ci-key").hexdigest()
    assert boss.scopes == ("models", "admin")
    assert config.auth.public == ("health",)
    assert "plain" not in repr(config)


def test_P_per_model_key(tmp_path: Path) -> None:
    """A model's api_key that is no Hugging Face token is a client key for that model only."""
    key = of(tmp_path, "models: {m: {api_key: secret}}").auth.keys[0]
    assert (key.models, key.digest) == (("m",), hashlib.sha256(b"secret").hexdigest())


def test_hf_token_file(tmp_path: Path) -> None:
    """The token is read from a file beside the configuration and shown nowhere."""
    (tmp_path / "token").write_text("hf_abc\n")
    found = model(tmp_path, "{hf_token_file: token}")
    assert found.hf_token == "hf_abc"
    assert "hf_abc" not in repr(found)


def test_a_secret_that_everybody_may_read_is_warned_of(tmp_path: Path) -> None:
    """It works, but the administrator should know."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("models: {m: {hf_token: hf_x}}")
    file.chmod(0o644)
    assert f"chmod 600 {file}" in load(file, env={}).warnings[0]


@pytest.mark.parametrize(
    "text",
    [
        "auth: {keys: [{key: S}]}",
        "auth: {keys: [{key_file: f}]}",
        "models: {a: {hf_token: S}}",
        "models: {a: {hf_token_file: f}}",
        "models: {a: {api_key: S}}",
        "models: {a: {env: {HF_TOKEN: S}}}",
        "defaults: {env: {OPENAI_API_KEY: S}}\nmodels: {a: {}, b: {}}",
        "models: {a: {engine: remote, options: {url: 'http://x/v1', key: S}}}",
        "models: {a: {engine: remote, options: {url: 'http://x/v1', key_file: f}}}",
    ],
)
def test_every_place_of_a_secret_is_looked_at(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, with the file it is in, and with advice that does not lock the system's daemon out."""
    file, own = tmp_path / "vllmd.yaml", tmp_path / "f"
    file.write_text(text)
    own.write_text("s")
    meant = own if ": f" in text else file
    for each in (file, own):
        each.chmod(0o644 if each == meant else 0o640)
    (warning,) = load(file, env={}).warnings
    assert f"chmod 600 {meant}" in warning
    monkeypatch.setattr("grp.getgrnam", {"vllmd": ()}.__getitem__)
    monkeypatch.setattr("vllmd.config.secrets.os.stat", lambda path: SimpleNamespace(st_mode=0o100644, st_uid=0))
    assert f"chown root:vllmd {meant} && chmod 640 {meant}" in load(file, env={}).warnings[0]
    meant.chmod(0o640)
    monkeypatch.undo()
    assert load(file, env={}).warnings == ()


def test_a_secret_on_a_command_line_is_warned_of(tmp_path: Path) -> None:
    """Every user of the machine can list these; how many tokens, and where a key is, is none."""
    args = (
        "[--api-key, x-secret, --max-num-batched-tokens, '8192', --tokenizer=t, --ssl-keyfile, /k, --hf-token=y-secret]"
    )
    warnings = of(tmp_path, f"models: {{m: {{extra_args: {args}}}}}").warnings
    assert [warning.partition("the value of ")[2].split()[0] for warning in warnings] == ["--api-key", "--hf-token"]
    assert "-word" not in "".join(warnings)


def test_a_model_configured_twice(tmp_path: Path) -> None:
    """Both places are named."""
    (tmp_path / "models.d").mkdir()
    (tmp_path / "models.d" / "a.yaml").write_text("\nm: {}\n")
    with pytest.raises(ConfigError) as caught:
        of(tmp_path, "models: {m: {}}")
    assert caught.value.message == (
        f"{tmp_path}/models.d/a.yaml:2: models.m: this model is configured already in {tmp_path}/vllmd.yaml:1"
    )


def test_models_d_holds_models_only(tmp_path: Path) -> None:
    """A section in models.d is refused rather than taken for a model."""
    (tmp_path / "models.d").mkdir()
    (tmp_path / "models.d" / "a.yaml").write_text("server: {port: 1}\n")
    with pytest.raises(ConfigError, match=r"server: a file in models.d holds models only; accepted: models$"):
        of(tmp_path, "")


def test_the_pinned_models_that_leave_no_room_are_warned_of(tmp_path: Path) -> None:
    """They may be meant to take turns with nobody, so it is no error."""
    text = "devices: [{memory: 80GiB}]\nmodels: {a: {pin: true, gpu_memory: 50GiB}, b: {pin: true, gpu_memory: 40%}}"
    assert of(tmp_path, text).warnings == (
        f"{tmp_path}/vllmd.yaml:2: models.b.pin: "
        "the pinned models a, b take 82GiB of device 0, which has 79.5GiB to give",
    )


def test_origins_tell_where_a_setting_came_from(tmp_path: Path) -> None:
    """``vllmctl config show`` says so for each."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("policy: lru\nreserve: 1GiB\n")
    origins = read(file, env={"LOG_LEVEL": "debug"}).origins
    assert str(origins["policy"]) == f"{file}:1"
    assert str(origins["log_level"]) == "environment LOG_LEVEL"


def test_each_models_settings_have_their_own_origin(tmp_path: Path) -> None:
    """They are kept as numbers: whatever has a path is found by it, in a section or beside one, and nothing else is."""
    file = tmp_path / "vllmd.yaml"
    file.write_text(
        "defaults: {engine: sim}\n"
        "models:\n"
        "  a: {dtype: half, idle: {level: 2},\n"
        "      pin: true}\n"
        "  b.dtype: {max_model_len: 7, variants: {v.w: {request: {set: {x: 1}}}}}\n"
    )
    origins = read(file, env={"VLLMD_SERVER_PORT": "8000"}).origins
    lines = {path: f"{where.source.removeprefix(f'{tmp_path}/')}:{where.line}" for path, where in origins.items()}
    assert {path: line for path, line in lines.items() if path[:9] in ("models.a.", "models.b.")} == {
        "models.a.engine": "vllmd.yaml:1",
        "models.a.dtype": "vllmd.yaml:3",
        "models.a.pin": "vllmd.yaml:4",
        "models.a.idle.level": "vllmd.yaml:3",
        "models.b.dtype.engine": "vllmd.yaml:1",
        "models.b.dtype.max_model_len": "vllmd.yaml:5",
        "models.b.dtype.variants.v.w": "vllmd.yaml:5",
        "models.b.dtype.variants.v.w.request.set": "vllmd.yaml:5",
    }
    assert str(origins["server.listen"]) == "environment VLLMD_SERVER_PORT"
    assert len(origins) == len(lines) == len(list(origins))
    assert origins.get("models.a.hidden") is None and "models.b.dtype" not in origins


def test_without_any_file_the_defaults_hold(tmp_path: Path) -> None:
    """A user who has configured nothing can start it all the same."""
    reading = read(None, env={"XDG_CONFIG_HOME": str(tmp_path), "VLLMD_CONFIG": ""})
    assert [p for p in reading.problems if str(tmp_path) in str(p)] == []


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "模型", "..", "a b;c", "x" * 200, "A", "a" * 39 + "/b"])
def test_instance_names_are_safe(name: str) -> None:
    """Any model name becomes a name that systemd, a path and a socket bear, another one for each run."""
    safe = instance_name(name)
    assert set(safe) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(safe) <= 47
    assert safe[0] != "-"
    assert safe != instance_name(name)
    assert fnmatchcase(f"vllmd-model-{safe}.scope", unit_pattern(name))


def test_loading_is_fast(tmp_path: Path) -> None:
    """The first request waits for this: no module beyond PyYAML and the standard library's basics is imported."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("models: {m: {devices: 0, max_model_len: 4096}}")
    code = (
        "import sys; from vllmd.config.loader import load; load(sys.argv[1], env={});"
        "print(sorted(sys.modules.keys() & {'asyncio', 'difflib', 'httpx', 'json', 'socket'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


V_CONFIG: list[tuple[str, Any, Any]] = [
    ("", lambda c: c.server.listen, ("127.0.0.1:33258", "[::1]:33258")),
    ("server: {port: 9}", lambda c: c.server.listen[0], "127.0.0.1:9"),
    ("", lambda c: (c.engines.port_start, c.engines.port_end), (33300, 34300)),
    ("engines: {port_start: 5000, port_end: 5009}", lambda c: (c.engines.port_start, c.engines.port_end), (5000, 5009)),
    ("", lambda c: c.models["m"].idle.stop_after, 1800.0),
    ("idle: {stop_after: 60}", lambda c: c.models["m"].idle.stop_after, 60.0),
    ("idle: {level: 1}", lambda c: c.models["m"].idle.level, 1),
    ("idle: {level: 2}", lambda c: c.models["m"].idle.level, 2),
    ("idle: {level: 3}", lambda c: c.models["m"].idle.sleep_after, None),
    ("engines: {home: /srv/cache}", lambda c: c.engines.home, Path("/srv/cache")),
]


@pytest.mark.parametrize(("yaml", "get", "expected"), V_CONFIG)
def test_V_config_every_setting(tmp_path: Path, yaml: str, get: Any, expected: Any) -> None:
    """Its port, the engines' ports, when and how deep an unused model sleeps, where models are kept."""
    assert get(of(tmp_path, f"models: {{m: }}\n{yaml}")) == expected


def test_V_config_dir(tmp_path: Path) -> None:
    """Another directory for the configuration, by a variable or a flag, with the models.d beside it."""
    (tmp_path / "models.d").mkdir()
    (tmp_path / "models.d" / "a.yaml").write_text("a: {engine: sim}")
    (tmp_path / "vllmd.yaml").write_text("log_level: error")
    config = load(None, {"VLLMD_CONFIG": str(tmp_path / "vllmd.yaml")})
    assert (config.log_level, list(config.models)) == ("error", ["a"])
    assert list(load(tmp_path / "vllmd.yaml", {}).models) == ["a"]


def test_rules_for_requests(tmp_path: Path) -> None:
    """Values keep their types, for they go into the engine's JSON."""
    text = "models: {m: {request: {strip: [user], set: {stop: [a], top_k: 3}, default: {temperature: 0.5}}}}"
    rules = of(tmp_path, text).models["m"].request
    assert rules == RequestRules(("user",), {"stop": ["a"], "top_k": 3}, {"temperature": 0.5})
    assert of(tmp_path, "models: {m: {}}").models["m"].request == RequestRules()


def test_adapters_variants_and_pools(tmp_path: Path) -> None:
    """A path or a list in the place of a mapping is what it needs at least."""
    text = """
models:
  m:
    adapters: {short: /lora, long: {path: org/lora, hidden: true}}
    variants:
      m:think: {request: {default: {n: 1}, system: "Think.\\nThen speak."}, description: It thinks.}
pools: {any: [m, long], all: {models: [m], hidden: true}}
"""
    config = of(tmp_path, text)
    model = config.models["m"]
    assert model.adapters == {"short": AdapterConfig("/lora"), "long": AdapterConfig("org/lora", hidden=True)}
    rules = RequestRules(default={"n": 1}, system="Think.\nThen speak.")
    assert model.variants == {"m:think": VariantConfig(rules, description="It thinks.")}
    assert config.pools == {"any": PoolConfig(("m", "long")), "all": PoolConfig(("m",), hidden=True)}


FLAGS = [
    (("--lora-modules", "a=/x", "b=/y=z", "--enable-lora"), {"a": "/x", "b": "/y=z"}),
    (("--lora_modules", '{"name": "a", "path": "/x"}'), {"a": "/x"}),
    (("--lora-modules=a=/x", "--seed", "c=/z"), {"a": "/x"}),
    (("--lora-modules", '[{"name": "a", "path": "/x"}, {"path": "/y"}]'), {"a": "/x"}),
    (("--lora-modules", "{broken", "plain"), {}),
]


@pytest.mark.parametrize(("argv", "found"), FLAGS)
def test_adapters_of_vllm_s_own_flags(argv: tuple[str, ...], found: dict[str, str]) -> None:
    """In each form that vLLM takes."""
    assert lora_modules(argv) == found


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ("[{name: ops, key: a-key-of-an-operator, scopes: [admin]}]", "nobody can use a model over the network"),
        ("[{name: ann, key: a-key-of-somebody-, models: [typo]}]", "none of them is there: ann can use no model"),
        ("[{name: ann, key: a-key-of-somebody-, models: [m, typo]}]", "there is no model 'typo'"),
        ("[{name: ann, key: a-key-of-somebody-}]", ""),
    ],
)
def test_keys_that_lock_out_are_warned_of(tmp_path: Path, keys: str, warning: str) -> None:
    """They are valid, and hardly meant."""
    said = "\n".join(of(tmp_path, f"auth: {{keys: {keys}}}\nmodels: {{m: {{}}}}").warnings)
    assert warning in said if warning else said == ""


def test_models_that_the_daemon_added_give_way_to_the_administrators(tmp_path: Path) -> None:
    """What vllmctl add wrote is read beside the files in /etc, and never makes those invalid."""
    main, added = tmp_path / "etc/vllmd.yaml", tmp_path / "state"
    (main.parent / "models.d").mkdir(parents=True)
    added.mkdir()
    main.write_text("models: {a: {model: /srv/a}}\n")
    (main.parent / "models.d/b.yaml").write_text("b: {model: /srv/b}\n")
    (added / "x.yaml").write_text("models:\n  a: {model: /other/a}\n  b: {model: /other/b}\n  c: {model: /srv/c}\n")
    reading = read(main, {"VLLMD_MODELS": str(added)})
    assert not reading.problems and reading.config.added == added
    assert {name: model.model for name, model in reading.config.models.items()} == {
        "a": "/srv/a", "b": "/srv/b", "c": "/srv/c",
    }  # fmt: skip
    assert [warning for warning in reading.config.warnings if "configured already in" in warning]
    assert set(read(main, {}).config.models) == {"a", "b"}
    assert read(main, {}).config.added == main.parent / "models.d"


@pytest.mark.parametrize("url", ["ftp://x", "https://user:pw@host", "https://host/?a=b", "-x", "https://host --evil"])
def test_an_address_to_fetch_from_is_nothing_else(tmp_path: Path, url: str) -> None:
    """It becomes a word of a command line, and is shown."""
    (tmp_path / "vllmd.yaml").write_text(f"pull: {{endpoint: '{url}'}}\n")
    assert "no address of HTTP" in str(read(tmp_path / "vllmd.yaml", {}).problems[0])


def test_a_reload_shares_models_that_are_the_same_and_takes_every_other(tmp_path: Path) -> None:
    """As JSON 1 and true are two values, and 1 and 1.0 two texts, which for Python are all equal."""
    file = tmp_path / "vllmd.yaml"
    settings = [
        "options: {a: %s}",
        "request: {set: {logprobs: %s}}",
        "variants: {v: {request: {default: {n: %s}}}}",
        "replicas: [{options: {a: %s}}]",
    ]
    for setting in settings:
        file.write_text("models:\n  same: {}\n  m: {" + setting % "1" + "}\n")
        running = load(file, env={})
        assert shared(load(file, env={}), running).models["m"] is running.models["m"]
        for value in ("true", "1.0"):
            file.write_text("models:\n  same: {}\n  m: {" + setting % value + "}\n")
            read_now = load(file, env={})
            taken = shared(read_now, running).models
            assert taken["m"] is read_now.models["m"], setting
            assert taken["same"] is running.models["same"]
