"""Models of different people are different users: as one of them nothing of another's can be read, called or killed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from tests.e2e.site import Site
from tests.machine.container import Machine

pytestmark = pytest.mark.machine

CONFIG = """
server: {idle_exit: never}
idle: never
devices: []
models:
  shared: {engine: sim}
  mine: {engine: sim, user: own, env: {SECRET: mine}}
  hers: {engine: sim, user: own, env: {SECRET: hers}}
  named: {engine: sim, user: vllmd-alice, env: {SECRET: named}}
  nobodys: {engine: sim, user: vllmd-bob}
"""
MODELS = ("shared", "mine", "hers", "named")
RUN, HOMES = "/run/vllmd-engine", "/var/lib/vllmd-engines"


@pytest.fixture(scope="module")
def site(installed_machine: Machine) -> Iterator[Site]:
    """As the manual tells an administrator to do it."""
    machine, site = installed_machine, Site(installed_machine)
    for name in ("alice", "bob"):
        machine.write(f"/etc/sysusers.d/{name}.conf", f'u vllmd-{name} - "models" /var/lib/vllmd-{name}\n')
        machine.write(f"/etc/tmpfiles.d/{name}.conf", f"d /var/lib/vllmd-{name} 0750 vllmd-{name} vllmd-{name} -\n")
    drop_in = '[Service]\nEnvironment="VLLMD_LAUNCHER_USERS=--user vllmd-alice"\n'
    machine.write("/etc/systemd/system/vllmd-launcher.service.d/users.conf", drop_in)
    machine.run("systemd-sysusers; systemd-tmpfiles --create; systemctl daemon-reload")
    site.configure(CONFIG)
    site.to_rest()
    for model in MODELS:
        site.chat(model, "hello")
    yield site
    machine.run("systemctl stop vllmd.service", check=False)


def uid(site: Site, model: str) -> int:
    return int(site.machine.out(f"stat -c %u /proc/{site.engine_pid(model)}"))


def run_dir(site: Site, model: str) -> str:
    return site.machine.out(f"ls -d {RUN}/{model}-*")


def home(site: Site, model: str) -> str:
    return site.machine.out(f"tr '\\0' '\\n' </proc/{site.engine_pid(model)}/environ | sed -n s/^HOME=//p")


def attempt(site: Site, attacker: int, command: str) -> int:
    """The status of a shell line run as that user and group, without any other group."""
    argv = f"setpriv --reuid={attacker} --regid={attacker} --clear-groups sh -c {shlex.quote(command)}"
    return site.machine.run(argv, check=False).returncode


def attempts(site: Site, victim: str) -> dict[str, str]:
    """What one would do to another's engine: what for, and how; all of it works for the engine's own user."""
    pid, folder = site.engine_pid(victim), run_dir(site, victim)
    return {
        "list its sockets": f"ls {folder}",
        "call it": f"curl -sf -m 5 --unix-socket {folder}/engine.sock http://x/health",
        "kill it": f"kill -0 {pid}",
        "read its secrets": f"cat /proc/{pid}/environ | tr '\\0' '\\n' | grep HOME=",
        "read its memory": f"cat /proc/{pid}/maps | grep .",
        "read its files": f"ls {home(site, victim)}",
        "write its files": f"touch {home(site, victim)}/x && rm {home(site, victim)}/x",
        "take its descriptors": f"ls /proc/{pid}/fd | grep .",
    }


def test_each_is_somebody_else(site: Site) -> None:
    """Two of their own, one by name, and the one that those without share."""
    numbers = [uid(site, model) for model in MODELS]
    assert len(set(numbers)) == 4
    assert {number in range(60800, 61184) for number in numbers[1:3]} == {True}
    assert numbers[0] == site.machine.uid("vllmd-engine")
    assert numbers[3] == site.machine.uid("vllmd-alice")


@pytest.mark.parametrize("victim", MODELS)
def test_as_one_models_user_nothing_of_another_can_be_had(site: Site, victim: str) -> None:
    """Read, called, killed; each attempt is shown to work for the victim's own user first."""
    for what, command in attempts(site, victim).items():
        assert attempt(site, uid(site, victim), command) == 0, what
        for attacker in MODELS:
            if attacker != victim:
                assert attempt(site, uid(site, attacker), command) != 0, f"{attacker} could {what} of {victim}"


def test_nobody_can_put_anything_in_anothers_place(site: Site) -> None:
    """The folders above are root's: nothing is made, renamed or removed in them but by the launcher's children."""
    for attacker in MODELS:
        number, mine = uid(site, attacker), run_dir(site, attacker)
        for command in (f"ls {RUN}", f"touch {RUN}/x", f"mkdir {RUN}/hers-000000", f"mv {mine} {RUN}/moved",
                        f"rmdir {HOMES}/*", f"mkdir {HOMES}/x"):  # fmt: skip
            assert attempt(site, number, command) != 0, f"{attacker}: {command}"
        # A program with the group that its folder hands down would have that group: the kernel takes the bit away.
        made = f"cp /bin/true {mine}/x && chmod 2755 {mine}/x; test -g {mine}/x; told=$?; rm {mine}/x; exit $told"
        assert attempt(site, number, made) != 0, attacker


def test_engines_keep_no_group_that_leads_to_others(site: Site) -> None:
    """The group that the daemon reaches their sockets by is only lent to make folders."""
    group = site.machine.out("getent group vllmd-sockets | cut -d: -f3")
    for model in MODELS:
        status = site.machine.read(f"/proc/{site.engine_pid(model)}/status")
        ids = [line.split()[1:] for line in status.splitlines() if line.startswith(("Uid:", "Gid:", "Groups:"))]
        assert len(set(ids[0])) == len(set(ids[1])) == 1
        assert group not in ids[2]
        assert "CapEff:\t0000000000000000" in status
        assert "CapPrm:\t0000000000000000" in status


def test_a_user_of_its_own_has_the_same_home_again(site: Site) -> None:
    """Its caches keep working over stops, and over launchers; the daemon may read what models are there."""
    before, folder = uid(site, "mine"), home(site, "mine")
    assert site.machine.out(f"stat -c '%u %G %a' {folder}") == f"{before} vllmd-sockets 2750"
    site.machine.run(f"setpriv --reuid={before} --regid={before} --clear-groups sh -c 'umask 7; echo x >{folder}/kept'")
    reader = "setpriv --reuid=vllmd --regid=vllmd --groups=$(getent group vllmd-sockets | cut -d: -f3)"
    assert site.machine.out(f"{reader} cat {folder}/kept") == "x"
    left = run_dir(site, "mine")
    site.machine.run("vllmctl stop mine")
    site.machine.wait_until(f"! test -e {left}")
    site.machine.run("systemctl stop vllmd-launcher.service")
    site.chat("mine", "again")
    assert (uid(site, "mine"), home(site, "mine")) == (before, folder)


def test_a_new_daemon_and_a_new_launcher_take_them_over(site: Site) -> None:
    """And know whose they are: they answer, and their run directories are tidied in the end."""
    pids = [site.engine_pid(model) for model in MODELS]
    site.machine.run("systemctl stop vllmd-launcher.service; systemctl restart vllmd.service")
    for model in MODELS:
        site.chat(model, "still there?")
    assert [site.engine_pid(model) for model in MODELS] == pids
    left = [run_dir(site, model) for model in ("hers", "named")]
    for model in ("hers", "named"):
        site.machine.run(f"vllmctl stop {model}")
    site.machine.wait_until(f"! ls -d {' '.join(left)}")
    for model in ("hers", "named"):
        site.chat(model, "and again")


def test_a_user_that_the_launcher_does_not_allow_is_refused(site: Site) -> None:
    """The daemon says whom, the administrator which: the client hears it."""
    body = {"model": "nobodys", "messages": [{"role": "user", "content": "hi"}]}
    status, answer = site.post("/v1/chat/completions", body)
    assert status >= 500
    assert "user 'vllmd-bob' is not allowed; allowed are: vllmd-engine, vllmd-alice" in answer["error"]["message"]
