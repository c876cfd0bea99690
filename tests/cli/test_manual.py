"""The manual, the completions and the schema: drawn from the tables, up to date, and correct."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllmd.api.verbs import VERBS
from vllmd.cli.arguments import build, verbs
from vllmd.cli.completion import script, table
from vllmd.config.engine_kinds import ENGINE_KINDS
from vllmd.config.loader import load
from vllmd.config.settings import leaves
from vllmd.engines import BUILT_IN

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ["vllmd.8", "vllmctl.1", "vllmd.yaml.5", "vllmd-launcher.8", "vllmd-python.3"]
NOT_OURS = ("referenced manual not found", "outdated mandoc.db")  # of pages that are not installed here


def test_what_is_generated_is_up_to_date() -> None:
    """Whoever changes a setting or a verb runs man/generate."""
    done = subprocess.run([sys.executable, REPOSITORY / "man/generate", "--check"], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.skipif(not shutil.which("mandoc"), reason="needs mandoc")
@pytest.mark.parametrize("page", PAGES)
def test_mandoc_finds_nothing(page: str) -> None:
    """Not even of style."""
    command = ["mandoc", "-T", "lint", "-W", "style", REPOSITORY / "man" / page]
    said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in said if not any(each in line for each in NOT_OURS)] == []


def rendered(page: str) -> str:
    """The page as people read it, without emphasis."""
    text = subprocess.run(["mandoc", REPOSITORY / "man" / page], capture_output=True, text=True).stdout
    return re.sub(r".\x08", "", text)


@pytest.mark.skipif(not shutil.which("mandoc"), reason="needs mandoc")
def test_every_setting_and_every_verb_is_in_the_manual() -> None:
    """A page that leaves one out is a bug."""
    settings, commands = rendered("vllmd.yaml.5"), rendered("vllmctl.1")
    assert [leaf.path for leaf in leaves() if not re.search(rf"\b{leaf.row.name}\b", settings)] == []
    assert [verb for verb in verbs() if not re.search(rf"^     {verb}\b", commands, re.M)] == []


def test_every_engine_kind_is_in_the_manual() -> None:
    """With its options."""
    template = (REPOSITORY / "man/vllmd.yaml.5.in").read_text()
    assert [name for name in BUILT_IN if not re.search(rf"^\.Ss .*\b{name}\b", template, re.M)] == []


@pytest.mark.skipif(not shutil.which("mandoc"), reason="needs mandoc")
def test_values_are_spelt_as_they_are_written() -> None:
    """Whoever copies True or Auto out of the manual gets an error."""
    assert re.findall(r"^ +(?:True|False|Auto|Cls|Bnb-\S+)(?:[:,]| \(| or ).*", rendered("vllmd.yaml.5"), re.M) == []


def test_every_engine_kind_is_told_how_it_is_reached() -> None:
    """Who can connect to an engine is what a lab decides by; a kind that is left out looks as if nobody could."""
    for page in ("SECURITY.md", "man/vllmd.8.in"):
        text = (REPOSITORY / page).read_text()
        kinds = [kind for kind in ENGINE_KINDS if kind != "remote" or page == "SECURITY.md"]
        assert [kind for kind in kinds if not re.search(rf"(?<![\w.]){re.escape(kind)}\b", text)] == [], page


def test_every_method_of_the_clients_is_in_the_manual() -> None:
    """The one list of operators' verbs that is written by hand."""
    template = (REPOSITORY / "man/vllmd-python.3.in").read_text()
    listed = {name for line in re.findall(r"^\.It (.*)", template, re.M) for name in line.split(", ")}
    assert [row.python.name for row in VERBS if row.python and row.python.name not in listed] == []


def examples(page: str) -> list[str]:
    """The literal blocks of a template."""
    return re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", (REPOSITORY / "man" / f"{page}.in").read_text(), re.M | re.S)


def test_the_examples_in_the_manual_are_valid(tmp_path: Path) -> None:
    """What people copy works."""
    (tmp_path / "hf-token").write_text("hf_x")
    found = [text for text in examples("vllmd.yaml.5") if "models:" in text]
    assert len(found) == 11
    for text in found:
        file = tmp_path / "vllmd.yaml"
        file.write_text(text)
        assert load(file, env={}).models or "pull:" in text


@pytest.mark.parametrize("file", sorted((REPOSITORY / "packaging/examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_examples_are_valid(file: Path, tmp_path: Path) -> None:
    """As they are."""
    assert load(file, env={}).warnings == ()


def test_the_schema_is_shipped() -> None:
    """Where the manual says that editors find it."""
    schema = json.loads((REPOSITORY / "packaging/examples/vllmd.schema.json").read_text())
    assert "models" in schema["properties"]


def test_every_verb_has_help_and_documented_arguments() -> None:
    """vllmctl VERB --help leaves no question."""
    for verb in table():
        assert verb.about, verb.name
        assert [spellings for spellings, about, _ in verb.options if not about] == [], verb.name


def complete(words: str, tmp_path: Path, models: str = "") -> list[str]:
    """What bash offers at the end of ``words``."""
    fake = tmp_path / "vllmctl"
    fake.write_text(f"#!/bin/sh\nprintf '%s\\n' {models}\n")
    fake.chmod(0o755)
    (tmp_path / "completion").write_text(script("bash"))
    ask = (
        f'source {tmp_path}/completion; COMP_WORDS=({words} ""); [[ "{words}" == *" " ]] || unset "COMP_WORDS[-1]";'
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _vllmctl; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", ask], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split()


BASH = [
    ("vllmctl wake", ["wake", "wake-up", "wake_up", "wakeup"]),
    ("vllmctl sleep --l", ["--level"]),
    ("vllmctl config ", ["check", "schema", "show"]),
    ("vllmctl stop q", ["qwen"]),
    ("vllmctl --json ps --ru", ["--running"]),
]


@pytest.mark.parametrize(("words", "expected"), BASH)
def test_bash_completes(words: str, expected: list[str], tmp_path: Path) -> None:
    """Verbs, flags, words and the models' names."""
    found = complete(words, tmp_path, "qwen llama")
    assert sorted(word for word in found if not (words.endswith(" ") and word.startswith("-"))) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_verb(shell: str) -> None:
    """Generated from the same table; checked by the shell itself where it is installed."""
    text = script(shell)
    assert [verb.name for verb in table() if verb.name not in text] == []
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=text, capture_output=True, text=True).stderr == ""


def test_the_parser_of_all_verbs_can_be_built() -> None:
    """No alias is another verb's name."""
    assert build(verbs()).format_help()
