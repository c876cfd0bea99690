"""vLLM's own tests of its HTTP side, of its source archive, against vLLM and through vllmd: what differs is ours.

usage: python -m tests.clients.vllm_tests [FILE ...]     packaging/dev/setup vllm model vllm-tests

Its tests of LoRA adapters, of tokenizers and of Anthropic's API, with our tiny model in the place of theirs, so not all
of them pass directly. ``tests/clients/vllm.md`` is made anew; the exit status is 1 if one passes directly only.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.engines import lora
from tests.machine import container

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = Path(__file__).with_name("vllm.md")
FILES = (
    "tests/entrypoints/anthropic/test_messages.py",
    "tests/entrypoints/serve/lora/test_lora_adapters.py",
    "tests/entrypoints/serve/tokenize/test_tokenization.py",
)
NAMES = ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct")  # of the models that the tests ask for
LIMIT = 1500.0  # seconds for a file, its engine's start included
LINE = re.compile(r"^(PASSED|FAILED|ERROR) (?:\S*::)(\S+)", re.MULTILINE)
ABOUT = """
The tests of vLLM's source archive against vLLM on a CPU, and against vllmd with the same vLLM behind it. The model is a
tiny one of random weights instead of theirs, so some fail directly, too.
"""


def outcomes(file: str, *, through: bool, place: Path) -> dict[str, str]:
    """Each test of the file with PASSED, FAILED or ERROR."""
    cache = container.cache()
    adapters = [str(lora.write(place / f"adapter{seed}", seed=seed)) for seed in (1, 2)]
    how = {
        "through": through,
        "models": dict.fromkeys(NAMES, str(cache / "tiny-model")),
        "python": sys.executable,
        "repository": str(REPOSITORY),
        "log": str(place),
        "adapters": adapters,
    }
    environment = {**os.environ, "VLLMD_TESTS": json.dumps(how), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": f"{place / 'vllm'}:{cache / 'vllm-tests/site'}", "XDG_RUNTIME_DIR": str(place)}
    argv = [str(cache / "vllm/bin/python"), "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        argv,
        cwd=place / "vllm",
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
    (place / f"{Path(file).stem}-{'vllmd' if through else 'vllm'}.log").write_text(done.stdout + done.stderr)
    found = {name: what for what, name in LINE.findall(done.stdout)}
    if not found:
        raise SystemExit(f"{file} did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return found


def prepared(place: Path) -> None:
    """vLLM's tests in a folder, with our side in the place of what starts its servers and brings models."""
    shutil.copytree(container.cache() / "vllm-tests/tests", place / "vllm/tests")
    for file in (place / "vllm/tests").rglob("conftest.py"):  # they fetch adapters from the hub
        file.unlink()
    for file in Path(__file__).with_name("vllm_side").glob("*.py"):
        shutil.copy(file, place / "vllm/tests" / file.name)
    for file in (place / "vllm/tests").rglob("*.py"):
        text = file.read_text()
        for name in NAMES:  # what they load besides, such as its tokenizer, is the tiny model's
            text = text.replace(
                f'get_tokenizer(tokenizer_name="{name}"', f'get_tokenizer("{container.cache()}/tiny-model"'
            )
        file.write_text(text)


def page(rows: Mapping[str, Sequence[tuple[str, str, str]]]) -> str:
    """The table."""
    lines = [
        "# vLLM's own tests, directly and through vllmd",
        "",
        textwrap.fill(
            f"{ABOUT.strip()} Made by `python -m tests.clients.vllm_tests`, {datetime.date.today():%Y-%m-%d}.", 120
        ),
        "",
        "| file | passed directly | passed through vllmd | failed through vllmd only |",
        "|---|---|---|---|",
    ]
    notes = []
    for file, tests in rows.items():
        only = [name for name, direct, through in tests if direct == "PASSED" != through]
        counts = [sum(one[at] == "PASSED" for one in tests) for at in (1, 2)]
        lines.append(f"| {file.removeprefix('tests/')} | {counts[0]} of {len(tests)} | {counts[1]} | {len(only)} |")
        notes += [f"- {name}" for name in only]
    return "\n".join([*lines, "", *notes, ""])


def main(wanted: Sequence[str]) -> int:
    """Run, and write the page."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    with tempfile.TemporaryDirectory(prefix="vllm-tests-") as name:
        place = Path(name)
        prepared(place)
        for file in FILES:
            if wanted and not any(each in file for each in wanted):
                continue
            direct, through = (outcomes(file, through=way, place=place) for way in (False, True))
            rows[file] = [(test, what, through.get(test, "missing")) for test, what in direct.items()]
            print(page(rows), flush=True)
    PAGE.write_text(page(rows))
    return int(any(line.startswith("- ") for line in page(rows).splitlines()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
