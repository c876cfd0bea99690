"""The page's files: complete, small, ours or vendored as they were, and nothing in them that the policy forbids."""

from __future__ import annotations

import gzip
import hashlib
import json
import re

import pytest

from vllmd.proxy.http import Headers, Request
from vllmd.ui.files import POLICY, STATIC, answer, names, read

VENDOR = STATIC / "vendor"
OURS = sorted(path for path in STATIC.iterdir() if path.suffix in (".js", ".html", ".css"))
LARGEST = 150_000  # bytes, compressed, of everything that a visitor fetches


def request(**fields: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return Request("GET", "/ui/", "/ui/", "", Headers(pairs))


def test_the_page_is_small() -> None:
    """It is opened over a slow link, from a phone, when something is wrong."""
    assert sum(len(read(name).packed) for name in names()) <= LARGEST


def test_vendored_libraries_are_what_the_registry_had() -> None:
    """Nobody has mended one in place: the next ``packaging/dev/vendor-ui`` would lose that."""
    known = json.loads((VENDOR / "versions.json").read_text())
    files = {file: digest for library in known.values() for file, digest in library["files"].items()}
    assert {path.name for path in VENDOR.iterdir() if path.suffix in (".js", ".css")} == set(files)
    for file, digest in files.items():
        assert hashlib.sha256((VENDOR / file).read_bytes()).hexdigest() == digest, file
    terms = (VENDOR / "NOTICE").read_text()
    assert all(f"{name} {library['version']}\n" in terms for name, library in known.items())


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_whatever_a_file_names_is_served(path: object) -> None:
    """A module that is missing leaves a white page."""
    text = STATIC.joinpath(str(path)).read_text()
    named = re.findall(r'(?:from|import) "\./([^"]+)"', text) + re.findall(r'(?:src|href)="/ui/([^"]+)"', text)
    assert set(named) <= names()


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_is_asked_of_another_host_and_nothing_breaks_the_policy(path: object) -> None:
    """The page works without the internet; and a script or a style inside the document would not run."""
    text = STATIC.joinpath(str(path)).read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert not re.search(r"\beval\(|new Function|innerHTML|dangerouslySetInnerHTML|document\.write|javascript:", text)
    assert not re.search(r"<script(?![^>]*src=)|<style| style=\"| on\w+=\"", text)


def test_the_policy_lets_nothing_in() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert "unsafe" not in POLICY and "http" not in POLICY


def test_a_file_is_sent_compressed_once_and_not_again() -> None:
    first = answer(request(accept_encoding="gzip, br"), "app.js")
    assert isinstance(first.body, bytes) and gzip.decompress(first.body) == (STATIC / "app.js").read_bytes()
    headers = dict(first.headers)
    assert headers["content-encoding"] == "gzip" and headers["content-security-policy"] == POLICY
    again = answer(request(if_none_match=headers["etag"]), "app.js")
    assert (again.status, again.body) == (304, b"")
    assert answer(request(), "app.js").body == (STATIC / "app.js").read_bytes()
