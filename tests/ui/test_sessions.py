"""Sessions of the page: what opens one, what it opens, and how it ends. The clock is passed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.admin.page_sessions import COOKIE, LIFE, LINK_LIFE, MOST_LINKS, TOKEN_FIELD, OpenedSession, PageSessions
from vllmd.errors import Forbidden, Unauthorized
from vllmd.proxy.access import ADMIN, EVERYTHING, HEALTH, METRICS, MODELS, OPEN, READ, Caller, Reach, authorise
from vllmd.proxy.http import Headers, Request

OPERATOR = Caller("anna", EVERYTHING)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def request(cookie: str = "", token: str = "", *, others: str = "") -> Request:
    fields = [(b"cookie", f"{others}{COOKIE}={cookie}".encode())] if cookie else []
    fields += [(TOKEN_FIELD.encode(), token.encode())] if token else []
    return Request("GET", "/admin/status", "/admin/status", "", Headers(fields))


def of(opened: OpenedSession) -> Request:
    return request(opened.cookie, opened.token)


def sessions(
    clock: Clock | None = None, keys: dict[str, Caller] | None = None, file: Path | None = None
) -> PageSessions:
    return PageSessions(clock or Clock(), (keys or {}).get, file)


def test_a_link_signs_in_once_as_the_one_who_asked_for_it() -> None:
    """Whoever finds the link later, in a terminal's history say, finds it used."""
    kept = sessions()
    code = kept.link(OPERATOR)
    caller = kept.identify(of(kept.open_by_link(code)))
    assert caller and (caller.name, caller.page) == ("anna", True)
    with pytest.raises(Unauthorized, match="vllmctl ui"):
        kept.open_by_link(code)


def test_a_link_that_nobody_used_dies() -> None:
    clock = Clock()
    kept = sessions(clock)
    code = kept.link(OPERATOR)
    clock.now += LINK_LIFE + 1
    with pytest.raises(Unauthorized, match="five minutes"):
        kept.open_by_link(code)


def test_links_in_a_loop_take_no_more_memory_than_a_few() -> None:
    kept = sessions()
    codes = [kept.link(OPERATOR) for _ in range(MOST_LINKS + 1)]
    with pytest.raises(Unauthorized):
        kept.open_by_link(codes[0])
    assert kept.open_by_link(codes[-1])


@pytest.mark.parametrize("missing", ["cookie", "token", "wrong token", "another's cookie"])
def test_a_session_needs_both_of_its_halves(missing: str) -> None:
    """A cookie goes to every port of this machine, and along with what other pages send: alone it proves nothing."""
    kept = sessions()
    opened, other = kept.open_by_link(kept.link(OPERATOR)), kept.open_by_link(kept.link(OPERATOR))
    halves = {
        "cookie": request("", opened.token),
        "wrong token": request(opened.cookie, "x" + opened.token),
        "another's cookie": request(other.cookie, opened.token),
    }
    if missing == "token":
        assert kept.identify(request(opened.cookie)) is None  # the cookie is not even looked at
        return
    with pytest.raises(Unauthorized, match="sign in again"):
        kept.identify(halves[missing])


def test_a_session_never_opens_the_models() -> None:
    """Not even that of an operator, whose socket does: what a page sends by itself must not use a GPU."""
    kept = sessions()
    caller = kept.identify(of(kept.open_by_link(kept.link(OPERATOR))))
    assert caller and caller.scopes == EVERYTHING - {MODELS}
    with pytest.raises(Forbidden, match="send an API key"):
        authorise(caller, MODELS, Reach.ONE)


def test_a_session_that_only_reads_changes_nothing() -> None:
    kept = sessions()
    caller = kept.identify(of(kept.open_by_link(kept.link(Caller("ops", frozenset({OPEN, HEALTH, METRICS, READ}))))))
    assert caller
    authorise(caller, READ, Reach.MACHINE)
    with pytest.raises(Forbidden, match="the session of 'ops' has the scope read; this needs the scope admin"):
        authorise(caller, ADMIN, Reach.ONE)


def test_a_keys_session_is_as_good_as_the_key_is_now() -> None:
    """A key that loses a scope, or is taken away, takes its sessions along: without a restart."""
    keys = {"digest": Caller("lab", frozenset({OPEN, READ, ADMIN}), digest="digest")}
    kept = sessions(keys=keys)
    mine, linked = of(kept.open(keys["digest"])), of(kept.open_by_link(kept.link(keys["digest"])))
    keys["digest"] = Caller("lab", frozenset({OPEN, READ}), frozenset({"small"}), digest="digest")
    for session in (mine, linked):
        caller = kept.identify(session)
        assert caller and (caller.scopes, caller.models) == ({OPEN, READ}, {"small"})
    keys["another"] = keys.pop("digest")  # the same name, another secret
    for session in (mine, linked):
        with pytest.raises(Unauthorized, match="'lab' is no longer what was signed in with"):
            kept.identify(session)
    with pytest.raises(Unauthorized):
        kept.identify(mine)


def test_a_session_ends_by_itself_and_by_hand() -> None:
    clock = Clock()
    kept = sessions(clock)
    first, second = of(kept.open_by_link(kept.link(OPERATOR))), of(kept.open_by_link(kept.link(OPERATOR)))
    kept.close(first)
    with pytest.raises(Unauthorized):
        kept.identify(first)
    assert kept.identify(second)
    clock.now += LIFE + 1
    with pytest.raises(Unauthorized):
        kept.identify(second)


def test_a_session_outlives_the_daemon_and_its_secrets_are_not_in_the_file(tmp_path: Path) -> None:
    """The daemon exits when it is idle: who looks at the page again must not have to sign in again."""
    file = tmp_path / "sessions.json"
    opened = (kept := sessions(file=file)).open_by_link(kept.link(OPERATOR))
    caller = sessions(file=file).identify(of(opened))
    assert caller and caller.name == "anna"
    assert opened.cookie not in file.read_text() and opened.token not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"cookie": "x"}]', '{"a": 1}', '[{"cookie": null, "token": []}]'])
def test_a_file_that_is_broken_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sessions.json"
    file.write_text(text)
    kept = sessions(file=file)
    assert kept.identify(of(kept.open_by_link(kept.link(OPERATOR))))


def test_a_disk_that_takes_nothing_costs_the_record_and_not_the_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = sessions(file=tmp_path / "gone" / "sessions.json")
    assert kept.identify(of(kept.open_by_link(kept.link(OPERATOR))))
    assert "will not outlive vllmd" in caplog.text


def test_the_cookie_is_found_among_others() -> None:
    kept = sessions()
    opened = kept.open_by_link(kept.link(OPERATOR))
    assert kept.identify(request(opened.cookie, opened.token, others="a=b; vllmd_session2=c; "))
