"""``defaults``: what models of one kind of engine get, and what all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vllmd.config.loader import load, read
from vllmd.config.runtime_model import runtime_model
from vllmd.config.schema import json_schema
from vllmd.config.types import Config
from vllmd.errors import ConfigError

TWO_KINDS = """
defaults:
  command: /opt/vllm/bin/vllm
  extra_args: {max-num-seqs: 8}
  env: {A: all}
  dtype: half
  vllm: {max_model_len: 4096}
  llama.cpp:
    extra_args: {flash-attn: "on"}
    options: {parallel: 2}
    idle: {stop_after: 5m}
models:
  plain: {}
  small: {engine: llama.cpp, model: /a.gguf, options: {gpu_layers: 0}}
  same: {engine: llama-server, model: /a.gguf}
  other: {engine: sglang}
"""


def of(folder: Path, text: str) -> Config:
    file = folder / "vllmd.yaml"
    file.write_text(text)
    return load(file, env={})


def test_what_is_an_engines_own_stays_with_its_kind(tmp_path: Path) -> None:
    """A command and flags for vLLM reach no llama.cpp; what is not an engine's own reaches everybody."""
    config = of(tmp_path, TWO_KINDS)
    plain, small, same, other = (config.models[name] for name in ("plain", "small", "same", "other"))
    assert (plain.command, plain.extra_args) == (("/opt/vllm/bin/vllm",), ("--max-num-seqs", "8"))
    assert (small.command, small.extra_args) == ((), ("--flash-attn", "on"))
    assert (small.options, same.options) == ({"parallel": 2, "gpu_layers": 0}, {"parallel": 2})
    assert (other.command, other.extra_args, other.options) == ((), (), {})
    assert [m.max_model_len for m in (plain, small, other)] == [4096, None, None]
    assert [m.idle.stop_after for m in (plain, same)] == [1800.0, 300.0]
    assert all((m.dtype, m.env) == ("half", {"A": "all"}) for m in (plain, small, same, other))


def test_their_own_engine_may_be_another_than_vllm(tmp_path: Path) -> None:
    """Then its flags are for that one; a replica of another kind has those of its kind."""
    text = "defaults: {engine: sim, options: {load_time: 1s}, remote: {options: {key_file: k}}}\n"
    config = of(tmp_path, text + "models: {a: {replicas: [{}, {engine: remote, options: {url: 'http://x'}}]}}")
    replicas = config.models["a"].replicas
    assert replicas
    first, second = replicas.of
    assert first.options == {"load_time": "1s"}
    assert second.options == {"key_file": "k", "url": "http://x"}


def test_a_program_that_puts_a_model_gets_them_too(tmp_path: Path) -> None:
    """By the kind that it asks for."""
    config = of(tmp_path, TWO_KINDS)
    put = runtime_model("b", {"engine": "llama.cpp", "model": "/b.gguf"}, config, trusted=True)
    assert (put.command, put.extra_args, put.options) == ((), ("--flash-attn", "on"), {"parallel": 2})
    assert runtime_model("c", {"engine": "sglang"}, config, trusted=True).command == ()
    assert runtime_model("d", {}, config, trusted=True).command == ("/opt/vllm/bin/vllm",)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "defaults: {llama.ccp: {dtype: half}}",
            'defaults.llama.ccp: there is no such setting; did you mean "llama.cpp"',
        ),
        ("defaults: {llama.cpp: {dtyp: half}}", 'defaults.llama.cpp.dtyp: there is no such setting; .*"dtype"'),
        ("defaults: {llama.cpp: {engine: vllm}}", "defaults.llama.cpp.engine: there is no such setting"),
        ("defaults: {llama.cpp: {max_model_len: no}}", "defaults.llama.cpp.max_model_len: "),
        ("defaults: {vllm: 3}", "defaults.vllm: .* is not a mapping"),
        ("defaults: {command: {options: {health: /x}, nonsense: 1}}", "defaults.command.nonsense: there is no such"),
    ],
)
def test_what_has_no_place_there_is_named(tmp_path: Path, text: str, what: str) -> None:
    """With its full path, and the nearest kind or setting."""
    with pytest.raises(ConfigError, match=what):
        of(tmp_path, text)


def test_a_setting_and_a_kind_are_both_called_command(tmp_path: Path) -> None:
    """A text or a list is the program, a mapping is for the kind."""
    config = of(
        tmp_path, "defaults: {command: {options: {health: /x}}}\nmodels: {a: {engine: command, command: [b]}, c: }"
    )
    assert config.models["a"].options == {"health": "/x"}
    assert config.models["c"].command == ()


def test_defaults_for_nobody_are_doubted(tmp_path: Path) -> None:
    """They used to be for everybody."""
    file = tmp_path / "vllmd.yaml"
    file.write_text("defaults: {extra_args: {ctk: q8_0}}\nmodels: {a: {engine: llama.cpp, model: /a.gguf}}")
    (warning,) = read(file, env={}).config.warnings
    assert warning.endswith("there are none; for others it belongs in defaults.llama.cpp.extra_args")
    assert f"{file}:1: defaults.extra_args: it is for models of the engine vllm" in warning


def test_editors_know_them() -> None:
    """The schema takes what the loader takes."""
    schema: Any = json_schema()
    jsonschema.validate(yaml.safe_load(TWO_KINDS), schema)
    jsonschema.validate({"defaults": {"command": {"options": {"health": "/x"}}}}, schema)
    for wrong in ({"llama.cpp": {"dtyp": "half"}}, {"nonsense": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"defaults": wrong}, schema)
