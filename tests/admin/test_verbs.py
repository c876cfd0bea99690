"""What becomes of an operator's request when whoever sent it leaves before it has been answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.proxy.fakes import get, soon, stage, until
from vllmd.admin.verbs import add_verbs, audited
from vllmd.proxy.http import Request, Response


@pytest.mark.parametrize("ends_with_client", [False, True])
def test_a_change_goes_on_when_its_operator_leaves(ends_with_client: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A reload that ends in the middle leaves engines that nobody adopts; a download, which is followed, ends."""
    caplog.set_level("INFO")

    async def play() -> list[str]:
        begun, go_on, ends = asyncio.Event(), asyncio.Event(), list[str]()

        async def change(request: Request) -> Response:
            begun.set()
            try:
                await go_on.wait()
                ends.append("whole")
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise
            return Response(204)

        async with stage() as act:
            act.router.add("GET", "/change", audited(change, ends_with_client=ends_with_client))
            client = await act.client()
            client.send(get("/change"))
            await soon(begun.wait())
            client.close()
            await until(lambda: bool(act.ended))
            go_on.set()
            await until(lambda: bool(ends))
            return ends

    assert asyncio.run(play()) == ["cancelled" if ends_with_client else "whole"]
    if not ends_with_client:
        assert "GET /change by" in caplog.text and "begun" in caplog.text


def test_a_change_that_fails_when_its_operator_has_left_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """By a defect: nobody else is told of it. What is refused has its own line."""

    async def play() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def change(request: Request) -> Response:
            begun.set()
            await go_on.wait()
            raise RuntimeError("a defect")

        async with stage() as act:
            act.router.add("GET", "/change", audited(change))
            client = await act.client()
            client.send(get("/change"))
            await soon(begun.wait())
            client.close()
            await until(lambda: bool(act.ended))
            go_on.set()
            await until(lambda: "a defect" in caplog.text)

    asyncio.run(play())
    assert "GET /change failed, and its client has left" in caplog.text


@pytest.mark.parametrize("path", ["/admin/models/m/load?wait=true", "/admin/models/m/probe", "/admin/plan"])
def test_what_is_only_waited_for_ends_with_the_client(path: str) -> None:
    """The load itself is the core's by then. A plan that went on would refuse the next one until it has ended."""

    async def play() -> list[str]:
        begun, ends, done = asyncio.Event(), list[str](), list[str]()

        async def wait(*_: object, **__: object) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ends.append("ended")

        async def progress(model: str) -> AsyncIterator[object]:
            await wait()
            yield

        async def load(model: str) -> None:
            done.append(model)

        control: Any = SimpleNamespace(
            status=SimpleNamespace(resolve=lambda name, caller: name),
            commands=SimpleNamespace(load=load, probe=wait),
            following=SimpleNamespace(progress=progress),
            plans=SimpleNamespace(run=wait),
        )
        async with stage() as act:
            add_verbs(act.router, control)
            client = await act.client()
            client.send(get(path, method="POST"))
            await soon(begun.wait())
            client.close()
            await until(lambda: bool(ends))
        return done

    assert asyncio.run(play()) == (["m"] if "load" in path else [])
