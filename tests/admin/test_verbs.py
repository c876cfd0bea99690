"""What becomes of an operator's request when whoever sent it leaves before it has been answered."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.fakes import get, soon, stage, until
from vllmd.admin.verbs import audited
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
