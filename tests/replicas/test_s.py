"""S's rows of the list of features, named after them: its servers are replicas here.

S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.engines.installed import Site, daemon
from tests.replicas.stubs import config, lists, replica, stubs, until
from vllmd.api.answers import ProbedReplica
from vllmd.client import Client
from vllmd.errors import Unavailable, VllmdError

HELLO = [{"role": "user", "content": "hello"}]
FOREIGN = "192.0.2.1"  # TEST-NET-1: nobody's


def client(site: Site) -> Client:
    """An operator's."""
    return Client(f"unix:{site.log.parent}/admin.sock")


def serving(site: Site, *names: str) -> None:
    """Have the models loaded, and wait until all of these replicas serve."""
    for model in {name.partition("@")[0] for name in names}:
        assert site.admin.post(f"/admin/models/{model}/load", json={}).status_code == 202
    until(lambda: all(replica(site, name)["health"] == "serving" for name in names))


def at_once(ask: Callable[[int], Any], number: int) -> list[Any]:
    """What so many requests that are sent together get."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(ask, range(number)))


def test_S_server_lists_of_chat_and_embedding_are_both_routed(tmp_path: Path) -> None:
    """Server(ip, port, model_size, model_path, gpus): two lists, every server of both gets its part."""
    with stubs(0.01, 0.01, 0.01, 0.01) as (a, b, c, d):
        vectors = lists(c, d, probe_route="/v1/embeddings")
        with daemon(tmp_path / "site", config(chat=lists(a, b), vectors=vectors)) as site, client(site) as asking:
            serving(site, "chat@fast", "chat@slow", "vectors@fast", "vectors@slow")
            at_once(lambda _: asking.chat_completion("chat", HELLO), 16)
            at_once(lambda _: asking.embeddings("vectors", "hello"), 16)
    assert (a.asked + b.asked, c.asked + d.asked) == (16, 16)
    assert min(a.asked, b.asked, c.asked, d.asked) > 0


def test_S_get_fastest_server_skips_the_slower(tmp_path: Path) -> None:
    """0.2 s and 5 s: the answer is there long before the slow one's, which is given up by then."""
    with stubs(0.2, 5.0) as (fast, slow), daemon(tmp_path / "site", config(m=lists(fast, slow))) as site:
        serving(site, "m@fast")
        until(lambda: replica(site, "m@slow")["state"] == "running")
        with client(site) as asking:
            answer = asking.probe("m")
            best = asking.fastest("m")
    first, second = answer.replicas
    assert (answer.fastest, first.name) == ("m@fast", "m@fast")
    assert first.seconds is not None and 0.2 <= first.seconds < 1.0
    assert second == ProbedReplica("m@slow", None, f"slower than {first.seconds:.3f} s")
    assert best
    assert best[0] == "m@fast"


def test_S_everybodys_time_is_to_be_had_as_well(tmp_path: Path) -> None:
    """Up to a limit; the probe of an operator lays nothing to anybody's charge."""
    with stubs(0.0, 0.3, 60.0) as (a, b, hanging), daemon(tmp_path / "site", config(m=lists(a, b, hanging))) as site:
        serving(site, "m@fast", "m@slow")
        with client(site) as asking:
            answer = asking.probe("m", all=True, limit=1.0)
        health = replica(site, "m@slow")["health"]
    assert [line.name for line in answer.replicas] == ["m@fast", "m@slow", "m@third"]
    assert (answer.replicas[1].seconds or 0.0) >= 0.3
    assert answer.replicas[2].seconds is None
    assert answer.replicas[2].message
    assert health == "serving"


def test_S_get_all_latency_has_a_row_for_each_server(tmp_path: Path) -> None:
    """Of what clients' requests have shown; None before the first."""
    with stubs(0.01, 0.05) as (a, b), daemon(tmp_path / "site", config(m=lists(a, b))) as site, client(site) as asking:
        serving(site, "m@fast", "m@slow")
        assert asking.latencies() == {"m@fast": None, "m@slow": None}
        at_once(lambda _: asking.chat_completion("m", HELLO), 16)
        known = asking.latencies("m")
    assert list(known) == ["m@fast", "m@slow"]
    assert known["m@fast"]
    assert known["m@slow"]
    assert known["m@slow"] >= 0.05


def test_S_get_running_server_sizes_are_those_that_run(tmp_path: Path) -> None:
    """The original told those that were configured."""
    with stubs(0.0, 0.0) as (a, b):
        models = {"8B": lists(a), "14B": lists(b)}
        with daemon(tmp_path / "site", config(**models)) as site, client(site) as asking:
            assert asking.running() == []
            serving(site, "8B@fast")
            assert asking.running() == ["8B"]


def test_S_benchmark_message_is_what_the_servers_are_asked(tmp_path: Path) -> None:
    """BENCHMAK_MESSAGE, before the first client's request."""
    with stubs(0.0) as (server,):
        with (
            daemon(tmp_path / "site", config(m=lists(server, probe="Count to three."))) as site,
            client(site) as asking,
        ):
            asking.chat_completion("m", HELLO)
        asked = [body["messages"][0]["content"] for body in server.seen]
    assert asked == ["Count to three.", "hello"]


def test_S_latency_growing_rate_sends_the_next_request_elsewhere(tmp_path: Path) -> None:
    """A server has become slow: after a late answer it gets nothing as long as another one is quicker."""
    with stubs(0.0, 0.0) as (fast, slow), daemon(tmp_path / "site", config(m=lists(fast, slow))) as site:
        serving(site, "m@fast", "m@slow")
        with client(site) as asking:
            slow.delay, before = 0.5, slow.asked
            at_once(lambda _: asking.chat_completion("m", HELLO), 16)
            assert slow.asked > before, "it was to answer late once"
            before = slow.asked
            for _ in range(10):
                asking.chat_completion("m", HELLO)
        assert slow.asked == before


def test_S_max_retry_one_server_dies_and_nobody_notices(tmp_path: Path) -> None:
    """The next one answers in its place."""
    with stubs(0.0, 0.0) as (a, b), daemon(tmp_path / "site", config(m=lists(a, b))) as site:
        serving(site, "m@fast", "m@slow")
        a.die()
        with client(site) as asking:
            answers = at_once(lambda _: asking.chat_completion("m", HELLO), 8)
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {f"by {b.url}"}


def test_S_max_retry_attempts_are_bounded(tmp_path: Path) -> None:
    """All fail: so many are tried as retries says and one more, then the client hears why."""
    with stubs(0.0, 0.0, 0.0) as servers, daemon(tmp_path / "site", config(m=lists(*servers, retries=1))) as site:
        serving(site, "m@fast", "m@slow", "m@third")
        for server in servers:
            server.failing = True
        assert site.chat("m").status_code >= 500
        assert sum(server.asked for server in servers) == 2
        told = re.findall(r"^vllmd_replica_retries_total.* (\S+)$", site.admin.get("/metrics").text, re.M)
    assert [float(count) for count in told] == [1.0]


def test_S_turn_off_running_flag_when_all_are_down_and_on_again(tmp_path: Path) -> None:
    """What says so: it does not run, it is degraded, each replica tells why; no restart is needed afterwards."""
    with stubs(0.0, 0.0) as (a, b), daemon(tmp_path / "site", config(m=lists(a, b))) as site, client(site) as asking:
        serving(site, "m@fast", "m@slow")
        for server in (a, b):
            server.die()
        until(lambda: asking.running() == [])
        line = site.view("m")
        assert (line["serving"], line["degraded"]) == (0, True)
        assert all(each["failure"] for each in line["replicas"])
        refused = refusal(lambda: asking.chat_completion("m", HELLO))
        assert isinstance(refused, Unavailable)
        assert "no connection" in refused.message
        for server in (a, b):
            server.rise()
        until(lambda: refusal(lambda: asking.chat_completion("m", HELLO)) is None)
        assert asking.running() == ["m"]


def refusal(ask: Callable[[], object]) -> VllmdError | None:
    """Why there is no answer; None if there is one."""
    try:
        ask()
    except VllmdError as error:
        return error
    return None


def test_S_get_completion_or_embedding(tmp_path: Path) -> None:
    """A text, or a vector."""
    with stubs(0.0, 0.0) as (a, b):
        models = {"chat": lists(a), "vectors": lists(b, probe_route="/v1/embeddings")}
        with daemon(tmp_path / "site", config(**models)) as site, client(site) as asking:
            text = asking.chat_completion("chat", HELLO)["choices"][0]["message"]["content"]
            vector = asking.embeddings("vectors", "hello")["data"][0]["embedding"]
    assert text == f"by {a.url}"
    assert vector == [0.5, 0.25]


def test_S_concurrent_start_of_several_servers(tmp_path: Path) -> None:
    """As many as fit come up side by side, each on a device and with a socket of its own."""
    model = {"engine": "sim", "gpu_memory": "50GiB", "replicas": 5, "options": {"load_time": "0.5s"}}
    here = {**config(m=model), "devices": [{"memory": "80GiB"}] * 4}
    with daemon(tmp_path / "site", here) as site:
        serving(site, *(f"m@{number}" for number in range(1, 5)))
        lines = site.view("m")["replicas"]
        starts = [d["at"] for d in site.admin.get("/admin/decisions").json()["decisions"] if d["what"] == "start"]
    assert [line["state"] for line in lines] == ["running"] * 4 + ["stopped"]
    assert sorted(line["devices"][0] for line in lines[:4]) == [0, 1, 2, 3]
    assert len({line["socket"] for line in lines[:4]}) == 4
    assert max(starts) - min(starts) < 0.5, "each began before the first could have ended"


def test_S_the_command_comes_from_the_configuration_and_only_this_hosts_servers_start(tmp_path: Path) -> None:
    """get_comond_infos, get_eno1_inet_address: model, devices and flags of an entry; another machine's is ignored."""
    record, program = tmp_path / "argv", tmp_path / "vllm"
    told = 'echo "$CUDA_VISIBLE_DEVICES" "$@"'
    program.write_text(f'#!/bin/sh\n{told} >>{record}\nexec {sys.executable} -m vllmd.simengine "$@"\n')
    program.chmod(0o755)
    of = [
        {"name": "ours", "host": "127.0.0.1", "devices": [0, 1], "tensor_parallel_size": 2},
        {"name": "theirs", "host": FOREIGN, "devices": [2]},
    ]
    model = {"engine": "vllm", "model": "/models/8b", "command": str(program), "gpu_memory": "20GiB"}
    here = {**config(m={**model, "max_model_len": 4096, "replicas": {"of": of}}), "devices": [{"memory": "80GiB"}] * 3}
    (tmp_path / "site").mkdir()
    with daemon(tmp_path / "site", here) as site:
        serving(site, "m@ours")
        names = [line["name"] for line in site.view("m")["replicas"]]
    (argv,) = record.read_text().splitlines()
    assert names == ["m@ours"]
    assert argv.startswith("0,1 serve /models/8b ")
    assert "--tensor-parallel-size 2" in argv
    assert "--max-model-len 4096" in argv
