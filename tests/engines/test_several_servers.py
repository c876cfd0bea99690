"""S's start of many servers: at once, each with a port and a device of its own, and no more than there is room for.

S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.engines.installed import daemon

SERVER = Path(__file__).resolve().parents[1] / "plugin/vllmd_example/server.py"
# Each waits for the two others before it listens: one after another they would never be ready.
TOGETHER = """
touch "$1/$2"
until [ "$(ls "$1" | wc -l)" -ge 3 ]; do sleep 0.05; done
exec "$3" "$4" "$5" "$2 says "
"""


def test_S_several_servers_start_at_once_where_there_is_room(tmp_path: Path) -> None:
    """Four models of 60 GiB on three devices of 80: three start together, the fourth not at all."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "together").write_text(TOGETHER)
    server = [sys.executable, str(SERVER), "${PORT}"]
    model = {
        "engine": "command",
        "command": ["sh", str(tmp_path / "together"), str(tmp_path / "begun"), "${NAME}", *server],
        "gpu_memory": "60GiB",
        "preload": True,
        "pin": True,
    }
    names = ("a", "b", "c")
    config = {
        "devices": [{"memory": "80GiB"}] * 3,
        "server": {"idle_exit": "never"},
        "models": dict.fromkeys((*names, "d"), model),
    }
    with daemon(tmp_path / "site", config) as site:
        assert [site.answer(name, "hello") for name in names] == [f"{name} says hello" for name in names]
        lines = [site.view(name) for name in names]
        assert len({line["socket"] for line in lines}) == 3
        assert sorted(line["devices"] for line in lines) == [[0], [1], [2]]
        assert site.view("d")["state"] == "stopped"
        assert "pinned models ('a', 'b', 'c') leave less" in site.refusal("d")
