"""The whole product with the stand-in engine, on a booted systemd 252, from the installed package.

Each test is what a user would do at a terminal of that machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.e2e.site import Site
from tests.machine.container import Machine

pytestmark = pytest.mark.machine

CONFIG = """
server: {idle_exit: 2s}
idle: {sleep_after: 3s, level: 1, deepen_after: never, stop_after: 6s}
models:
  org/small: {engine: sim, aliases: [fast], options: {load_time: 0.3s}}
  keeper: {engine: sim, idle: &stays {sleep_after: never, stop_after: never}, options: {tokens_per_second: 20}}
  family: {engine: sim, idle: *stays, options: {fail: [fork-grandchildren]}}
  broken: {engine: sim, options: {fail: [exit-at-start]}, max_restarts: 0}
  absent: {engine: sim, command: [/no/such/engine]}
records: {access_log: journal}
"""


@pytest.fixture(scope="module")
def site(installed_machine: Machine) -> Iterator[Site]:
    site = Site(installed_machine)
    site.configure(CONFIG)
    yield site
    site.machine.run("systemctl stop vllmd.service", check=False)


@pytest.fixture(autouse=True)
def at_rest(site: Site) -> None:
    """Every test begins with the socket listening and nothing running."""
    site.to_rest()


def test_at_rest_the_socket_listens_and_nothing_runs(site: Site) -> None:
    """A machine at rest pays nothing but a listening socket."""
    assert site.active("vllmd.socket") == "active"
    assert site.active("vllmd-admin.socket") == "active"
    assert site.active("vllmd.service") == "inactive"
    assert site.active("vllmd-launcher.service") == "inactive"
    listening = site.machine.out("ss -Hltn sport = :33258")
    assert "127.0.0.1:33258" in listening
    assert "[::1]:33258" in listening


def test_the_first_request_wakes_it_all_and_is_answered(site: Site) -> None:
    """One request to a cold machine is enough."""
    answer = site.chat("org/small", "hello there")
    assert "hello there" in answer["choices"][0]["message"]["content"]
    assert answer["model"] == "org/small"
    assert site.active("vllmd.service") == "active"


def test_daemon_launcher_and_engine_live_apart(site: Site) -> None:
    """Three cgroups, three users: what parses the network is neither root nor the engine."""
    site.chat("org/small", "hi")
    tree = site.machine.out("systemd-cgls --no-pager")
    scope = site.scope("org/small")
    assert all(unit in tree for unit in ("vllmd.service", "vllmd-launcher.service", scope))
    assert site.users(scope) == {"vllmd-engine"}
    assert site.users("vllmd.service") == {"vllmd"}
    assert "root" in site.users("vllmd-launcher.service")
    assert site.machine.show(scope, "Slice") == "vllmd.slice"


def test_idle_sleeps_then_stops_then_the_daemon_exits_and_the_next_request_works(site: Site) -> None:
    """What nobody uses goes away by itself, in order, and comes back when it is wanted."""
    site.chat("org/small", "hi")
    seen = site.states_until_gone("org/small")
    assert seen == ["running", "sleeping_l1", "stopped"]
    site.machine.wait_until("systemctl is-active vllmd.service | grep -x inactive")
    assert site.machine.cgroup_pids("vllmd.slice") == []
    assert "again" in site.chat("org/small", "again")["choices"][0]["message"]["content"]


def test_a_stream_arrives_piece_by_piece(site: Site) -> None:
    """Nothing is buffered: the first piece is there long before the last."""
    site.chat("keeper", "warm")
    pieces = site.python(
        """
        import http.client, json, time
        c = http.client.HTTPConnection("127.0.0.1", 33258)
        c.request("POST", "/v1/chat/completions", json.dumps({"model": "keeper", "stream": True, "max_tokens": 20,
            "messages": [{"role": "user", "content": "a b c d e f g h i j k l m n o p q r s t"}]}),
            {"Content-Type": "application/json"})
        r = c.getresponse()
        assert r.headers["content-type"].startswith("text/event-stream"), r.headers
        times = []
        while line := r.readline():
            if line.startswith(b"data:"): times.append(time.monotonic())
        print(json.dumps([t - times[0] for t in times]))
        """
    )
    assert len(pieces) > 10
    assert pieces[-1] > 0.4  # twenty tokens at twenty a second were not held back to the end


def test_200_requests_over_idle_exits_are_all_answered(site: Site) -> None:
    """The daemon leaves and comes back between requests; nobody is refused or reset."""
    site.configure(CONFIG.replace("idle_exit: 2s", "idle_exit: 0.05"))
    try:
        result = site.python(
            """
            import collections, http.client, json, random, time
            random.seed(7)
            outcome = collections.Counter()
            for n in range(200):
                try:
                    c = http.client.HTTPConnection("127.0.0.1", 33258, timeout=20)
                    c.request("GET", "/v1/models")
                    outcome[c.getresponse().status] += 1
                    c.close()
                except OSError as e:
                    outcome[type(e).__name__] += 1
                time.sleep(random.uniform(0, 0.2))
            print(json.dumps(outcome))
            """,
            timeout=120,
        )
        exits = site.machine.journal("vllmd.service").count("exiting until the next connection")
        assert result == {"200": 200}
        assert exits >= 10
    finally:
        site.configure(CONFIG)


@pytest.mark.parametrize("how", ["systemctl restart vllmd.service", "systemctl kill -s KILL vllmd.service"])
def test_the_engine_survives_the_daemon(site: Site, how: str) -> None:
    """An upgrade or a crash reloads no model."""
    site.chat("keeper", "hi")
    pid = site.engine_pid("keeper")
    daemon = site.machine.show("vllmd.service", "MainPID")
    site.machine.run(how)
    site.machine.wait_until(
        lambda: (
            site.machine.show("vllmd.service", "MainPID") not in ("0", daemon)
            and site.active("vllmd.service") == "active"
        )
    )
    assert "back" in site.chat("keeper", "back")["choices"][0]["message"]["content"]
    assert site.engine_pid("keeper") == pid


def test_a_running_stream_survives_a_restart(site: Site) -> None:
    """Restarting finishes what has begun before it goes."""
    site.chat("keeper", "warm")
    stream = site.machine.popen(site.curl_stream("keeper", "w " * 40, max_tokens=40))
    site.machine.wait_until(lambda: site.status()["requests"] == 1)
    site.machine.run("systemctl restart vllmd.service")
    out, _ = stream.communicate(timeout=120)
    assert out.rstrip().endswith("data: [DONE]")


def test_a_restart_under_kept_connections_takes_as_long_as_a_request(site: Site) -> None:
    """Every SDK keeps its connections: each is told to close, none is refused, and nobody waits for the drain limit."""
    site.chat("keeper", "warm")
    clients = site.machine.popen(["/usr/bin/python3", "-c", KEPT_CONNECTIONS])
    site.machine.wait_until(lambda: site.status()["requests"] >= 2)
    began = time.monotonic()
    site.machine.run("systemctl restart vllmd.service")
    assert time.monotonic() - began < 20  # and not the drain_timeout of 60
    site.machine.write("/run/enough", "")
    out, error = clients.communicate(timeout=120)
    assert json.loads(out).keys() == {"200"}, (out, error)


KEPT_CONNECTIONS = """
import collections, http.client, json, os, random, threading, time
outcome, body = collections.Counter(), {"model": "keeper", "messages": [{"role": "user", "content": "a b c d e f g h"}]}
def client():
    c = http.client.HTTPConnection("127.0.0.1", 33258, timeout=60)
    while not os.path.exists("/run/enough"):
        try:
            c.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = c.getresponse()
            answer.read()
            outcome[answer.status] += 1
        except Exception as e:
            outcome[repr(e)] += 1
            c.close()
        time.sleep(random.uniform(0, 0.05))
threads = [threading.Thread(target=client) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(outcome))
"""


def test_a_stop_that_comes_while_it_opens_is_told_to_the_client(site: Site) -> None:
    """The request that woke the daemon is answered, and no engine is left behind."""
    for _ in range(3):
        waiting = site.machine.popen(site.curl("keeper", "hi") + " -w '%{http_code}'")
        site.machine.wait_until("systemctl is-active vllmd.service")
        site.machine.run("systemctl stop vllmd.service")
        out, _ = waiting.communicate(timeout=120)
        assert out[-3:] in ("200", "503"), out
        site.machine.wait_until(lambda: site.machine.cgroup_pids("vllmd.slice") == [])


def test_the_sockets_may_be_restarted_under_a_daemon(site: Site) -> None:
    """A changed address takes effect that way: the daemon goes with its sockets, its engines stay."""
    site.chat("keeper", "hi")
    pid = site.engine_pid("keeper")
    for socket in ("vllmd.socket", "vllmd-admin.socket", "vllmd.socket", "vllmd-launcher.socket"):
        site.machine.run(f"systemctl restart {socket}")
        assert [site.active(unit) for unit in ("vllmd.socket", "vllmd-admin.socket")] == ["active", "active"]
        assert "again" in site.chat("keeper", "again")["choices"][0]["message"]["content"]
        assert site.engine_pid("keeper") == pid


def test_it_serves_where_ipv6_is_switched_off(site: Site) -> None:
    """A common setting; the other loopback address must not go with it."""
    site.machine.run("systemctl stop vllmd.socket; sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
    try:
        site.machine.run("systemctl start vllmd.socket")
        assert "hi" in site.chat("keeper", "hi")["choices"][0]["message"]["content"]
        site.machine.run("systemctl stop vllmd.socket vllmd.service")
        served = site.machine.popen("exec vllmd serve --config /etc/vllmd/vllmd.yaml")
        site.machine.wait_until("curl -sf http://127.0.0.1:33258/health")
        served.terminate()
        site.machine.run("pkill -x vllmd", check=False)
        _, error = served.communicate(timeout=120)
        assert "[::1]:33258" in error
    finally:
        site.machine.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=0; systemctl start vllmd.socket")


def test_the_bus_may_be_restarted(site: Site) -> None:
    """As an upgrade of dbus does; models start and stop afterwards as before."""
    site.chat("keeper", "hi")
    site.machine.run("systemctl restart dbus.service")
    assert "there" in site.chat("family", "are you there")["choices"][0]["message"]["content"]
    site.machine.run("vllmctl stop keeper")
    assert site.state("keeper") == "stopped"


def test_stop_leaves_no_process_of_any_engine(site: Site) -> None:
    """Also not those that forked twice and made sessions of their own."""
    site.chat("family", "hi")
    scope = site.scope("family")
    assert len(site.machine.cgroup_pids(scope)) >= 3
    site.machine.run("systemctl stop vllmd.service")
    site.machine.wait_until(lambda: site.machine.cgroup_pids("vllmd.slice") == [])
    assert site.machine.run("pgrep -u vllmd-engine", check=False).stdout == ""


def test_the_launcher_may_be_killed(site: Site) -> None:
    """Its engines run on, and their exits are still noticed."""
    site.chat("keeper", "hi")
    pid = site.engine_pid("keeper")
    site.machine.run("systemctl kill -s KILL vllmd-launcher.service")
    assert "still" in site.chat("keeper", "still here")["choices"][0]["message"]["content"]
    assert site.engine_pid("keeper") == pid
    site.machine.run(["kill", "-9", str(pid)])
    site.machine.wait_until(lambda: site.state("keeper") == "error" and site.engine_pid("keeper") is None)
    assert "new" in site.chat("keeper", "new")["choices"][0]["message"]["content"]


def test_when_the_daemon_has_failed_for_good_its_engines_are_stopped(site: Site) -> None:
    """Nothing survives that nobody manages; and nothing was stopped while it could still come back."""
    site.chat("keeper", "hi")
    scope, drop_in = site.scope("keeper"), "/run/systemd/system/vllmd.service.d/broken.conf"
    # As many starts as units/vllmd.service allows, but in a time that is enough on a busy machine, too.
    limit = "[Unit]\nStartLimitIntervalSec=5min\n"
    site.machine.write(drop_in, f"{limit}[Service]\nExecStart=\nExecStart=/bin/false\n")
    site.machine.run("systemctl daemon-reload; systemctl kill -s KILL vllmd.service")
    try:
        site.machine.wait_until(lambda: site.active("vllmd.service") == "failed")
        site.machine.wait_until(lambda: site.machine.cgroup_pids(scope) == [])
        assert site.machine.journal("vllmd.service").count("Scheduled restart job") >= 5
    finally:
        site.machine.run(f"rm {drop_in}; systemctl daemon-reload")


def test_an_unknown_model_names_the_close_ones(site: Site) -> None:
    """A typo is answered with what would have been right."""
    status, body = site.post("/v1/chat/completions", {"model": "org/smal", "messages": []})
    assert status == 404
    assert body["error"]["code"] == "model_not_found"
    assert "org/small" in body["error"]["message"]


def test_a_model_that_fails_to_start_tells_every_waiter_why(site: Site) -> None:
    """Each of them gets the reason at once, in one line; the engine's log is the operator's."""
    answers = site.posts(5, "/v1/chat/completions", {"model": "broken", "messages": [{"role": "user", "content": "x"}]})
    assert [status for status, _ in answers] == [503] * 5
    assert all("exited with status 1" in body["error"]["message"] for _, body in answers)
    assert all("\n" not in body["error"]["message"] for _, body in answers)
    assert "last log lines" in site.machine.out("vllmctl why broken")


def test_a_missing_engine_command_is_named(site: Site) -> None:
    """An engine that is not installed is a common mistake and deserves its name in the error."""
    status, body = site.post("/v1/completions", {"model": "absent", "prompt": "x"})
    assert status == 503
    assert "\N{HORIZONTAL ELLIPSIS}/engine" in body["error"]["message"]


def test_malformed_http_is_refused_and_harms_nobody(site: Site) -> None:
    """Garbage gets 400; the next client is served."""
    garbage = site.machine.out("printf 'GARBAGE\\r\\n\\r\\n' | timeout 5 python3 -c \"import socket,sys;"
                               "s=socket.create_connection(('127.0.0.1',33258));s.sendall(sys.stdin.buffer.read());"
                               "print(s.recv(4096).decode())\"")  # fmt: skip
    assert garbage.startswith("HTTP/1.1 400")
    assert site.get("/health")[0] == 200


def test_an_invalid_configuration_is_told_to_the_administrator_and_to_clients(site: Site) -> None:
    """The check names file, line and key; clients hear that it is not their fault; repairing it is enough."""
    site.write_config(CONFIG.replace("aliases: [fast]", "alias: [fast]"))
    checked = site.machine.run("vllmd --check", check=False)
    assert checked.returncode == 78
    assert "/etc/vllmd/vllmd.yaml:5" in checked.stderr
    assert "aliases" in checked.stderr
    site.machine.run("systemctl restart vllmd.service")
    status, body = site.post("/v1/chat/completions", {"model": "org/small", "messages": []})
    assert status == 503
    assert "vllmd.yaml:5" in body["error"]["message"]
    assert (
        "alias" not in body["error"]["message"] + site.get("/health")[1]["status"]
    )  # what is there is not for clients
    site.configure(CONFIG)
    assert "fixed" in site.chat("fast", "fixed")["choices"][0]["message"]["content"]


def test_without_a_gpu_library_it_works_and_says_so(site: Site) -> None:
    """Most laptops have none."""
    site.chat("org/small", "hi")
    assert site.status()["source"] == "cpu: there is no GPU with a driver; engines run on the CPU"


def test_every_decision_is_in_the_journal_with_its_fields(site: Site) -> None:
    """The operator always knows why."""
    site.chat("org/small", "hi")
    records = [
        json.loads(line) for line in site.machine.out("journalctl -o json DECISION=start MODEL=org/small").splitlines()
    ]
    assert records
    assert records[-1]["_SYSTEMD_UNIT"] == "vllmd.service"


def test_every_request_is_in_the_journal_with_its_fields(site: Site) -> None:
    """The access log, where it was asked for there: found by model, key or request, with the times of each."""
    site.chat("org/small", "hi")
    found = "journalctl -o json _SYSTEMD_UNIT=vllmd.service MODEL=org/small VLLMD_STATUS=200"
    record = json.loads(site.machine.out(found).splitlines()[-1])
    assert record["MESSAGE"].startswith("POST /v1/chat/completions org/small 200 ")
    assert record["REQUEST_ID"] and float(record["VLLMD_SECONDS"]) > 0 and int(record["VLLMD_ANSWER_TOKENS"]) > 0
    assert "hi" not in record["MESSAGE"].split()  # never what was said


def test_the_engines_own_log_is_in_the_journal_under_its_unit(site: Site) -> None:
    """What an engine prints is found by its unit."""
    site.chat("org/small", "hi")
    assert "startup complete" in site.machine.journal(site.scope("org/small")).lower()


def test_start_and_stop_by_hand(site: Site) -> None:
    """vllmctl says what it did, and ps shows it."""
    site.machine.run("vllmctl start keeper")
    assert "keeper" in site.machine.out("vllmctl ps")
    assert site.state("keeper") == "running"
    site.machine.run("vllmctl sleep keeper --level 2")
    assert site.state("keeper") == "sleeping_l2"
    site.machine.run("vllmctl wake-up keeper")
    assert site.state("keeper") == "running"
    site.machine.run("vllmctl stop keeper")
    assert site.state("keeper") == "stopped"


def test_a_client_that_leaves_frees_the_engine_at_once(site: Site) -> None:
    """A closed browser tab must not keep a GPU busy."""
    site.chat("keeper", "warm")
    stream = site.machine.popen(site.curl_stream("keeper", "w " * 200, max_tokens=200))
    site.machine.wait_until(lambda: site.view("keeper")["in_flight"] == 1)
    began = time.monotonic()
    site.machine.run("pkill -x curl")
    site.machine.wait_until(lambda: site.view("keeper")["in_flight"] == 0)
    assert time.monotonic() - began < 5  # the answer itself would have taken ten seconds
    assert stream.wait(120) != 0
