"""The table of operators' verbs: whatever is in a row follows everywhere, and what it names is there."""

from __future__ import annotations

import asyncio
import importlib.machinery
import importlib.util
import inspect
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.cli.fake_daemon import fake_daemon
from vllmd.admin import control
from vllmd.admin.openapi import document
from vllmd.admin.verbs import add_verbs
from vllmd.api import verbs
from vllmd.api.answers import ModelLine
from vllmd.api.kinds import Count
from vllmd.api.verbs import MODEL, Command, Method, Param, Verb
from vllmd.cli import main
from vllmd.cli.completion import script
from vllmd.core import events
from vllmd.daemon.key_store import KeyStore
from vllmd.daemon.operator_commands import OperatorCommands
from vllmd.daemon.plans import Plans
from vllmd.daemon.previews import Previews
from vllmd.daemon.records import Records
from vllmd.daemon.status import Status
from vllmd.daemon.store import ModelStore
from vllmd.errors import BadRequest, NotFound
from vllmd.proxy.access import ANYBODY
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.http import Headers, Request
from vllmd.proxy.routing import Router

REPOSITORY = Path(__file__).resolve().parents[2]

# What a contributor writes to add a verb: this row, and an event that the core knows.
NUDGE = Verb(
    "nudge", "POST", "/admin/models/{model:path}/nudge", "Nudge a model", ModelLine,
    (MODEL, Param("times", Count(1, 9), "how often", default=1, flags=("-n", "--times"))), event="Nudged",
    python=Method("nudge_model", "Nudge it."),
    commands=(Command("nudge", "Nudge models", printed="{model} was nudged {times} times"),),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Nudged(events.Event):
    """The other place."""

    model: str
    times: int


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has the row."""
    monkeypatch.setattr(verbs, "VERBS", (*verbs.VERBS, NUDGE))
    monkeypatch.setattr(events, "Nudged", Nudged, raising=False)


class Daemon:
    """Takes what is posted; has one model."""

    def __init__(self) -> None:
        self.posted: list[events.Event] = []
        self.commands = OperatorCommands(self, SimpleNamespace(load_on=None, drop=None), None, None, None)  # type: ignore[arg-type]
        self.status = SimpleNamespace(resolve=lambda name, caller: f"org/{name}", line=lambda name: {"name": name})

    async def wait(self) -> Any:
        return SimpleNamespace(perform=self.posted.append)


def ask(router: Router, method: str, path: str, query: str = "", body: object = None) -> Any:
    """The JSON of the route's answer."""
    data = b"" if body is None else json.dumps(body).encode()
    request = Request(method, path, path, query, Headers(), body=data)
    router.authenticator = SimpleNamespace(identify=lambda request: ANYBODY)  # type: ignore[assignment]
    handler, answers = router.begin(request), []

    async def respond(response: Any) -> None:
        answers.append(json.loads(response.body))

    exchange: Any = SimpleNamespace(request=request, respond=respond)
    asyncio.run(typing.cast(typing.Callable[[Exchange], typing.Any], handler)(exchange))
    return answers[0]


def make_clients() -> ModuleType:
    """The script, as a module."""
    loader = importlib.machinery.SourceFileLoader("make_clients", str(REPOSITORY / "packaging/dev/make-clients"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("make_clients", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def test_the_route_of_a_new_row_checks_and_posts_its_event(one_more: None) -> None:
    """With the model by its configured name; what is wrong is refused before anything is done."""
    daemon, router = Daemon(), Router()
    add_verbs(router, daemon)  # type: ignore[arg-type]
    assert ask(router, "POST", "/admin/models/a/nudge", "times=3") == {"name": "org/a"}
    assert daemon.posted == [Nudged("org/a", 3)]
    with pytest.raises(BadRequest, match="times must be a number from 1 to 9, not '10'"):
        ask(router, "POST", "/admin/models/a/nudge", "times=10")
    assert len(daemon.posted) == 1


def test_the_documentation_has_a_new_row(one_more: None) -> None:
    """Its summary, parameters, answer and who may."""
    router = Router()
    add_verbs(router, Daemon())  # type: ignore[arg-type]
    operation = document(router.routes)["paths"]["/admin/models/{model}/nudge"]["post"]
    assert operation["summary"] == "Nudge a model"
    assert "scope admin" in operation["description"]
    assert [each["name"] for each in operation["parameters"]] == ["model", "times"]
    times = {"type": "integer", "minimum": 1, "maximum": 9, "default": 1}
    assert operation["parameters"][1] == {"name": "times", "in": "query", "description": "how often", "schema": times}
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/ModelLine"}


def test_both_clients_have_a_method_of_a_new_row(one_more: None) -> None:
    """As make-clients writes them."""
    made = {path.name: text for path, text in make_clients().products().items()}
    assert (
        "    async def nudge_model(self, model: str, times: int = 1) -> answers.ModelLine:\n"
        '        """Nudge it."""\n'
        '        return await self._perform("nudge", answers.ModelLine, model=model, times=times)\n'
    ) in made["asynchronous.py"]
    assert "    def nudge_model(self, model: str, times: int = 1) -> answers.ModelLine:\n" in made["sync.py"]
    call = NUDGE.call({"model": "org/a b", "times": 2})
    assert (call.method, call.path, call.query) == ("POST", "/admin/models/org%2Fa%20b/nudge", {"times": "2"})


def test_vllmctl_has_a_verb_of_a_new_row(
    one_more: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With help, completion, and a word for each thing done."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "s"))
    answers = {f"POST /admin/models/{name}/nudge?times=2": (200, {"name": name}) for name in "ab"}
    with fake_daemon(answers, tmp_path / "s"):
        assert main(["nudge", "a", "-n", "2", "b"]) == 0
        assert capsys.readouterr().out == "a was nudged 2 times\nb was nudged 2 times\n"
        assert main(["nudge", "a", "-n", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [{"name": "a"}]
    with pytest.raises(SystemExit):
        main(["nudge", "a", "--times", "many"])
    assert "argument -n/--times: 'many' is not a number from 1 to 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["help", "nudge"])
    assert "how often" in capsys.readouterr().out
    assert "nudge) words='" in script("bash")


def _written(hint: object) -> str:
    """``float | None``, ``int``."""
    return hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("collections.abc.")


# A field of Control -> what it is described by, and what it is.
PLACES: dict[str, tuple[type, type]] = {
    "commands": (control.Commands, OperatorCommands),
    "status": (control.Status, Status),
    "keys": (control.KeyStore, KeyStore),
    "store": (control.Store, ModelStore),
    "previews": (control.Previews, Previews),
    "plans": (control.Plans, Plans),
    "records": (control.Records, Records),
}


def doers(verb: Verb) -> list[Any]:
    """What does it: an event's class; or a method, as described and as it is."""
    if verb.event:
        return [getattr(events, verb.event)]
    place, _, name = verb.does.partition(".")
    found = [getattr(kind, name, None) for kind in PLACES[place]]
    return [each for each in found if inspect.isfunction(each)]


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_what_a_row_names_takes_its_parameters(verb: Verb) -> None:
    """By their names and of their types: the table is looked up by name, where mypy sees nothing."""
    assert bool(verb.event) != bool(verb.does)
    for doer in doers(verb):
        signature, hints = inspect.signature(doer), typing.get_type_hints(doer)
        needed = {n for n, p in signature.parameters.items() if p.default is p.empty} - {"self", "caller"}
        names = {each.name for each in verb.params}
        assert needed <= names <= set(signature.parameters), doer
        for param in verb.params:
            null = " | None" if param.default is None else ""
            assert _written(hints[param.name]) == f"{param.kind.annotation}{null}", (doer, param.name)


def test_names_are_there_once() -> None:
    """Of rows, methods, commands and their aliases, and of method and path."""
    for names in (
        [row.name for row in verbs.VERBS],
        [row.python.name for row in verbs.VERBS if row.python],
        [name for row in verbs.VERBS for each in row.commands for name in (each.name, *each.aliases)],
        [(row.method, row.path) for row in verbs.VERBS],
    ):
        assert len(set(names)) == len(names)


def test_a_name_of_a_model_cannot_hold_a_verb() -> None:
    """It is quoted in the path; an empty one would be another path."""
    assert verbs.verb("load").call({"model": "a/../b?x"}).path == "/admin/models/a%2F..%2Fb%3Fx/load"
    with pytest.raises(BadRequest):
        verbs.verb("load").call({"model": ""})


def test_a_process_or_device_that_cannot_be_is_not_found() -> None:
    """Before anybody is asked."""
    router = Router()
    add_verbs(router, Daemon())  # type: ignore[arg-type]
    for path in ("/admin/processes/1e3/kill", "/admin/processes/0/kill", "/admin/devices/x/drain"):
        with pytest.raises(NotFound):
            ask(router, "POST", path)
