"""What ``vllmctl config show`` and ``config schema`` say, held against the loader."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from vllmd.config.loader import load, read
from vllmd.config.present import as_yaml
from vllmd.config.schema import json_schema
from vllmd.config.settings import LEGACY, ROOT, Group, default, leaves, variables
from vllmd.config.types import Config, ModelConfig, ReplicaConfig
from vllmd.core.types import WhenFree

EVERYTHING = """
server: {host: 127.0.0.1, port: 8080, idle_exit: never}
devices: [{memory: 80GiB, name: A100}, {memory: 24GiB}]
reserve: 1.5GiB
idle: {sleep_after: 10m}
policy: lru
defaults: {dtype: half, env: {A: "1"}}
models:
  Qwen/Qwen3-0.6B: {gpu_memory: 0.35, devices: [0, 1], tensor_parallel_size: 2, aliases: [q, "1.5"], idle: never}
  "no": {gpu_memory: 20GiB, command: /opt/vllm/bin/vllm, extra_args: {a: true, b: "x y"}, limits: {memory_max: 8GiB}}
  free: {when_free: true, variants: {"free:er": {request: {system: "a\\nb", set: {n: 1}}}, other: {hidden: true}}}
  tuned: {adapters: {law: /lora, art: {path: org/art, description: Art}}}
  freer: {when_free: {used_below: 4GiB, shares: none}, gpu_memory: 0.5}
  freest: {when_free: {shares: {60%: 0.5, 0.3: 0.25}}}
  模型: {engine: simengine, options: {load_time: 2.5, list: [1]}, hf_token: hf_secret, priority: 2}
pools: {any: [free, law], all: {models: [free], display_name: All}}
"""


def comparable(config: Config) -> Config:
    """Without what legitimately differs: places, warnings, hidden secrets."""
    apart = {"hf_token": None, "options": {}, "env": {}, "where": ""}
    models = {name: replace(model, **apart) for name, model in config.models.items()}  # type: ignore[arg-type]
    return replace(config, models=models, template=ModelConfig(""), files=(), added=None, warnings=())


def test_what_is_shown_is_a_configuration_that_means_the_same(tmp_path: Path) -> None:
    """The effective configuration can be read back, and holds no secret."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(EVERYTHING)
    shown = as_yaml(read(first, env={}))
    second.write_text(shown)
    assert comparable(load(second, env={})) == comparable(load(first, env={}))
    assert "hf_secret" not in shown


SECRETS = """
auth: {keys: [{name: one, key: SECRET-1}]}
defaults: {env: {HF_TOKEN: SECRET-2}}
models:
  a: {hf_token: SECRET-3, env: {OTHER: SECRET-4}, extra_args: {api-key: SECRET-5, port: 8000}}
  b: {engine: command, command: [/bin/server, --name, SECRET-6], options: {health: /SECRET-7, stop: [podman, SECRET-8]}}
  c: {engine: remote, options: {url: "http://SECRET-9/v1", key: SECRET-10}, api_key: SECRET-11}
  d: {replicas: {of: [{options: {key: SECRET-12}}, {env: {A: SECRET-13}, hf_token: SECRET-14, command: [x, SECRET-1]}]}}
"""


def test_no_value_is_shown_that_may_be_a_secret(tmp_path: Path) -> None:
    """Names are, and what is run, and flags: enough to see what is meant."""
    (tmp_path / "a.yaml").write_text(SECRETS)
    reading = read(tmp_path / "a.yaml", env={})
    shown = as_yaml(reading)
    assert "SECRET" not in shown
    assert "SECRET" not in repr(reading.config)
    for told in ("HF_TOKEN", "OTHER", "--port", "8000", "/bin/server", "health", "name: one"):
        assert told in shown


def test_each_setting_shows_its_origin(tmp_path: Path) -> None:
    """File and line, or the environment variable; nothing for a default."""
    file = tmp_path / "a.yaml"
    file.write_text("\npolicy: lru\n")
    lines = as_yaml(read(file, env={"LOG_LEVEL": "debug"})).splitlines()
    assert f"policy: lru  # {file}:2" in lines
    assert "log_level: debug  # environment LOG_LEVEL" in lines
    assert "reserve: 512MiB" in lines


def test_the_table_covers_every_field_of_the_dataclasses() -> None:
    """No setting without a row, no row without its field."""
    own = {
        Config: {"files", "added", "warnings", "unfit", "origins", "template", "templates"},
        ModelConfig: {"name", "where", "replica_of"},
        ReplicaConfig: {"of"},
    }
    seen = {leaf.group.target: leaf.group for leaf in leaves()}
    for target, group in seen.items():
        rows = {row.field or row.name for row in group.rows if row.field is not None}
        exact = {field.name for field in fields(target)} - own.get(target, set()) - {"digest"}
        if target is not ModelConfig or "model" in rows:
            assert rows == exact, target


def test_every_row_is_documented_and_has_a_default_that_can_be_shown() -> None:
    """The manual and the schema are drawn from these."""
    for leaf in leaves():
        assert leaf.row.doc.endswith("."), leaf.path
        if not isinstance(leaf.row.kind, Group):
            assert leaf.row.kind.accepts, leaf.path
            if leaf.row.field is not None and default(leaf.group, leaf.row) is not None:
                assert leaf.default_text(), leaf.path


def test_legacy_names_lead_to_settings_that_exist() -> None:
    """The documents' sections and variables point into the table."""
    paths = {leaf.path for leaf in leaves()}
    assert {row.path for row in LEGACY} <= paths
    assert set(variables().values()) <= paths


def test_the_schema_knows_every_key() -> None:
    """In every spelling, and no other."""
    schema = json_schema()
    model = schema["properties"]["models"]["additionalProperties"]["anyOf"][0]
    assert {"gpu_memory", "gpu_memory_utilization", "model_path", "hf_token"} <= set(model["properties"])
    assert model["additionalProperties"] is False
    assert set(schema["properties"]) == {*ROOT.names(), "gpu", "proxy"}
    assert schema["properties"]["reserve"]["description"] == (
        "Memory of each device that is never promised to models. Accepted: 0 or a size such as 512MiB. Default: 512MiB."
    )


def test_the_defaults_are_shown_where_models_are_yet_to_be_found(tmp_path: Path) -> None:
    """Models of the cache get them, so what is shown without them would mean something else."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "discover: true\ndefaults: {warm_up: true, priority: 3, when_free: true}\n"
        "models: {a: {warm_up: false, when_free: false}}\n"
    )
    second.write_text(as_yaml(read(first, env={})))
    again = load(second, env={})
    assert (again.template.warm_up, again.template.priority) == (True, 3)
    assert again.template.when_free == WhenFree()
    assert (again.models["a"].warm_up, again.models["a"].when_free) == (False, None)
