"""What a daemon has in memory when it answers its first client: nothing that this client does not need."""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.daemon.test_reload import Living, lives, read
from vllmd.daemon import service

# Each brings megabytes or milliseconds, and is imported where it is needed first.
NOT_YET = (
    *("bz2", "csv", "ctypes", "difflib", "email", "importlib.metadata", "lzma", "prometheus_client", "pystemd"),
    *("shutil", "sqlite3", "tempfile", "zipfile", "xml", "urllib.request", "http.client", "unittest", "pydoc", "httpx"),
    *("vllmd.cli", "vllmd.client", "vllmd.installer", "vllmd.simulate", "vllmd.launcher.service", "vllmd.store.fetch"),
    *("vllmd.daemon.startup", "vllmd.daemon.back_end", "vllmd.records.store", "vllmd.admin.exposition"),
    *("vllmd.config.tls", "vllmd.proxy.zstd", "vllmd.gpu", "vllmd.daemon.downloads", "vllmd.daemon.spans"),
    *(
        "argparse",
        "gzip",
        "vllmd.daemon.command_line",
        "vllmd.daemon.other_routes",
        "vllmd.admin.routes",
        "vllmd.admin.verbs",
    ),
    *("vllmd.api.verbs", "vllmd.ollama", "vllmd.ui", "vllmd.core.scheduler", "vllmd.core.preview", "vllmd.core.model"),
    *("vllmd.launcher.client", "vllmd.launcher.protocol", "vllmd.engines.standby", "vllmd.daemon.loaders"),
)
# Nor does a daemon that serves have these: each takes a tenth of a megabyte, with what it brings.
NEVER = ("bz2", "calendar", "gzip", "logging.handlers", "lzma", "pickle", "shutil", "tempfile", "tarfile", "zipfile",
         "csv", "email", "importlib.util", "vllmd.daemon.logfile")  # fmt: skip
SCRIPT = """
import json, re, sys
from vllmd.config.loader import load
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon import main, service
from vllmd.daemon.front_end import front_end
config = load(sys.argv[1], {}, {})
print(json.dumps(sorted(sys.modules)))
print(sum(isinstance(v, re.Pattern) for name, module in sys.modules.items() if name.startswith("vllmd")
          for v in vars(module).values()))
from vllmd.daemon import other_routes, startup
from vllmd.engines import engine_of, environments
model = config.models["model-0"]
engine_of(model)
environments.in_path(model, "vllm")
print(json.dumps(sorted(sys.modules)))
"""
PATTERNS = 70  # of what every request is searched for: the others are strings, which ``re`` compiles at their first use


def test_what_the_first_client_does_not_need_is_not_imported(tmp_path: Path) -> None:
    """All that is imported before the daemon listens, and a configuration of ten models."""
    file = tmp_path / "vllmd.yaml"
    models = "".join(f"  model-{n}: {{engine: vllm, model: org/model-{n}}}\n" for n in range(10))
    file.write_text(f"models:\n{models}")
    told = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{SCRIPT}", file],
                          capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    modules, patterns, later = map(json.loads, told.stdout.splitlines())
    assert [name for name in NOT_YET if name in modules] == []
    assert [name for name in NEVER if name in later] == []
    assert 20 < patterns <= PATTERNS


@pytest.mark.parametrize("failure", [None, OSError(errno.EMFILE, "full"), ImportError("gone")])
def test_the_other_routes_are_imported_beside_what_is_served(
    monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    """Not at the first request for one: that would hold up all streams, and be a later version's after an upgrade."""
    imported: list[tuple[str, bool]] = []

    def note(name: str) -> None:
        imported.append((name, threading.current_thread() is threading.main_thread()))
        if failure:
            raise failure

    monkeypatch.setattr(service, "OTHER_ROUTES_AFTER", 0.0)
    monkeypatch.setattr(importlib, "import_module", note)
    asyncio.run(service.import_other_routes())
    wanted = service.NEEDED_LATER[: 1 if failure else None]
    assert imported == [(name, False) for name in wanted]


UPGRADED = """
import asyncio, sys
from vllmd.config.loader import load
from vllmd.daemon import service, startup
from vllmd.engines import engine_of
from vllmd.engines.base import Launch, Listen
config, service.OTHER_ROUTES_AFTER = load(sys.argv[1], {}, {}), 0.0
asyncio.run(service.import_other_routes())
engines = [(model, engine_of(model)) for model in config.models.values()]

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllmd":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Gone())
for model, engine in engines:
    print(engine.standby(model, Launch(("/usr/bin/python3", "serve"), Listen())))
"""


def test_an_engine_can_be_started_when_the_package_has_been_replaced(tmp_path: Path) -> None:
    """By a daemon that has not been restarted yet: what its starts need is imported, or they would fail."""
    (file := tmp_path / "vllmd.yaml").write_text("models: {m: {}, t: {engine: transformers}}")
    told = subprocess.run(
        [sys.executable, "-c", UPGRADED, file], capture_output=True, text=True, timeout=60, check=True
    )
    assert told.stdout == "None\nNone\n"


@pytest.mark.parametrize("asked", [True, False])
def test_what_writes_log_files_is_imported_where_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Not at the start of an engine: the package may have been replaced by then."""
    monkeypatch.delitem(sys.modules, "vllmd.daemon.logfile", raising=False)

    async def look(living: Living) -> None:
        assert ("vllmd.daemon.logfile" in sys.modules) is asked

    model = {"engine": "sim", "log_file": asked}
    lives(read(tmp_path, {"devices": [], "models": {"m": model}}), tmp_path, look)


def test_a_configuration_is_taken_also_where_what_writes_log_files_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload by a daemon whose package was replaced is a whole one; only a start of that model fails."""
    monkeypatch.setitem(sys.modules, "vllmd.daemon.logfile", None)
    before, after = ({"devices": [], "models": {"m": {"engine": "sim", "log_file": asked}}} for asked in (False, True))

    async def look(living: Living) -> None:
        await living.daemon.reload()
        assert living.config.models["m"].log_file

    lives(read(tmp_path, before), tmp_path, look, again=lambda: read(tmp_path, after))


def test_the_rest_is_imported_when_the_first_clients_have_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an import in a thread each turn takes milliseconds. Who waits for an engine is not waited for."""

    async def play() -> None:
        clients, waiting = SimpleNamespace(busy=2), SimpleNamespace(requests=1)
        front: Any = SimpleNamespace(listeners=clients, gate=waiting)
        answered = asyncio.ensure_future(service.first_answers(front))
        for _ in range(5 * service.FIRST_TURNS):
            await asyncio.sleep(0)
        assert not answered.done()
        clients.busy = 1
        await answered
        clients.busy = 2
        monkeypatch.setattr(service, "FIRST_LOOKS", 1)
        await service.first_answers(front)

    monkeypatch.setattr(service, "FIRST_LOOKS", 10**9)
    asyncio.run(play())


HELD = """
import gc, sys
from vllmd.config.types import Config
from vllmd.daemon import main
async def run(daemon):
    gc.unfreeze()
    gc.collect()
    print(sum(type(each) is Config and len(each.models) == 10 for each in gc.get_objects()))
main.Daemon.run = run
sys.exit(main.main(["--config", sys.argv[1]]))
"""


def test_nobody_but_the_daemon_keeps_the_configuration(tmp_path: Path) -> None:
    """What read it would keep the first one for as long as the daemon lives, whatever is reloaded."""
    file = tmp_path / "vllmd.yaml"
    file.write_text(
        "server: {listen: ['127.0.0.1:0']}\nmodels:\n" + "".join(f"  m{n}: {{engine: sim}}\n" for n in range(10))
    )
    told = subprocess.run([sys.executable, "-c", HELD, file], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "1\n"
