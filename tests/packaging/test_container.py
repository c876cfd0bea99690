"""The container images, as far as that goes without building them: read, and their steps run in a machine.

`make images` builds both and runs them (test_images.py).

P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.machine.container import REPOSITORY, Machine
from tests.packaging.containerfile import Step, read

FOLDER = REPOSITORY / "packaging/container"
FILES = [FOLDER / "Containerfile", FOLDER / "Containerfile.plain"]
SIM = "devices: []\nmodels: {m: {engine: sim}}\n"
ASK = (
    "curl -sSf --max-time 60 http://127.0.0.1:33258/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "m", "prompt": "from outside"}'"""
)
# The machine has no network: apt-get installs a file, and says of a package whether it is one that the tree has.
APT_GET = """#!/bin/sh
[ "$1" = install ] || exit 0
shift
for word; do case $word in
    /*) dpkg --install "$word" ;;
    -* | python3-venv) ;;
    *) dpkg-query --show --showformat='${db:Status-Status}\\n' "$word" | grep -qx installed ;;
esac || exit 1; done
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_linter_would_say(path: Path) -> None:
    """Pinned base, one layer per apt-get with its lists removed, JSON forms, no ADD, sources that exist."""
    steps = read(path)
    named = {name: [step for step in steps if step.name == name] for name in {step.name for step in steps}}
    assert steps[0].name == "FROM"
    assert re.fullmatch(r"[a-z]+:[a-z0-9.-]+", steps[0].text)
    assert ":latest" not in steps[0].text
    for step in named["RUN"]:
        if "apt-get" in step.text:
            assert re.match(
                r"apt-get update && apt-get install -y --no-install-recommends .*rm -rf .*/lists/\*", step.text
            )
        assert "sudo" not in step.text
    assert all("--no-cache-dir" in step.text for step in named["RUN"] if "pip install" in step.text)
    assert all(step.argv() for name in ("CMD", "ENTRYPOINT", "HEALTHCHECK") for step in named.get(name, []))
    assert len(named["CMD"]) == len(named["HEALTHCHECK"]) == len(named["STOPSIGNAL"]) == 1
    for step in named["COPY"]:
        source = step.text.split()[0]
        assert source.startswith("out/deb-bookworm/") or (REPOSITORY / source).exists(), source


def test_the_package_that_is_copied_is_the_one_that_is_built(package: Path) -> None:
    """Its version is in the file's name."""
    assert f"COPY {package.relative_to(REPOSITORY)} " in FILES[0].read_text()


def test_P_compose_file_builds_these_images() -> None:
    """Build files and mounted files exist, volumes are declared, ports are published on loopback only."""
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    for service in compose["services"].values():
        context = FOLDER / service["build"]["context"]
        assert (context / service["build"]["dockerfile"]).resolve() in FILES
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for source, _, _ in (volume.partition(":") for volume in service["volumes"]):
            assert source in compose["volumes"] or (FOLDER / source).exists()


def carry_out(machine: Machine, steps: list[Step]) -> str:
    """Run and copy as a build would; returns the environment as shell words. What needs the network is left out."""
    machine.write("/usr/local/sbin/apt-get", APT_GET, mode="755")
    environment: dict[str, str] = {}
    for step in steps:
        if step.name == "RUN" and not re.search("(?:engine|pip) install", step.text):
            words = "".join(f"export {key}={shlex.quote(value)}; " for key, value in environment.items())
            machine.run(["sh", "-euc", words + step.text], timeout=120)
        elif step.name == "COPY":
            copy(machine, *step.text.split())
        elif step.name == "ENV":
            environment |= step.pairs()
    return " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())


def copy(machine: Machine, source: str, target: str) -> None:
    files = [REPOSITORY / source]
    if files[0].is_dir():
        files = [path for path in files[0].rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in files:
        inside = Path(target) / path.relative_to(REPOSITORY / source) if path != REPOSITORY / source else Path(target)
        machine.copy_in(path, str(inside))


@pytest.mark.machine
def test_P_compose_plain_image_serves(boot_machine: Callable[..., Machine]) -> None:
    """Its steps, its user, its command: a request is answered, it is healthy, and its end leaves nothing."""
    machine, steps = boot_machine(), read(FILES[1])
    environment = carry_out(machine, steps)
    machine.write("/etc/vllmd/vllmd.yaml", SIM)
    last = {step.name: step for step in steps}
    command = shlex.join(last["ENTRYPOINT"].argv() + last["CMD"].argv())
    user = last["USER"].text
    served = machine.popen(f"exec setpriv --reuid={user} --regid={user} --init-groups env {environment} {command}")
    machine.wait_until(shlex.join(last["HEALTHCHECK"].argv()))
    assert "from outside" in machine.out(ASK)
    assert machine.out("ss -Hltn sport = :33258").split()[3] == "0.0.0.0:33258"
    machine.run(f"pkill -TERM -u {user} -f 'vllmd serve'")
    assert served.wait(120) == 0
    machine.wait_until(f"! pgrep -u {user}")


@pytest.mark.machine
def test_P_compose_systemd_image_serves(boot_machine: Callable[..., Machine], package: Path) -> None:
    """The same of the one with systemd: booted, it listens for the world outside, and the first request wakes it."""
    machine, steps = boot_machine(), read(FILES[0])
    carry_out(machine, steps)
    machine.write("/etc/vllmd/vllmd.yaml", SIM)
    machine.reboot()
    last = {step.name: step for step in steps}
    machine.run(last["HEALTHCHECK"].argv())
    assert machine.out("systemctl is-active vllmd.service || true") == "inactive"
    assert "*:33258" in machine.out("ss -Hltn sport = :33258")
    assert "from outside" in machine.out(ASK)
