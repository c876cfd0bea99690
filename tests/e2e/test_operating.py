"""Operating vllmd, as its administrator and its users do: from the installed package, on a booted systemd 252.

V is the Ollama-like manager; P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.site import CONFIG_FILE, Site
from tests.machine.container import Machine
from vllmd.cli.arguments import verbs

pytestmark = pytest.mark.machine

CONFIG = """
server: {idle_exit: never}
idle: never
devices: []
models:
  steady: {engine: sim, options: {tokens_per_second: 20}}
  changing: {engine: sim, options: {tokens_per_second: 20}}
  going: {engine: sim}
"""
ADMIN_SOCKET = "/run/vllmd/admin.sock"
# A verb that asks the daemon, as one would type it.
ASKING = ["ps", "info", "models", "gpus", "top -n 1", "reload", "start steady", "stop steady", "sleep steady",
          "wake-up steady", "pin steady", "unpin steady", "lease steady", "why steady", "logs steady", "events",
          "kill 99"]  # fmt: skip
CLIENTS = ["chat steady hello", "bench steady"]  # they come in by the front door


@pytest.fixture(scope="module")
def site(installed_machine: Machine) -> Iterator[Site]:
    site = Site(installed_machine)
    site.configure(CONFIG)
    for name, groups in (("stranger", ""), ("oda", "vllmd-admin")):
        site.machine.run(["useradd", "--create-home", f"--groups={groups}", name])
    yield site
    site.machine.run("systemctl stop vllmd.service", check=False)


@pytest.fixture(autouse=True)
def configured(site: Site) -> None:
    """Every test begins with the same configuration, at rest."""
    site.write_config(CONFIG)
    site.to_rest()


def tried(site: Site, *lines: str, user: str = "root") -> list[tuple[int, str]]:
    """Exit status and first line of stderr of several vllmctl commands, run one after the other in there."""
    script = (
        "import json, shlex, subprocess, sys\n"
        "def run(line):\n"
        "    done = subprocess.run(['vllmctl', *shlex.split(line)], capture_output=True, text=True, timeout=50,\n"
        "                          stdin=subprocess.DEVNULL)\n"
        "    return done.returncode, (done.stderr.splitlines() or [''])[0]\n"
        "print(json.dumps([run(line) for line in sys.argv[1:]]))"
    )
    out = site.machine.python(script, *lines, user=user, timeout=120).stdout
    return [(status, message) for status, message in json.loads(out)]


# -- reloading -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["systemctl reload vllmd", "vllmctl reload"])
def test_an_invalid_file_changes_nothing_and_says_why(site: Site, command: str) -> None:
    """The command fails with file and line; the models go on with what was valid."""
    site.chat("steady", "hi")
    pid = site.engine_pid("steady")
    site.write_config(CONFIG.replace("engine: sim}", "engin: sim}"))
    failed = site.machine.run(command, check=False)
    assert failed.returncode != 0
    told = failed.stderr if "vllmctl" in command else site.machine.journal("vllmd.service", "--lines=20")
    assert f'{CONFIG_FILE}:8: models.going.engin: there is no such setting; did you mean "engine"?' in told
    assert told.count("there is no such setting") == 1
    assert site.engine_pid("steady") == pid
    assert site.active("vllmd.service") == "active"
    assert "on" in site.chat("going", "on")["choices"][0]["message"]["content"]


def test_a_reload_under_load_replaces_only_what_changed(site: Site) -> None:
    """Streams end as they began; the changed model has another engine, the removed one none, the rest its own."""
    for model in ("steady", "changing", "going"):
        site.chat(model, "warm")
    before = {model: site.engine_pid(model) for model in ("steady", "changing", "going")}
    streams = [
        site.machine.popen(site.curl_stream(model, "w " * 30, max_tokens=30)) for model in ("steady", "changing")
    ]
    site.machine.wait_until(lambda: site.status()["requests"] == 2)
    site.write_config(
        CONFIG.replace(
            "changing: {engine: sim, options: {", "changing: {engine: sim, options: {load_time: 0.1s, "
        ).replace("going:", "coming:")
    )
    site.machine.run("systemctl reload vllmd")
    assert "back" in site.chat("changing", "back")["choices"][0]["message"]["content"]
    for stream in streams:
        assert stream.communicate(timeout=120)[0].rstrip().endswith("data: [DONE]")
    assert site.engine_pid("steady") == before["steady"]
    assert site.engine_pid("changing") not in (None, before["changing"])
    site.machine.wait_until(f"! kill -0 {before['going']} {before['changing']}")
    assert site.post("/v1/completions", {"model": "going", "prompt": "x"})[0] == 404
    assert "here" in site.chat("coming", "here")["choices"][0]["message"]["content"]


def test_what_is_no_engines_business_changes_without_a_restart(site: Site) -> None:
    """Idle rules, pins and aliases take effect in the running model."""
    site.chat("steady", "hi")
    pid = site.engine_pid("steady")
    site.write_config(CONFIG.replace("steady: {", "steady: {aliases: [calm], idle: {stop_after: 1h}, "))
    assert "no model changed" in site.machine.out("vllmctl reload")
    assert "by its alias" in site.chat("calm", "by its alias")["choices"][0]["message"]["content"]
    assert site.engine_pid("steady") == pid
    site.write_config(CONFIG.replace("steady: {", "steady: {aliases: [calm], idle: {stop_after: 1s}, "))
    assert "no model changed" in site.machine.out("vllmctl reload")
    site.machine.wait_until(lambda: site.state("steady") == "stopped")


# -- what goes wrong ---------------------------------------------------------------------------


def test_every_verb_with_wrong_missing_and_excess_arguments(site: Site) -> None:
    """Status 64 of sysexits, and a line that names what is wrong."""
    names = [verb for verb in verbs() if verb != "simulate"]  # reads its arguments itself
    answers = tried(site, *(f"{verb} --frobnicate" for verb in names))
    assert {name: status for name, (status, _) in zip(names, answers, strict=True)} == dict.fromkeys(names, 64)
    assert all("frobnicate" in message or "required" in message for _, message in answers)
    missing = ["start", "stop", "sleep", "wake-up", "pin", "unpin", "lease", "why", "logs", "kill", "chat", "bench",
               "assign", "assign steady", "config", "import", "completion"]  # fmt: skip
    excess = ["ps x", "info x", "models x", "gpus x", "reload x", "doctor x", "lease a b", "why a b", "kill 2 3",
              "top x", "logs a b", "config check a b"]  # fmt: skip
    wrong = ["sleep steady --level 4", "kill me", "lease steady --for soon", "assign steady --gpu-memory lots",
             "bench steady -n 0", "logs steady -n many", "completion csh", "import ollama file", "pss"]  # fmt: skip
    for line, (status, message) in zip(missing + excess + wrong, tried(site, *missing, *excess, *wrong), strict=True):
        assert (status, message[:7]) == (64, "vllmctl"), line
    assert tried(site, "pss") == [(64, "vllmctl: there is no verb 'pss'; did you mean 'ps'?")]


def test_the_daemon_and_the_launcher_with_wrong_arguments(site: Site) -> None:
    """Also the programs that nobody starts by hand."""
    for command in ("vllmd --frobnicate", "vllmd serve extra", "vllmd-launcher --frobnicate"):
        failed = site.machine.run(command, check=False)
        assert (failed.returncode, "usage:" in failed.stderr) in ((64, True), (2, True)), command
    assert site.machine.run("vllmd --port 99999 --check", check=False).returncode == 78


def test_no_daemon(site: Site) -> None:
    """Every verb that asks it says how to start it."""
    site.machine.run("systemctl stop vllmd.socket vllmd-admin.socket vllmd.service")
    asking = [*ASKING, *CLIENTS, "assign steady --devices auto --restart"]
    asking.remove("reload")  # the next start reads the file: that is checked, and nothing else is to be done
    assert tried(site, "reload")[0][0] == 0
    for line, answer in zip(asking, tried(site, *asking), strict=True):
        assert (answer[0], "systemctl start vllmd.socket" in answer[1]) == (69, True), (line, answer)


def test_no_permission(site: Site) -> None:
    """Who is not in the group hears which one it is; who is, operates, but may not edit the configuration."""
    site.chat("steady", "hi")
    for line, (status, message) in zip(ASKING, tried(site, *ASKING, user="stranger"), strict=True):
        assert (status, "sudo usermod -aG vllmd-admin stranger, then log in again" in message) == (77, True), (
            line,
            message,
        )
    assert [status for status, _ in tried(site, "ps", "stop steady", user="oda")] == [0, 0]
    assert [status for status, _ in tried(site, CLIENTS[0], user="stranger")] == [0]
    denied = f"vllmctl: you may not write {CONFIG_FILE}; try again with sudo"
    assert tried(site, "assign steady --devices auto", user="oda") == [(77, denied)]
    assert site.machine.run(["journalctl", "-u", "vllmd", "-g", "unload.*by .*uid"]).stdout


def test_a_full_disk(site: Site) -> None:
    """What is learnt and what engines say is lost, requests are not; files are left as they were."""
    full = ("/var/cache/vllmd", "/var/log/vllmd", "/etc/vllmd")
    site.write_config(CONFIG.replace("steady: {", "steady: {log_file: true, "))
    text = site.machine.read(CONFIG_FILE)
    for path in full:
        site.machine.run(f"mount -t tmpfs -o size=64k tmpfs {path} && chown vllmd:vllmd {path} && chmod 755 {path}")
    try:
        site.write_config(text)
        site.machine.run("; ".join(f"cat /dev/zero >{path}/fill 2>/dev/null" for path in full), check=False)
        assert "anyway" in site.chat("steady", "anyway")["choices"][0]["message"]["content"]
        site.machine.run("vllmctl stop steady")
        assert tried(site, "assign steady --devices auto") == [
            (73, f"vllmctl: {CONFIG_FILE} cannot be written: No space left on device; it is as it was")
        ]
        assert site.machine.read(CONFIG_FILE) == text
        site.machine.run("systemctl stop vllmd.service")
        told = site.machine.journal("vllmd.service", "--lines=100")
        assert "No space left on device" in told
        assert "Traceback" not in told
    finally:
        for path in full:
            site.machine.run(["umount", "--lazy", path])


@pytest.mark.parametrize(
    ("path", "mode"), [("/etc/vllmd", "700"), ("/etc/vllmd/models.d", "700"), (CONFIG_FILE, "600")]
)
def test_a_configuration_that_the_daemon_may_not_read(site: Site, path: str, mode: str) -> None:
    """Said to the administrator, with whom to let in; clients hear which file it is; then a reload repairs it."""
    was = site.machine.out(["stat", "-c", "%a", path])
    site.machine.run(["chmod", mode, path])
    try:
        status, answer = site.post("/v1/completions", {"model": "steady", "prompt": "x"})
        assert status == 503
        assert path in answer["error"]["message"]
        told = site.machine.run("vllmctl ps", check=False).stderr
        assert "Permission denied" in told
        assert "the user vllmd must be able to read it" in told
    finally:
        site.machine.run(["chmod", was, path])
    site.machine.run("vllmctl reload")
    assert site.chat("steady", "x")["model"] == "steady"


# -- the unit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "limit"),
    [("vllmd.service", 1.5), ("vllmd-launcher.service", 3.5), ("vllmd-cleanup.service", 3.5)],
)
def test_exposure(site: Site, unit: str, limit: float) -> None:
    """systemd's own judgement of the sandbox."""
    judged = site.machine.run(["systemd-analyze", "security", "--no-pager", unit]).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", judged)
    assert found is not None
    assert float(found[1]) <= limit


def test_the_launcher_has_limits(site: Site) -> None:
    """Whatever it is made to hold, it is not all of the machine."""
    assert site.machine.show("vllmd-launcher.service", "TasksMax") == "1024"
    assert site.machine.show("vllmd-launcher.service", "MemoryMax") == str(1 << 30)


def test_P_env_settings_come_from_a_drop_in(site: Site) -> None:
    """The documents' variables, given to the unit, win over the file, also with the value of the default."""
    site.write_config(CONFIG.replace("idle: never", "idle: {sleep_after: never, stop_after: never}\nlog_level: error"))
    drop_in = "[Service]\nEnvironment=IDLE_TIMEOUT=1 LOG_LEVEL=info\n"
    site.machine.write("/run/systemd/system/vllmd.service.d/env.conf", drop_in)
    site.machine.run("systemctl daemon-reload")
    try:
        site.chat("steady", "hi")
        site.machine.wait_until(lambda: site.state("steady").startswith("sleeping"))
        assert "steady: ready after" in site.machine.journal("vllmd.service", "--lines=30")
    finally:
        site.machine.run("rm -r /run/systemd/system/vllmd.service.d; systemctl daemon-reload")


def test_V_P_M_ports_are_more_addresses_of_the_same_service(site: Site) -> None:
    """The documents' own ports, 8080 and 6004, are lines of vllmd.socket; the first request to any wakes it."""
    site.machine.run("systemctl stop vllmd.socket vllmd.service")
    drop_in = "[Socket]\nListenStream=127.0.0.1:8080\nListenStream=127.0.0.1:6004\n"
    site.machine.write("/run/systemd/system/vllmd.socket.d/ports.conf", drop_in)
    site.machine.run("systemctl daemon-reload; systemctl start vllmd.socket")
    try:
        for port in (8080, 6004, 33258):
            listed = json.loads(site.machine.out(f"curl -sf http://127.0.0.1:{port}/v1/models"))
            assert [model["id"] for model in listed["data"]] == ["steady", "changing", "going"]
    finally:
        site.machine.run("systemctl stop vllmd.socket vllmd.service; rm -r /run/systemd/system/vllmd.socket.d")
        site.machine.run("systemctl daemon-reload; systemctl start vllmd.socket")


def test_P_scripts_start_stop_restart_status(site: Site) -> None:
    """What the document's four scripts did, systemctl does: nothing strays after any of them."""
    site.chat("going", "hi")
    site.machine.run("systemctl restart vllmd")
    site.machine.run("systemctl status vllmd")
    assert "going" in site.machine.out("vllmctl ps --running")
    site.machine.run("systemctl stop vllmd vllmd.slice")
    assert site.machine.run("pgrep -u vllmd,vllmd-engine", check=False).stdout == ""
    assert site.machine.run("systemctl is-active vllmd", check=False).stdout.strip() == "inactive"
    site.machine.run("systemctl start vllmd")
    assert site.active("vllmd.service") == "active"


def test_P_hf_token_is_in_that_engines_environment_only(site: Site) -> None:
    """A token for a gated model reaches no other engine, and neither log nor status."""
    stand_in = "engine: vllm, command: [/usr/bin/python3, -m, vllmd.simengine, serve]"
    site.write_config(
        CONFIG.replace("steady: {engine: sim,", f"steady: {{{stand_in}, hf_token: hf_secret}}\n  x: {{engine: sim,")
    )
    for model in ("steady", "going"):
        site.chat(model, "hi")
    environments = [site.machine.read(f"/proc/{site.engine_pid(model)}/environ") for model in ("steady", "going")]
    assert ["HF_TOKEN=hf_secret" in text for text in environments] == [True, False]
    assert "hf_secret" not in json.dumps(site.status()) + site.machine.journal() + site.machine.out(
        "vllmctl config show"
    )


def test_P_logs_directory(site: Site) -> None:
    """An engine's output is in a file under /var/log/vllmd, too, where that is wanted."""
    site.write_config(CONFIG.replace("steady: {", "steady: {log_file: true, "))
    site.chat("steady", "hi")
    site.machine.wait_until("grep -i 'startup complete' /var/log/vllmd/steady*.log")


def test_V_serve_binds_host_and_port_and_takes_its_engines_along(site: Site) -> None:
    """Without systemd: in the foreground, at the address given, with the same client side; its end is everyone's."""
    serve = site.machine.popen("exec vllmd serve --host 127.0.0.1 --port 8099 --log-level info", user="oda")
    ask = (
        "curl -sf http://127.0.0.1:8099/v1/completions -H 'Content-Type: application/json' "
        """-d '{"model": "going", "prompt": "by hand"}'"""
    )
    site.machine.wait_until("curl -sf http://127.0.0.1:8099/health")
    assert "by hand" in site.machine.out(ask)
    assert "going" in site.machine.out("vllmctl ps", user="oda"), site.machine.journal()[-3000:]
    engine = site.machine.out("pgrep -u oda -f vllmd.simengine")
    site.machine.run("pkill -TERM -u oda -x vllmd")
    assert serve.wait(120) == 0
    site.machine.wait_until(f"! kill -0 {engine.split()[0]}")


def test_kill_ends_the_engine_that_has_the_process(site: Site) -> None:
    """As a whole; a process that is nobody's is left alone."""
    site.chat("steady", "hi")
    pid = site.engine_pid("steady")
    assert "steady" in site.machine.out(f"vllmctl kill {pid}")
    site.machine.wait_until(f"! kill -0 {pid}")
    bystander: subprocess.Popen[str] = site.machine.popen("echo $$; exec sleep 60")
    assert bystander.stdout is not None
    number = bystander.stdout.readline().strip()
    refused = site.machine.run(f"vllmctl kill {number}", check=False)
    assert (refused.returncode, number in refused.stderr) == (77, True)
    assert bystander.poll() is None


def test_use_and_keys_are_kept_where_the_unit_says(site: Site) -> None:
    """In folders that nobody else can look into, over a kill of the daemon; the engines' programs stay root's."""
    machine = site.machine
    key = machine.run(["vllmctl", "key", "create", "alice", "--tokens-per-day", "100000"]).stdout.strip()
    body = json.dumps({"model": "steady", "messages": [{"role": "user", "content": "one two three"}], "stream": True})
    address = "http://127.0.0.1:33258/v1/chat/completions"
    chat = [
        "curl",
        "-sf",
        "-H",
        f"Authorization: Bearer {key}",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
        address,
    ]
    try:
        assert "[DONE]" in machine.run(chat, timeout=60).stdout
        assert machine.run([*chat[:2], *chat[4:]], check=False).returncode == 22  # without the key
        (row,) = json.loads(machine.run(["vllmctl", "usage", "--json", "-k", "alice"]).stdout)["rows"]
        assert (row["requests"], row["answer"], row["estimated"]) == (1, 3, 0)
        # A plan is computed by a process of the daemon's, in the daemon's sandbox.
        asked = ["curl", "-s", "--unix-socket", "/run/vllmd/admin.sock", "-d", '{"devices": "80GiB,80GiB"}']
        told = json.loads(machine.run([*asked, "http://localhost/admin/plan"], timeout=120).stdout)
        assert {run["served"] for run in told.get("runs", [])} == {told.get("requests")}, told
        machine.run(["vllmctl", "disable", "steady", "-m", "back on Monday"])
        machine.run("systemctl kill --signal=KILL --kill-whom=main vllmd.service")
        (row,) = json.loads(machine.run(["vllmctl", "usage", "--json", "-k", "alice"], timeout=60).stdout)["rows"]
        assert row["requests"] == 1
        assert "back on Monday" in machine.run([*chat[:1], "-s", *chat[2:]], timeout=60).stdout, "over a kill as well"
        machine.run("vllmctl enable steady")
        assert "[DONE]" in machine.run(chat, timeout=60).stdout
        owners = machine.run("stat -c '%U %a %n' /var/lib/vllmd /var/lib/vllmd/*").stdout
        assert "root 755 /var/lib/vllmd\n" in owners
        assert "vllmd 700 /var/lib/vllmd/keys" in owners
        assert "vllmd 700 /var/lib/vllmd/usage" in owners
        assert "vllmd 700 /var/lib/vllmd/orders" in owners
    finally:
        machine.run("vllmctl key revoke alice")


def test_a_changed_file_is_taken_by_itself(site: Site) -> None:
    """Once the unit for that is on; an invalid one changes nothing, and its log says why."""
    machine = site.machine
    machine.run("systemctl start vllmd-reload.path")
    try:
        machine.run("vllmctl ps")
        site.write_config(CONFIG + "  another: {engine: sim}\n")
        machine.run(
            "for i in $(seq 100); do vllmctl models | grep -q another && exit; sleep 0.1; done; exit 1", timeout=60
        )
        site.write_config(CONFIG + "polcy: lru\n")
        failed = "systemctl show --property=Result --value vllmd-reload.service | grep -q exit-code"
        machine.run(f"for i in $(seq 100); do {failed} && exit; sleep 0.1; done; exit 1", timeout=60)
        assert "another" in machine.run("vllmctl models").stdout
        assert "polcy" in machine.run("journalctl -u vllmd-reload.service").stdout
    finally:
        machine.run("systemctl stop vllmd-reload.path; systemctl reset-failed vllmd-reload.service", check=False)


HOLD = """
[Unit]
Requires=vllmd-sleep.service
After=vllmd-sleep.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
"""


def test_engines_leave_the_gpus_before_the_machine_sleeps(site: Site) -> None:
    """As sleep.target would have it, which nobody may start by hand: up before it is reached, down once it is left."""
    machine = site.machine
    site.write_config(CONFIG.replace("devices: []", "devices: [{memory: 8GiB}]").replace(
        "going: {engine: sim}", "going: {engine: sim, pin: true, options: {memory: 1GiB}}"))  # fmt: skip
    wants = machine.out("systemctl show --property=Wants --value sleep.target")
    assert "vllmd-sleep.service" in wants.split()
    before = machine.out("systemctl show --property=Before --value vllmd-sleep.service")
    assert {"sleep.target", "nvidia-suspend.service"} <= set(before.split())
    machine.write("/run/systemd/system/hold.service", HOLD)
    machine.run("systemctl daemon-reload")
    machine.run("systemctl start hold.service")  # no daemon runs: it is not woken for that
    assert site.active("vllmd.service") != "active"
    machine.run("systemctl stop hold.service")
    machine.run("vllmctl start going")
    machine.run("systemctl start hold.service", timeout=60)
    assert site.active("vllmd-sleep.service") == "active"
    status = site.status()
    assert [device["wedged"] for device in status["devices"]] == ["the machine is about to sleep"]
    assert site.state("going") == "stopped"
    machine.run("systemctl stop hold.service")
    machine.wait_until(lambda: site.state("going") == "running")
    assert machine.out("systemctl is-failed vllmd-sleep.service || true") != "failed"
