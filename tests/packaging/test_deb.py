"""The .deb on a booted Debian 12: what installing, upgrading, removing and purging do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RealLlama
from tests.machine import container
from tests.machine.container import REPOSITORY, Machine

pytestmark = pytest.mark.machine

SOCKETS = ("vllmd.socket", "vllmd-admin.socket", "vllmd-read.socket", "vllmd-installer.socket")
SERVICES = ("vllmd.service", "vllmd-launcher.service")
MODELS = "models:\n  rehearsal: {engine: sim, idle: never, options: {tokens_per_second: 20}}\n"
ASK = (
    "curl -sSf --max-time 60 http://127.0.0.1:33258/v1/chat/completions -H 'Content-Type: application/json' "
    """-d '{"model": "rehearsal", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}'"""
)


def states(machine: Machine, verb: str, *units: str) -> list[str]:
    """What `systemctl is-active` or `is-enabled` says of units."""
    return machine.run(["systemctl", verb, *units], check=False).stdout.split()


def engine_pids(machine: Machine) -> list[str]:
    return machine.run("pgrep -f vllmd.simengine", check=False).stdout.split()


def test_listens_without_running(installed_machine: Machine) -> None:
    """A machine at rest pays for nothing but sockets."""
    assert states(installed_machine, "is-active", *SOCKETS) == ["active"] * 4
    assert states(installed_machine, "is-enabled", *SOCKETS) == ["enabled"] * 4
    assert states(installed_machine, "is-active", *SERVICES) == ["inactive"] * 2
    assert "127.0.0.1:33258" in installed_machine.out("ss -ltn")
    assert "[::1]:33258" in installed_machine.out("ss -ltn")


def test_listens_again_after_a_boot(boot_machine: Callable[..., Machine], package: Path) -> None:
    """Enabled means: also tomorrow."""
    machine = boot_machine()
    container.install(machine, package)
    machine.reboot()
    assert states(machine, "is-active", *SOCKETS) == ["active"] * 4
    assert states(machine, "is-active", *SERVICES) == ["inactive"] * 2


def test_makes_its_users(installed_machine: Machine) -> None:
    """The daemon and the engines run as nobody important; only the daemon reaches engines' sockets."""
    groups = installed_machine.show("vllmd.service", "SupplementaryGroups")
    assert groups == "vllmd-engine vllmd-sockets vllmd-admin"
    assert "vllmd" not in installed_machine.out("id -Gn vllmd-engine").split()
    assert installed_machine.out("getent group vllmd-sockets | cut -d: -f4") == ""
    for folder in ("/run/vllmd-engine", "/var/lib/vllmd-engines"):
        assert installed_machine.out(f"stat -c '%U %G %a' {folder}") == "root vllmd-sockets 3731"


def test_configuration_is_the_administrators(installed_machine: Machine) -> None:
    """dpkg asks before it touches an edited file: it is a conffile."""
    assert "/etc/vllmd/vllmd.yaml" in installed_machine.out("dpkg-query -W -f='${Conffiles}' vllmd")
    assert installed_machine.run("test -d /etc/vllmd/models.d").returncode == 0
    assert installed_machine.run("vllmd --check").returncode == 0


def test_root_is_told_of_what_the_daemon_may_not_read(installed_machine: Machine) -> None:
    """Root may read all of it, and would hear that it is valid; after the next start no model would be served."""
    machine, file = installed_machine, "/etc/vllmd/models.d/closed.yaml"
    machine.write("/etc/vllmd/token", "hf_x\n", mode="600")
    machine.write(file, "closed: {engine: sim, hf_token_file: /etc/vllmd/token}\n")
    try:
        for command in ("vllmd --check", "vllmctl config check"):
            done = machine.run(command, check=False)
            assert done.returncode == 78, command
            assert f"{file}:1: models.closed.hf_token_file: /etc/vllmd/token: Permission denied" in done.stderr
        machine.run("chown root:vllmd /etc/vllmd/token && chmod 640 /etc/vllmd/token && vllmd --check")
    finally:
        machine.run(f"rm /etc/vllmd/token {file}")


def test_units_are_valid(installed_machine: Machine) -> None:
    """systemd itself has nothing to complain of, and neither has it logged anything about them."""
    files = installed_machine.out("dpkg -L vllmd | grep -E '^(/usr)?/lib/systemd/system/.*[.](socket|service|slice)$'")
    assert installed_machine.run(["systemd-analyze", "verify", "--man=no", *files.split()]).stderr == ""


def test_the_packages_own_test_passes(installed_machine: Machine) -> None:
    """The autopkgtest that a distribution would run: the first request wakes everything."""
    script = REPOSITORY / "packaging/debian/tests/wakes-on-request"
    installed_machine.copy_in(script, "/root/wakes-on-request")
    installed_machine.run("sh /root/wakes-on-request", timeout=180)


def test_ollamas_address_is_there_once_it_is_enabled(installed_machine: Machine) -> None:
    """Off by default, for Ollama itself may be there; a restart of the socket that everybody uses brings it."""
    machine, ask = installed_machine, "curl -sS --max-time 20 http://127.0.0.1:11434/api/version"
    assert machine.run(ask, check=False).returncode == 7  # nobody listens
    machine.run("curl -sS --max-time 20 http://127.0.0.1:33258/health/live")  # the daemon runs, as it would anywhere
    machine.run("systemctl enable vllmd-ollama.socket && systemctl restart vllmd.socket", timeout=60)
    assert '"version"' in machine.out(ask)
    machine.run("systemctl disable --now vllmd-ollama.socket", timeout=60)


CHAT = (
    "curl -sSf --max-time 120 http://127.0.0.1:33258/v1/chat/completions -H 'Content-Type: application/json' -d "
    """'{"model": "smollm2", "max_tokens": 12, "temperature": 0, """
    """"messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]}'"""
)
FOLDER = "/var/lib/vllmd/engines/llama.cpp"
# Another version of the same, as if it had been installed: what it is called is all that differs.
ANOTHER = (
    f"cd {FOLDER} && cp -a $(readlink current) 9999.1 && "
    f"sed -i s#{FOLDER}/$(readlink current)#{FOLDER}/9999.1# 9999.1/bin/*"
)
SMOLLM2 = "models: {smollm2: {engine: llama.cpp, model: /srv/models/smollm2.gguf, max_model_len: 512}}\n"


def test_an_engine_is_installed_and_a_real_model_answers(installed_machine: Machine, llama: RealLlama) -> None:
    """A service that may write nothing else installs it; a reload moves what runs to another version."""
    machine = installed_machine
    wheel = next((container.cache() / "wheels").glob("xllamacpp-*.whl"), None) or pytest.skip(
        "packaging/dev/setup wheels"
    )
    machine.copy_in(wheel, f"/srv/wheels/{wheel.name}")
    machine.copy_in(llama.model, "/srv/models/smollm2.gguf")
    machine.run("useradd --groups=vllmd-admin ada; useradd carl")
    refused = machine.run("vllmctl engine install llama.cpp --offline /srv/wheels", user="ada", check=False)
    assert (refused.returncode, "only root may say" in refused.stderr) == (77, True)
    refused = machine.run("vllmctl engine install llama.cpp", user="carl", check=False)
    assert (refused.returncode, "open to the group vllmd-admin" in refused.stderr) == (77, True)
    told = machine.out("vllmctl engine install llama.cpp --offline /srv/wheels", timeout=300)
    assert f"for the CPU is installed in {FOLDER}/" in told
    assert machine.out(f"find {FOLDER} -printf '%u\\n' | sort -u") == "vllmd-installer"
    for user in ("vllmd", "vllmd-engine"):
        assert machine.run(f"touch {FOLDER}/current/x", user=user, check=False).returncode == 1
    machine.write("/etc/vllmd/models.d/smollm2.yaml", SMOLLM2)
    machine.run("vllmctl reload")
    assert "Paris" in machine.out(CHAT, timeout=180)
    version = machine.out(f"readlink {FOLDER}/current")
    machine.run(
        ["setpriv", "--reuid=vllmd-installer", "--regid=vllmd-installer", "--clear-groups", "sh", "-ec", ANOTHER]
    )
    assert f"9999.1 is in use, {version} was" in machine.out("vllmctl engine use llama.cpp 9999.1", user="ada")
    refused = machine.run(f"vllmctl engine remove llama.cpp {version}", user="ada", check=False)
    assert (refused.returncode, "runs, as process" in refused.stderr) == (75, True)
    assert "Paris" in machine.out(CHAT)
    machine.run("vllmctl reload")
    machine.wait_until(f"vllmctl engine remove llama.cpp {version}", user="ada")
    assert "Paris" in machine.out(CHAT, timeout=180)
    assert f"{FOLDER}/9999.1/bin/python" in machine.out("pgrep -a -u vllmd-engine")
    machine.run("rm /etc/vllmd/models.d/smollm2.yaml && vllmctl reload")


HAMMER = """
import http.client, sys, time
asked = failed = 0
while True:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", 33258, timeout=60)
        connection.request("GET", "/v1/models")
        failed += connection.getresponse().status != 200
    except OSError as error:
        failed += 1
        print(error, file=sys.stderr)
    asked += 1
    print(asked, failed, flush=True)
    time.sleep(0.01)
"""


STREAM = (
    "curl -sSfN --max-time 60 http://127.0.0.1:33258/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "rehearsal", "prompt": "%s", "max_tokens": 80, "stream": true}'""" % ("w " * 80)
)


def test_an_upgrade_moves_the_members_of_the_old_group(installed_machine: Machine) -> None:
    """The daemon's group once was that of vllmctl's users: they keep vllmctl, and no longer read the configuration."""
    machine = installed_machine
    machine.run("useradd --groups=vllmd olaf; systemctl stop vllmd-admin.socket vllmd-read.socket")
    machine.run("gpasswd -d vllmd vllmd-admin; groupdel vllmd-admin", check=False)
    machine.run("dpkg --install /root/vllmd.deb && systemctl start vllmd-admin.socket vllmd-read.socket", timeout=120)
    assert set(machine.out("id -nG olaf").split()) == {"olaf", "vllmd-admin"}
    for name, group in (("admin", "vllmd-admin"), ("read", "vllmd-read")):
        assert machine.out(f"stat -c '%U %G %a' /run/vllmd/{name}.sock") == f"root {group} 660"
    machine.run("dpkg --install /root/vllmd.deb", timeout=120)
    assert "olaf" in machine.out("getent group vllmd-admin")


def test_upgrade_under_load_refuses_nobody_and_reloads_no_model(installed_machine: Machine) -> None:
    """Administrators upgrade in the daytime: streams end as they began, new requests meet the new version."""
    installed_machine.write("/etc/vllmd/models.d/test.yaml", MODELS)
    installed_machine.run("systemctl stop vllmd.service")
    installed_machine.run(ASK, timeout=90)
    engines = engine_pids(installed_machine)
    daemon = installed_machine.show("vllmd.service", "MainPID")
    hammer = installed_machine.popen(["/usr/bin/python3", "-c", HAMMER])
    assert hammer.stdout is not None
    hammer.stdout.readline()
    stream = installed_machine.popen("exec " + STREAM)
    assert stream.stdout is not None
    stream.stdout.readline()
    installed_machine.run(["dpkg", "--install", container.later_version(installed_machine)], timeout=120)
    installed_machine.run(ASK, timeout=90)
    assert stream.communicate(timeout=120)[0].rstrip().endswith("data: [DONE]")
    installed_machine.run("pkill -f http.clien[t]")
    out, err = hammer.communicate()
    asked, failed = out.splitlines()[-1].split()
    assert (int(asked) > 10, failed, err) == (True, "0", "")
    assert installed_machine.show("vllmd.service", "MainPID") != daemon
    told = installed_machine.out("vllmctl info --json")
    assert '"99.0"' in told and '"event_loop": "uvloop 0.' in told
    assert engine_pids(installed_machine) == engines


def test_removal_stops_everything_and_purge_forgets(installed_machine: Machine) -> None:
    """What was installed can be got rid of; only the users stay. (The last test of this machine.)"""
    installed_machine.run(ASK, timeout=90)
    installed_machine.run("dpkg --remove vllmd", timeout=120)
    assert engine_pids(installed_machine) == []
    assert installed_machine.run("pgrep -u vllmd", check=False).stdout == ""
    assert installed_machine.run("curl -s http://127.0.0.1:33258/", check=False).returncode == 7
    assert "vllmd.yaml" in installed_machine.out("ls /etc/vllmd")
    installed_machine.run("dpkg --purge vllmd", timeout=120)
    left = installed_machine.out("find / -xdev -path /proc -prune -o -path /opt -prune -o -name '*vllmd*' -print")
    known = ("/root/", "/.vllmd-stamp", "/.vllmd-more", "/var/lib/dpkg/")
    assert [path for path in left.splitlines() if not path.startswith(known)] == []
    assert installed_machine.out("id -un vllmd") == "vllmd"


def test_lintian_finds_nothing(package: Path) -> None:
    """Debian's own checker, of the build that made this package."""
    assert (package.parent / "lintian.txt").read_text() == ""


def test_the_whole_path_on_debian_13(boot_machine: Callable[..., Machine], package: Path) -> None:
    """The same package on systemd 257, Python 3.13 and newer libraries, for the system and for a user."""
    machine = boot_machine("trixie")
    container.install(machine, package)
    assert machine.out("systemctl --version").startswith("systemd 257 ")
    assert states(machine, "is-active", *SOCKETS, *SERVICES) == ["active"] * 4 + ["inactive"] * 2
    machine.write("/etc/vllmd/models.d/test.yaml", MODELS)
    assert "assistant" in machine.out(ASK, timeout=90)
    engines = engine_pids(machine)
    scope = machine.out("systemctl list-units --plain --no-legend 'vllmd-model-rehearsal-*.scope'").split()[0]
    assert machine.out(f"ps -o user:32= -p {machine.cgroup_pids(scope)[0]}") == "vllmd-engine"
    machine.run("systemctl restart vllmd.service && systemctl reload vllmd.service")
    assert "assistant" in machine.out(ASK, timeout=90)
    assert engine_pids(machine) == engines
    for level in ("1", "2"):
        machine.run(["vllmctl", "sleep", "rehearsal", "--level", level])
        assert "assistant" in machine.out(ASK, timeout=90)
    assert engine_pids(machine) == engines
    assert "startup complete" in machine.out("vllmctl logs rehearsal -n 100")
    machine.run("systemctl stop vllmd.socket vllmd-admin.socket vllmd.service vllmd.slice")
    assert engine_pids(machine) == []
    machine.add_user("ada")
    machine.write("/home/ada/.config/vllmd/vllmd.yaml", MODELS)
    machine.run("systemctl --user start vllmd.socket", user="ada")
    assert "assistant" in machine.out(ASK, timeout=90)
    assert machine.out("ps -C vllmd -o user=") == "ada"
    machine.run("systemctl --user reload vllmd.service", user="ada")
    machine.run("systemctl --user stop vllmd.service", user="ada")
    machine.wait_until(lambda: not engine_pids(machine))
