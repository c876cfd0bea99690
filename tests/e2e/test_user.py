"""The same units in a person's own session: no root, no system service, scopes on the user bus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.machine.container import Machine

pytestmark = pytest.mark.machine

USER = "ada"
CONFIG = """
server: {idle_exit: 2s}
idle: {sleep_after: IDLE, stop_after: IDLE}
devices: []
models: {mine: {engine: sim, options: {load_time: 0.2s}}}
"""
FILE = f"/home/{USER}/.config/vllmd/vllmd.yaml"
CHAT = (
    "curl -sf http://127.0.0.1:33258/v1/chat/completions -H 'Content-Type: application/json' "
    """-d '{"model": "mine", "messages": [{"role": "user", "content": "hello from home"}]}'"""
)


@pytest.fixture(scope="module")
def home(installed_machine: Machine) -> Iterator[Machine]:
    """A machine on which ada has a session and a configuration of her own, and the system's vllmd is off."""
    machine = installed_machine
    machine.run("systemctl disable --now vllmd.socket vllmd-admin.socket")
    machine.add_user(USER)
    machine.write(FILE, CONFIG.replace("IDLE", "10m"), owner=USER)
    machine.run(f"chown -R {USER}: /home/{USER}/.config")
    machine.run("systemctl --user start vllmd.socket", user=USER)
    yield machine
    machine.run("systemctl --user stop vllmd.socket vllmd-admin.socket vllmd.service", user=USER, check=False)


def status(home: Machine) -> Any:
    return json.loads(home.out("vllmctl ps --json", user=USER))


def test_a_request_is_answered_by_an_engine_in_a_scope_of_her_own(home: Machine) -> None:
    """Nobody needs root to share a GPU with oneself."""
    assert "hello from home" in home.out(CHAT, user=USER)
    units = home.out("systemctl --user list-units --no-legend 'vllmd-model-*.scope'", user=USER)
    assert "vllmd-model-mine-" in units
    assert home.out("ps -C vllmd -o user=").split() == [USER]


def test_vllmctl_finds_her_own_daemon(home: Machine) -> None:
    """The admin socket is in her runtime directory."""
    home.run(CHAT, user=USER)
    assert "mine" in home.out("vllmctl ps", user=USER)


def test_the_engine_survives_a_restart_and_goes_with_a_stop(home: Machine) -> None:
    """The same promises as the system's."""
    home.run(CHAT, user=USER)
    pid = home.out("pgrep -f [v]llmd.simengine")
    home.run("systemctl --user restart vllmd.service", user=USER)
    home.run(CHAT, user=USER)
    assert home.out("pgrep -f [v]llmd.simengine") == pid
    home.run("systemctl --user stop vllmd.service", user=USER)
    home.wait_until("! pgrep -f [v]llmd.simengine")


def test_it_goes_idle_by_itself(home: Machine) -> None:
    """Asleep, stopped, exited: her session pays nothing either."""
    home.write(FILE, CONFIG.replace("IDLE", "2s"), owner=USER)
    home.run(CHAT, user=USER)
    home.wait_until("! pgrep -f [v]llmd.simengine", timeout=60)
    home.wait_until("systemctl --user is-active vllmd.service | grep -x inactive", timeout=60, user=USER)
    assert "hello" in home.out(CHAT, user=USER)
