"""Every way to install it but the packages, on one machine without a network: each ends with a real model's answer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.machine import container
from tests.machine.container import REPOSITORY, CannotBoot, Machine
from tests.packaging.test_pip import sources

pytestmark = [pytest.mark.machine, pytest.mark.llama]

WHEELS = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
SMOLLM2 = "models: {smollm2: {engine: llama.cpp, model: /srv/smollm2.gguf, max_model_len: 512}}\n"
ASK = (
    "curl -sSf --max-time 120 http://127.0.0.1:%d/v1/chat/completions -H 'Content-Type: application/json' -d "
    """'{"model": "smollm2", "max_tokens": 12, "temperature": 0, """
    """"messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]}'"""
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with a checkout, wheels of what vllmd depends on, llama.cpp and a model."""
    wheels, llama = container.cache() / "wheels", container.cache() / "llama"
    if not ((wheels / ".vllmd-stamp").exists() and (llama / ".vllmd-stamp").exists()):
        pytest.skip("no wheels here: packaging/dev/setup wheels llama")
    binds = {wheels: "/srv/wheels", llama / "llama.cpp": "/var/lib/vllmd/engines/llama.cpp"}
    binds[next(llama.glob("SmolLM2-*.gguf"))] = "/srv/smollm2.gguf"
    archive = tmp_path_factory.mktemp("checkout") / "sources.tar"
    archive.write_bytes(sources("packaging", "units", "man"))
    try:
        with container.booted(binds=binds) as machine:
            machine.copy_in(archive, "/root/sources.tar")
            machine.run("mkdir /root/vllmd && tar -xf /root/sources.tar -C /root/vllmd")
            machine.write("/etc/vllmd/vllmd.yaml", SMOLLM2)
            yield machine
    except CannotBoot as reason:
        pytest.skip(f"no container: {reason}")


def answers(machine: Machine, port: int) -> bool:
    return "The capital of France is Paris." in machine.out(ASK % port, timeout=180)


def test_from_a_checkout(machine: Machine) -> None:
    """packaging/install: its units start what it installed in /usr/local, where no package puts anything."""
    machine.run("/root/vllmd/packaging/install", env=WHEELS, timeout=300)
    assert answers(machine, 33258)
    assert "path=/usr/local/bin/vllmd " in machine.show("vllmd.service", "ExecStart")
    assert "path=/usr/local/bin/vllmctl " in machine.show("vllmd.service", "ExecReload")
    assert "path=/usr/local/bin/vllmd-launcher " in machine.show("vllmd-launcher.service", "ExecStart")
    assert "/usr/local/bin/vllmctl engine serve" in machine.out("systemctl cat vllmd-installer@.service")
    machine.run("systemctl reload vllmd.service")
    refused = machine.run("vllmctl engine rollback vllm", check=False)  # the service starts, and answers
    assert (refused.returncode, "no version of vllm was in use before" in refused.stderr) == (65, True)


def test_a_users_own_beside_the_systems(machine: Machine) -> None:
    """Two cannot have one port: doctor says so, with a line that gives the user's its own, and that line works."""
    machine.add_user("ada")
    machine.write("/home/ada/.config/vllmd/vllmd.yaml", SMOLLM2)
    machine.run("chown -R ada: /home/ada/.config")
    assert machine.run("systemctl --user start vllmd.socket", user="ada", check=False).returncode == 1
    said = machine.run("vllmctl --user doctor", user="ada", check=False).stdout
    told = next(line for line in said.splitlines() if "the port is that of the system's vllmd" in line)
    machine.run(told.partition("give yours its own: ")[2], user="ada")
    assert answers(machine, 33259)
    listed = machine.out("vllmctl --user ps", user="ada")
    assert "running" in listed
    assert machine.out("pgrep -c -u ada -f xllamacpp_server") == "1"
    machine.run("systemctl --user stop vllmd.socket vllmd.service vllmd.slice", user="ada", timeout=120)


@pytest.mark.parametrize("way", ["pip", "pipx"])
def test_the_commands_alone(machine: Machine, way: str) -> None:
    """Into an environment of a user's own, by pip or by pipx; `vllmd serve` is all that it takes."""
    home = f"/home/{way}"
    machine.run(f"useradd --create-home {way} && cp -r /root/vllmd {home}/vllmd && chown -R {way}: {home}/vllmd")
    machine.write(f"{home}/.config/vllmd/vllmd.yaml", SMOLLM2)
    machine.run(f"chown -R {way}: {home}/.config")
    with_pip = "python3 -m venv ~/env && ~/env/bin/pip -q install"
    if way == "pip":
        machine.run(f"{with_pip} ~/vllmd", user=way, env=WHEELS, timeout=300)
    else:
        machine.run(f"{with_pip} pipx && ~/env/bin/pipx install ~/vllmd", user=way, env=WHEELS, timeout=300)
    command = "~/env/bin/vllmd" if way == "pip" else "~/.local/bin/vllmd"
    served = machine.popen(f"exec {command} serve --port 8099", user=way, env={"XDG_RUNTIME_DIR": "/tmp"})
    machine.wait_until("curl -sf http://127.0.0.1:8099/health")
    assert answers(machine, 8099)
    machine.run(f"pkill -TERM -u {way} -f 'vllmd serve'")
    assert served.wait(120) == 0


def test_another_prefix_and_removal(machine: Machine) -> None:
    """Below a folder in which systemd looks for no units these are in /etc; removed, nothing is left but data."""
    machine.run("/root/vllmd/packaging/install --remove", timeout=120)
    left = "ls /usr/local/bin/vllm* /usr/local/lib/systemd/system/* /usr/local/share/man/man8/*"
    assert machine.run(left, check=False).stdout == ""
    assert machine.cgroup_pids("vllmd.slice") == []
    machine.run("PREFIX=/opt/vllmd /root/vllmd/packaging/install", env=WHEELS, timeout=300)
    assert answers(machine, 33258)
    assert "path=/opt/vllmd/bin/vllmd " in machine.show("vllmd.service", "ExecStart")
    machine.run("PREFIX=/opt/vllmd /root/vllmd/packaging/install --remove", timeout=120)
    assert machine.run("ls /opt/vllmd/bin/* /etc/systemd/system/vllmd*", check=False).stdout == ""
    refused = subprocess.run(
        ["bash", REPOSITORY / "packaging/install"], env={"PREFIX": "opt", "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert b"PREFIX must begin with /" in refused.stderr
