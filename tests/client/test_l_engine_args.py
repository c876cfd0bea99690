"""L's VLLMEngineArgs: any argument of vLLM, by its right name and in its right form.

L is the Python library: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import RealVllm
from vllmd.client import ServerManager, VLLMEngineArgs
from vllmd.client.vllm_arguments import LISTS, NAMES, ONLY_ON, SWITCHES


def words(**arguments: object) -> str:
    return " ".join(VLLMEngineArgs(model="org/m", **arguments).argv())


def test_L_false_lists_mappings_and_none() -> None:
    """L's own dropped an explicit False and wrote ``--x []``."""
    assert words(enforce_eager=True, enable_prefix_caching=False) == "--enforce-eager --no-enable-prefix-caching"
    assert words(allowed_media_domains=["a.org", "b.org"]) == "--allowed-media-domains a.org b.org"
    assert words(allowed_media_domains=[], seed=None, disable_log_stats=False) == ""
    assert words(middleware=["a.b", "c.d"]) == "--middleware a.b --middleware c.d"
    assert words(limit_mm_per_prompt={"image": 2}) == '--limit-mm-per-prompt {"image": 2}'
    assert words(hf_overrides={}, chat_template=Path("/t.jinja")) == "--hf-overrides {} --chat-template /t.jinja"


def test_L_a_name_that_vllm_does_not_have() -> None:
    """The nearest one is offered; what a newer vLLM has still gets through."""
    with pytest.raises(TypeError, match="did you mean 'max_model_len'"):
        VLLMEngineArgs(model="m", max_modle_len=1)
    with pytest.raises(TypeError, match="extra_args"):
        VLLMEngineArgs(model="m", xyzzy=1)
    assert VLLMEngineArgs(model="m", extra_args=["--xyzzy", "1"]).argv() == ["--xyzzy", "1"]


@pytest.mark.parametrize("wrong", [{"enforce_eager": "yes"}, {"max_model_len": True}])
def test_L_a_value_of_the_wrong_kind(wrong: dict[str, object]) -> None:
    """Found when it is written, not when vLLM has been started."""
    with pytest.raises(TypeError, match=next(iter(wrong))):
        VLLMEngineArgs(model="m", **wrong)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/home/models/Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("/home/models/Qwen/Qwen2.5-0.5B-Instruct/", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("/gpt2/", "gpt2"),
        ("/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de2", "Qwen/Qwen3-0.6B"),
    ],
)
def test_L_server_name(model: str, name: str) -> None:
    """org/name from the path; a name of one part was an IndexError in L."""
    assert ServerManager(VLLMEngineArgs(model=model)).server_name == name


def test_L_server_name_can_be_given() -> None:
    """Explicitly, or as vLLM calls it."""
    assert ServerManager(VLLMEngineArgs(model="org/m"), server_name="mine").server_name == "mine"
    assert ServerManager(VLLMEngineArgs(model="org/m", served_model_name=["a", "b"])).server_name == "a"


def test_a_model_that_is_none() -> None:
    with pytest.raises(TypeError, match="Qwen"):
        VLLMEngineArgs(model="/")


def test_where_the_engine_listens_is_ours(tmp_path: Path) -> None:
    """An argument that would be overruled is refused."""
    with pytest.raises(TypeError, match=r"host.*leave it out"):
        ServerManager(VLLMEngineArgs(model="m", host="0.0.0.0"))


@dataclass
class EngineArgs:
    """Like vLLM's own: a dataclass with a default for everything."""

    model: str = "facebook/opt-125m"
    max_model_len: int | None = None
    enforce_eager: bool = False
    allowed_media_domains: list[str] = field(default_factory=list)


def test_vllms_own_engine_args_do() -> None:
    """What is not at its default counts."""
    given = VLLMEngineArgs.of(EngineArgs(model="org/m", max_model_len=8))
    assert given == VLLMEngineArgs(model="org/m", max_model_len=8)
    assert VLLMEngineArgs.of({"model": "org/m", "max_model_len": 8}) == given
    assert given.max_model_len == 8
    with pytest.raises(TypeError, match="not int"):
        VLLMEngineArgs.of(5)


REAL = """
import json
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
actions = [a for a in parser._actions if a.dest != "help" and any(o[:2] == "--" for o in a.option_strings)]
print(json.dumps({a.dest: [type(a).__name__, a.nargs] for a in actions}))
"""


@pytest.mark.vllm
def test_L_the_table_is_vllms_own(real_vllm: RealVllm) -> None:
    """Every argument of the vLLM that is installed, by what it takes."""
    done = subprocess.run([real_vllm.command.with_name("python"), "-c", REAL], capture_output=True, text=True)
    actions = json.loads(done.stdout.splitlines()[-1])
    assert set(actions) == NAMES
    assert {name for name, (kind, _) in actions.items() if kind == "BooleanOptionalAction"} == SWITCHES
    assert {name for name, (kind, _) in actions.items() if kind == "_StoreTrueAction"} == ONLY_ON
    assert {name for name, (_, nargs) in actions.items() if nargs == "+"} == LISTS
