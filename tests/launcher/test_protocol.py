"""What goes over the launcher's socket is checked, on both sides."""

from __future__ import annotations

import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmd.launcher import protocol
from vllmd.launcher.protocol import (
    Annotate,
    Done,
    Engines,
    Exited,
    ExitReport,
    Failed,
    Follow,
    Info,
    Kill,
    LauncherInfo,
    Lines,
    List,
    Logged,
    ProtocolError,
    Running,
    Signal,
    Start,
    Started,
    StartOrder,
    Tail,
    Unfollow,
    Waiting,
    decode,
    encode,
    instance_of,
    pack_engines,
    pack_lines,
    unit_of,
)

ORDER = StartOrder("m-1", ("vllm", "serve"), {"A": "1"}, limits={"memory_max": 1, "cpu_quota": 0.5}, timeout=5)
MESSAGES = [
    Start(ORDER),
    Signal("m-1", 15),
    Kill("m-1"),
    Annotate("m-1", {"port": "1"}),
    Follow("m-1", 3),
    Unfollow("m-1"),
    Tail("m-1"),
    List(),
    Info(),
    Done(),
    Failed("no", permanent=True),
    Started(Running("m-1", 7, "u", metadata={"port": "1"})),
    Engines((Running("m-1", 7, "u"),), more=True),
    Lines(("a", "b")),
    LauncherInfo("systemd", "x", ("memory_max",)),
    Exited(ExitReport("m-1", None, 9, True, True, ("last",))),
    Logged("m-1", ("line",)),
    Waiting("m-1", 7),
]


def test_every_message_survives_the_journey():
    """Both ends see the same thing; no type of message is forgotten here."""
    assert {type(message) for message in MESSAGES} == set(typing.get_args(protocol.Message))
    for number, message in enumerate(MESSAGES):
        assert decode(encode(message, number)) == (number, message)


@pytest.mark.parametrize(
    ("packet", "complaint"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 10_000, "not JSON"),
        (b"[]", "an object with a number `id`"),
        (b'{"id": true, "type": "List"}', "an object with a number `id`"),
        (b'{"id": -1, "type": "List", "body": {}}', "from 0 to 9007199254740991"),
        (b'{"id": 1%s, "type": "List", "body": {}}' % (b"0" * 30), "from 0 to 9007199254740991"),
        (b'{"id": 1%s, "type": "List", "body": {}}' % (b"0" * 9000), "not JSON"),
        (b'{"id": 1, "type": [[]], "body": {}}', "unknown type 'list'"),
        (b'{"id": 1, "type": "Kill", "body": {"instance": "\\ud800"}}', "is not Unicode"),
        (b'{"id": 1, "type": "Annotate", "body": {"instance": "a", "metadata": {"\\ud800": "x"}}}', "is not Unicode"),
        (b'{"id": 1, "type": "Tail", "body": {"instance": "a", "lines": 1%s}}' % (b"0" * 30), "of 64 bits"),
        (b'{"id": 1, "type": "Tail", "body": {"instance": "a", "lines": 10001}}', "lines must be from 0 to 10000"),
        (b'{"id": 1, "type": "Follow", "body": {"instance": "a", "lines": -5}}', "lines must be from 0 to 10000"),
        (b'{"id": 1, "type": "Follow", "body": {"instance": "a\\n--vacuum-size=1"}}', "must be 1 to 128 of"),
        (b'{"id": 1, "type": "Unfollow", "body": {"instance": ""}}', "must be 1 to 128 of"),
        (b'{"id": 1, "type": "Kill", "body": {"instance": "A"}}', "must be 1 to 128 of"),
        (b'{"id": 1, "type": "Reboot", "body": {}}', "unknown type 'Reboot'"),
        (b'{"id": 1, "type": "Kill"}', "Kill must be an object"),
        (b'{"id": 1, "type": "Kill", "body": {}}', "missing 1 required positional argument: 'instance'"),
        (b'{"id": 1, "type": "Kill", "body": {"instance": 5}}', r"Kill\.instance must be str, not int"),
        (b'{"id": 1, "type": "Kill", "body": {"instance": "a", "x": 1}}', "Kill has no field 'x'"),
        (b'{"id": 1, "type": "Signal", "body": {"instance": "a", "signum": 15.5}}', "must be int, not float"),
        (b'{"id": 1, "type": "Signal", "body": {"instance": "a", "signum": 64}}', "signal 64 is not one of"),
        (b"x" * (protocol.MAX_PACKET + 1), "more than"),
    ],
)
def test_malformed_packets_are_named(packet, complaint):
    """Whoever debugs the other end is told what is wrong with it."""
    with pytest.raises(ProtocolError, match=complaint):
        decode(packet)


def test_the_daemon_passes_over_what_a_newer_launcher_tells():
    """After an upgrade the launcher may be newer; what it says besides harms nobody, and only it is believed so."""
    engine = '{"instance": "a", "pid": 7, "unit": "u", "colour": "red"}'
    packet = b'{"id": 1, "type": "Engines", "body": {"engines": [%s], "mood": 1}}' % engine.encode()
    assert decode(packet, newer=True) == (1, Engines((Running("a", 7, "u"),)))
    with pytest.raises(ProtocolError, match="has no field"):
        decode(packet)


def test_a_launcher_that_tells_no_version_is_of_the_first():
    """That of 0.1.0, which the daemon does not work with."""
    packet = b'{"id": 1, "type": "LauncherInfo", "body": {"backend": "systemd", "detail": "x"}}'
    assert decode(packet)[1].protocol == 1 < protocol.PROTOCOL


def test_the_number_of_a_malformed_request_is_kept():
    """So that the error reaches the one who asked."""
    with pytest.raises(ProtocolError) as error:
        decode(b'{"id": 12, "type": "Kill", "body": 1}')
    assert error.value.id == 12


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"instance": "../x"}, "instance"),
        ({"instance": "a\\x2f"}, "instance"),
        ({"instance": "-a"}, "instance"),
        ({"instance": "a" * 129}, "instance"),
        ({"argv": ()}, "argv is empty"),
        ({"argv": ("a\0b",)}, r"control character \\x00 in argv"),
        ({"argv": ("a", "b\nOnSuccess=x.service")}, r"control character \\n in argv"),
        ({"argv": ("\ud800",)}, r"control character \\ud800 in argv"),
        ({"env": {"A\n": "1"}}, r"control character \\n in argv, env or user"),
        ({"env": {"A": "\0"}}, r"control character \\x00 in env"),
        ({"user": "root\n"}, r"control character \\n in argv, env or user"),
        ({"cwd": "/a\nb"}, r"control character \\n in cwd"),
        ({"run_dir": "/a\0b"}, r"control character \\x00 in run_dir"),
        ({"run_dir": "/r", "listen_uds": "/r/\0b"}, r"control character \\x00 in listen_uds"),
        ({"metadata": {"model": "a\nb"}}, r"control character \\n in the metadata 'model'"),
        ({"cwd": "relative"}, "cwd 'relative' is not an absolute path"),
        ({"cwd": "/" + "x" * 5000}, "longer than 4095 bytes"),
        ({"argv": ("/" + "y" * 5000,)}, "longer than 4095 bytes"),
        ({"argv": ("a",) * 1025}, "more than 1024 entries"),
        ({"run_dir": "/run/vllmd-engine/../dbus"}, "not an absolute path without"),
        ({"run_dir": "//run/x"}, "not an absolute path without"),
        ({"run_dir": "/run/x/"}, "not an absolute path without"),
        ({"listen_uds": "/run/vllmd/launcher.sock"}, "is not in run_dir"),
        ({"run_dir": "/run/x", "listen_uds": "/run/xy/s"}, "is not in run_dir '/run/x'"),
        ({"run_dir": "/run/x", "listen_uds": "/run/x/" + "s" * 107}, "longer than 107 bytes"),
        ({"env": {"A=B": "1"}}, "env"),
        ({"limits": {"ExecStopPost": "rm"}}, "limit 'ExecStopPost' is not one of memory_max"),
        ({"limits": {"cpu_quota": 9e18}}, "limit cpu_quota cannot be"),
        ({"limits": {"cpu_quota": float("nan")}}, "limit cpu_quota cannot be nan"),
        ({"limits": {"cpu_weight": 0}}, "limit cpu_weight cannot be 0"),
        ({"limits": {"cpu_weight": 10001}}, "limit cpu_weight cannot be 10001"),
        ({"limits": {"tasks_max": 0}}, "limit tasks_max cannot be 0"),
        ({"limits": {"memory_max": 1 << 63}}, "limit memory_max cannot be"),
        ({"limits": {"memory_max": "1G"}}, "limit memory_max cannot be '1G'"),
        ({"limits": {"memory_max": -1}}, "limit memory_max cannot be -1"),
        ({"limits": {"tasks_max": True}}, "limit tasks_max cannot be True"),
        ({"limits": {"oom_policy": "no"}}, "must be continue, stop, kill"),
        ({"metadata": {"launcher.pid": "1"}}, "metadata key 'launcher.pid'"),
        ({"metadata": {"big": "x" * 5000}}, "longer than"),
        ({"metadata": {f"k{n}": "x" for n in range(65)}}, "more than 64 keys"),
        ({"metadata": {f"k{n}": "x" * 4000 for n in range(5)}}, "more than 64 keys or 16384 bytes"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"stop_timeout": 1e9}, "stop_timeout in"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_orders_that_could_never_work_are_refused(change, complaint):
    """Before a process exists for them; and the launcher checks again what the client has checked."""
    with pytest.raises(ProtocolError, match=complaint):
        dataclasses.replace(ORDER, **change)
    body = {"order": dataclasses.asdict(ORDER) | change}
    with pytest.raises(ProtocolError):
        decode(json.dumps({"id": 1, "type": "Start", "body": body}).encode())


def test_too_large_an_order_is_an_error_and_not_a_cut_packet():
    """The kernel would refuse it with a bare EMSGSIZE."""
    with pytest.raises(ProtocolError, match="at most 131072 fit"):
        encode(Start(dataclasses.replace(ORDER, env=dict.fromkeys("ABC", "x" * 60000))))


def test_lines_are_packed_into_packets_that_fit():
    """A long log arrives in several packets, in order; a monstrous line is cut and says so."""
    lines = [f"{number} " + "é\x00" * 2000 for number in range(100)] + ["x" * 1_000_000]
    groups = list(pack_lines(lines))
    assert [line for group in groups for line in group][:-1] == lines[:-1]
    assert groups[-1][-1].endswith("... [1000000 characters]")
    assert all(len(encode(Lines(group))) <= protocol.MAX_PACKET for group in groups)
    assert list(pack_lines([])) == [()]


def test_nobody_else_describes_a_unit():
    """systemd writes a description into the unit's file, and believes each line of that at its next reload."""
    packet = encode(Start(ORDER)).replace(b'"order":{', b'"order":{"description":"x\\nOnSuccess=evil.service",')
    with pytest.raises(ProtocolError, match=r"Start\.order has no field 'description'"):
        decode(packet)


def test_an_engines_environment_may_have_lines():
    """A certificate, a template: systemd never sees them."""
    dataclasses.replace(ORDER, env={"PEM": "-----BEGIN\n\tx\n"})


@pytest.mark.parametrize("unit", ["ssh.service", "vllmd-model-.scope", "vllmd-model-A.scope", "vllmd-model-a.service"])
def test_only_our_scopes_are_ours(unit):
    """The launcher, which is root, touches no other unit."""
    assert instance_of(unit) is None


def test_unit_names_are_reversible():
    """A scope found after a restart tells its instance."""
    assert unit_of("qwen3-0.6b-1a2b") == "vllmd-model-qwen3-0.6b-1a2b.scope"
    assert instance_of(unit_of("qwen3-0.6b-1a2b")) == "qwen3-0.6b-1a2b"


def test_engines_are_packed_into_packets_that_fit():
    """Whatever was noted beside them: one that made the list too large for a packet would hide all of them."""
    metadata = {f"k{n}": "é" * 500 for n in range(5)}
    engines = [Running(f"m-{n}", 7, "u", metadata=metadata) for n in range(40)]
    groups = list(pack_engines(engines))
    assert [engine for group in groups for engine in group] == engines
    assert len(groups) > 1
    assert all(len(encode(Engines(group, more=True))) <= protocol.MAX_PACKET for group in groups)
    assert list(pack_engines([])) == [()]


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=50),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        ).map(lambda body: json.dumps({"id": 1, "type": "Start", "body": {"order": body}}).encode()),
        st.fixed_dictionaries(
            {"instance": st.sampled_from(["a", "\ud800", "a\0", ""]), "argv": st.just(["a"])},
            optional={
                "limits": st.dictionaries(st.sampled_from([*protocol.LIMITS]), st.floats() | st.integers() | st.text()),
                "metadata": st.dictionaries(st.text(), st.text() | st.just("\ud800")),
                "timeout": st.floats() | st.integers(),
                "env": st.dictionaries(st.text(), st.text()),
                "run_dir": st.text(),
            },
        ).map(lambda order: json.dumps({"id": 1, "type": "Start", "body": {"order": order}}).encode()),
    )
)
def test_no_packet_is_anything_but_a_message_or_an_error(packet):
    """Whatever else came out of it would leave its sender without an answer."""
    try:
        _, message = decode(packet)
    except ProtocolError as error:
        str(error).encode()
    else:
        assert decode(encode(message, 1)) == (1, message)
