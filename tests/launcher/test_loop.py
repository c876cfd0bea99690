"""The launcher's loop: who is called back for what is to be read."""

from __future__ import annotations

import os

from vllmd.launcher.loop import Loop


def test_a_descriptor_that_was_given_on_calls_back_its_new_owner_only() -> None:
    """Two are readable in one turn, and the first callback gives the second on: a process that becomes another's."""
    loop, called = Loop(), list[str]()
    (first, say), (second, tell) = os.pipe(), os.pipe()

    def give_on() -> None:
        called.append("first")
        loop.unwatch(first)
        loop.unwatch(second)
        loop.watch(second, lambda: (called.append("new"), loop.stop()))

    loop.watch(first, give_on)
    loop.watch(second, lambda: (called.append("old"), give_on()))
    os.write(say, b"x")
    os.write(tell, b"x")
    loop.run()
    assert called in (["first", "new"], ["old", "first", "new"])
    assert called[-2:] == ["first", "new"]
    for fd in (first, say, second, tell):
        os.close(fd)
