"""Who may what on an installed machine: users, groups, credentials, addresses; with Debian's own libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.machine.container import Machine

pytestmark = pytest.mark.machine

MODELS = "server: {idle_exit: never}\nmodels: {m: {engine: sim}}\n"
KEYS = "auth: {keys: [{name: lab, key_file: api-key}]}\n"
URL = "http://127.0.0.1:33258"
ADMIN = "curl -s --unix-socket /run/vllmd/admin.sock http://x"


@pytest.fixture(scope="module")
def machine(installed_machine: Machine) -> Iterator[Machine]:
    configure(installed_machine, MODELS)
    yield installed_machine
    installed_machine.run("rm -rf /etc/systemd/system/vllmd.s*.d; systemctl daemon-reload", check=False)


def configure(machine: Machine, text: str) -> None:
    machine.write("/etc/vllmd/vllmd.yaml", text)
    machine.run("systemctl stop vllmd.service")


def drop_in(machine: Machine, unit: str, text: str) -> None:
    machine.run(f"mkdir -p /etc/systemd/system/{unit}.d")
    machine.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
    machine.run("systemctl daemon-reload")


def status(machine: Machine, url: str, *fields: str) -> int:
    headers = " ".join(f"-H '{field}'" for field in fields)
    return int(machine.out(f"curl -s -o /dev/null -w '%{{http_code}}' {headers} {url}"))


def test_members_of_the_group_administer_and_nobody_else(machine: Machine) -> None:
    """The socket's mode decides, and the journal has who it was."""
    uid = machine.add_user("olga", groups="vllmd-admin")
    machine.add_user("stranger")
    pinned = machine.run(f"{ADMIN}/admin/models/m/pin -X POST -d '{{}}'", user="olga", check=False)
    assert json.loads(pinned.stdout)["pinned"] is True
    refused = machine.run(f"{ADMIN}/admin/status", user="stranger", check=False)
    assert (refused.returncode != 0, refused.stdout) == (True, "")
    assert status(machine, f"{URL}/admin/status") == 401
    machine.wait_until(lambda: "POST /admin/models/m/pin by pid" in machine.journal("vllmd.service"))
    assert f"uid {uid}: done" in machine.journal("vllmd.service")


def test_who_looks_on_changes_nothing_and_nobody_of_them_reads_the_keys(machine: Machine) -> None:
    """The group of vllmctl's users, the group of those who look on, and the one that reads the configuration: three."""
    machine.write("/etc/vllmd/vllmd.yaml", MODELS + "auth: {keys: [{key: k-secret}]}\n", mode="640")
    machine.run("chown root:vllmd /etc/vllmd/vllmd.yaml; systemctl stop vllmd.service")
    machine.add_user("rita", groups="vllmd-read")
    machine.add_user("adam", groups="vllmd-admin")
    for verb in ("ps", "why m", "info", "logs m"):
        looked = machine.run(f"vllmctl {verb}", user="rita", check=False)
        assert "you may not" not in looked.stderr, looked.stderr
        assert looked.returncode == 0 or "no engine now" in looked.stderr, looked.stderr
    reads = "curl -s --unix-socket /run/vllmd/read.sock http://x"
    assert 'vllmd_model_state{model="m"' in machine.run(f"{reads}/metrics", user="rita").stdout
    for attempt in ("start m", "stop m", "pin m", "reload"):
        refused = machine.run(f"vllmctl {attempt}", user="rita", check=False)
        assert (refused.returncode, "the group vllmd-admin" in refused.stderr) == (77, True), refused.stderr
    assert machine.run("vllmctl pin m", user="adam", check=False).returncode == 0
    for user in ("rita", "adam"):
        assert machine.run("cat /etc/vllmd/vllmd.yaml", user=user, check=False).returncode != 0
        assert machine.run("cat /run/vllmd-engine", user=user, check=False).returncode != 0
    machine.run("systemctl reload vllmd.service")
    configure(machine, MODELS)
    machine.run("chown root:root /etc/vllmd/vllmd.yaml; chmod 644 /etc/vllmd/vllmd.yaml")


def test_metrics_with_debians_own_client_library(machine: Machine) -> None:
    """0.16 has what we use; an old library must not be found out by the first scrape."""
    assert machine.python("import importlib.metadata as m; print(m.version('prometheus-client'))").stdout.strip()
    machine.wait_until(lambda: status(machine, f"{URL}/health/ready") == 200)
    text = machine.out(f"curl -s {URL}/metrics")
    assert 'vllmd_model_state{model="m",state="stopped"} 1.0' in text
    assert "process_open_fds" in text
    open_metrics = machine.out(f"curl -s -H 'Accept: application/openmetrics-text' {URL}/metrics")
    assert open_metrics.endswith("# EOF")


def test_a_key_from_a_systemd_credential(machine: Machine) -> None:
    """It stands in no file that the daemon, or a reader of its configuration, could show."""
    machine.write("/etc/vllmd/the.key", "c-secret\n", mode="600")
    drop_in(machine, "vllmd.service", "[Service]\nLoadCredential=api-key:/etc/vllmd/the.key\n")
    configure(machine, MODELS + KEYS)
    assert status(machine, f"{URL}/v1/models") == 401
    assert status(machine, f"{URL}/v1/models", "Authorization: Bearer c-secret") == 200
    configure(machine, MODELS)


def test_an_address_of_the_socket_unit_that_others_can_reach(machine: Machine) -> None:
    """Who adds it to the unit must give keys, too; this machine's own address goes on being served."""
    drop_in(machine, "vllmd.socket", "[Socket]\nListenStream=0.0.0.0:33259\n")
    machine.run("systemctl stop vllmd.service vllmd.socket; systemctl start vllmd.socket")
    assert status(machine, "http://127.0.0.1:33259/v1/models") == 503
    assert status(machine, f"{URL}/v1/models") == 200
    assert "auth.allow_anonymous" in machine.journal("vllmd.service")
