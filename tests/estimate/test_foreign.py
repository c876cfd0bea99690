"""Files that somebody else may write: whatever he put there costs little, harms one model, and is said in words."""

from __future__ import annotations

import json
import os
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.estimate.files import LLAMA_8B, GiB, cached, model, safetensors, sparse
from vllmd import foreign
from vllmd.config import secrets
from vllmd.config.types import ModelConfig
from vllmd.engines.checkpoint import weights_of
from vllmd.engines.estimate import estimate
from vllmd.engines.gguf import config_of
from vllmd.foreign import Budget, Folder, Unreadable, each_within, members, parse, within
from vllmd.hub import discover

NESTED_GGUF = (
    b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + struct.pack("<Q", 9)
    + b"general.x"
    + struct.pack("<I", 9)
    + struct.pack("<IQ", 9, 1) * 60_000
)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nested(path: Path) -> None:
    path.write_text("[" * 1_000_000)


def deep_but_valid(path: Path) -> None:
    """Parsed by json, but not by whoever walks over it."""
    path.write_text('{"text_config":' * 500 + "{}" + "}" * 500)


def brackets(path: Path) -> None:
    path.write_text('{"a":[' + "{}," * 2_000_000 + "{}]}")


def folder(path: Path) -> None:
    path.mkdir()


def number(path: Path) -> None:
    path.write_text('{"architectures": 5, "num_hidden_layers": ' + "9" * 5000 + "}")


HOSTILE = [fifo, endless, nested, deep_but_valid, brackets, folder, number]


@pytest.mark.parametrize("plant", HOSTILE, ids=lambda plant: str(plant.__name__))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "m.gguf"])
def test_whatever_a_file_is_the_others_are_told(tmp_path: Path, plant: Callable[[Path], None], name: str) -> None:
    """One repository of the cache is hostile: it is estimated by its name, and its neighbour is found as ever."""
    evil = model(cached(tmp_path, "evil/m-7B"), LLAMA_8B, BF16=GiB)
    (evil / name).unlink(missing_ok=True)
    plant(evil / name)
    model(cached(tmp_path, "good/m"), LLAMA_8B, BF16=GiB)
    assert "good/m" in [found.name for found in discover(tmp_path)]
    told = estimate(ModelConfig("m", model="evil/m-7B"), tmp_path, 80 * GiB)
    assert told.footprint.awake > 0
    assert all(len(note) < 500 and note.isprintable() for note in told.notes)


@pytest.mark.parametrize("where", ["refs/main", "refs", "snapshots"])
def test_what_leads_to_the_files_may_be_a_fifo_too(tmp_path: Path, where: str) -> None:
    """A ref is a file of others as well, and so are the folders."""
    place = model(cached(tmp_path, "evil/m"), LLAMA_8B, BF16=GiB).parents[1] / where
    os.rename(place, tmp_path / "gone")
    fifo(place)
    model(cached(tmp_path, "good/m"), LLAMA_8B, BF16=GiB)
    assert "good/m" in [found.name for found in discover(tmp_path)]


def test_a_device_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening some devices does something: it is looked at first, by a handle that opens nothing."""
    (tmp_path / "config.json").symlink_to("/dev/null")
    real, opened = os.open, []

    def spy(path: Any, flags: int, *more: Any, **named: Any) -> int:
        opened.append((str(path), bool(flags & os.O_PATH)))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(Unreadable, match="no regular file"):
        Folder(tmp_path).json("config.json")
    assert opened == [(str(tmp_path / "config.json"), True)]


def test_a_file_that_may_not_be_read_is_named_as_its_reader_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the handle through which it was to be opened."""
    (tmp_path / "key").write_text("x")
    opened = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        Folder(tmp_path).read("key", 10)
    assert caught.value.filename == str(tmp_path / "key")


def test_a_link_leads_to_a_blob_but_not_out_of_the_repository(tmp_path: Path) -> None:
    """The daemon may read what an engine may not: the engine's cache must not make it do so."""
    snapshot = cached(tmp_path, "org/m")
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    model(blobs, LLAMA_8B, BF16=GiB)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert [(found.name, found.size > GiB) for found in discover(tmp_path)] == [("org/m", True)]
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(LLAMA_8B))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    assert discover(tmp_path) == ()
    told = estimate(ModelConfig("m", model="org/m"), tmp_path, 80 * GiB)
    assert any("leads out of" in note for note in told.notes)


def test_a_repository_may_lie_on_another_disk(tmp_path: Path) -> None:
    """People make a link of the whole folder; what is in it stays in it."""
    snapshot = model(cached(tmp_path / "disk", "org/m"), LLAMA_8B, BF16=GiB)
    (tmp_path / "models--org--m").symlink_to(snapshot.parents[1])
    assert [found.name for found in discover(tmp_path)] == ["org/m"]


def test_a_large_header_is_stepped_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """99 MB of brackets took 2.5 GB parsed as a whole; of a header of any size a window is held."""
    tensors = {
        f"layers.{at}.weight": {"dtype": "F8", "shape": [1], "data_offsets": [at, at + 1]} for at in range(20_000)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    del tensors
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(20_000))
    assert weights_of(tmp_path).sizes == {"F8": 20_000}
    evil = b'{"__metadata__":{"a":[' + b"{}," * 3_000_000 + b"{}]}}"
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(evil)) + evil)
    monkeypatch.setattr(foreign, "LONGEST", 1 << 17)
    tracemalloc.start()
    found = weights_of(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "131072 characters" in found.notes[0]
    assert peak < 20 << 20


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_however_it_is_cut_an_object_has_the_same_members(piece: int) -> None:
    """A number, an escape or a character of several bytes may end where a piece of the file ends."""
    inner = {'ä\n"': -12.5e3, "b": [1, {"c": None}], "": {}}
    content = {"first": 123, "into": inner, "empty": {}, "last": True, "text": "𝄞 and \\ more"}
    data = json.dumps(content, ensure_ascii=False, indent=1).encode()
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        at += piece
        return data[at - piece : at]

    found = list(members(read, frozenset({"into", "empty"})))
    expected = [(("first",), 123), *((("into", name), value) for name, value in inner.items())]
    assert found == [*expected, (("last",), True), (("text",), content["text"])]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a"}', '{"a":1', '{"a":1,}', '{"a":1 "b":2}', "{1:2}", "{}x", '{"a":1.}']
)
def test_what_is_no_object_is_refused(text: str) -> None:
    """As the parser of whole texts does."""
    data = iter([text.encode()])
    with pytest.raises(Unreadable):
        list(members(lambda size: next(data, b""), frozenset()))


def test_parse_bounds_depth_and_values() -> None:
    """Both cost far more than their text."""
    assert parse(b'{"a":' * 99 + b"{}" + b"}" * 99)
    with pytest.raises(Unreadable, match="nested more than 100"):
        parse(b'{"a":' * 101 + b"{}" + b"}" * 101)
    with pytest.raises(Unreadable, match="more than 400000 values"):
        parse(b'{"a":[' + b"0," * 400_001 + b"0]}")


def test_a_deep_gguf_head_is_refused(tmp_path: Path) -> None:
    """Arrays of arrays: their nesting put the daemon into a crash loop."""
    (tmp_path / "m.gguf").write_bytes(NESTED_GGUF)
    with pytest.raises(Unreadable, match="cut off or corrupt"):
        config_of(tmp_path / "m.gguf")


def test_a_models_files_together_are_bounded(tmp_path: Path) -> None:
    """A thousand files of which each is small enough."""
    safetensors(tmp_path / "a", {"F8": 1})
    poor = Folder(tmp_path, budget=Budget(size=50))
    with pytest.raises(Unreadable, match="more to read than any model's"):
        poor.read("a", 1 << 20)
    late = Folder(tmp_path, budget=Budget(seconds=-1))
    with pytest.raises(Unreadable, match="not read within"):
        late.names()


def test_a_folder_of_too_many_names_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing takes memory as well."""
    monkeypatch.setattr(foreign, "NAMES", 3)
    for name in "abcd":
        (tmp_path / name).touch()
    with pytest.raises(Unreadable, match="more than 3 names"):
        Folder(tmp_path).names()


def test_a_file_system_that_does_not_answer_is_left_behind() -> None:
    """A dead NFS server holds a thread in the kernel; it is given up, and a few of them end all reading."""
    dead = threading.Event()
    try:
        for _ in range(foreign.STUCK):
            with pytest.raises(Unreadable, match="could not be read within"):
                within(0.01, dead.wait)
        with pytest.raises(Unreadable, match="does not answer"):
            within(10, lambda: 1)
    finally:
        dead.set()
    while foreign._stuck:
        pass  # the threads end by themselves
    assert within(10, lambda: 1) == 1


def test_a_thousand_models_are_read_by_one_thread() -> None:
    """One each takes ten seconds for ten thousand; the limit that each has for itself is the common thread's."""
    idents = each_within(60, lambda n: within(0.0, threading.get_ident), range(1000))
    assert len(set(idents)) == 1 and idents[0] != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        each_within(60, lambda n: 1 // n, [1, 0])


def test_where_the_common_thread_hangs_each_is_read_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own limit, and in order; the common thread, should it come back, reads nothing more."""
    hangs, dead, tried, common = threading.Event(), threading.Event(), list[int](), list[threading.Thread]()

    class UntilItHangs(threading.Event):
        """However busy the machine is, the common thread has the time that it takes to come to where it hangs."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None and hangs.wait(60)
            return super().wait(0)

    def look(n: int) -> int:
        tried.append(n)
        if n == 1 and tried.count(1) == 1:
            common.append(threading.current_thread())
            hangs.set()
            dead.wait(60)
        return n

    monkeypatch.setattr(foreign, "threading", SimpleNamespace(Event=UntilItHangs, Thread=threading.Thread))
    try:
        assert each_within(10, look, [0, 1, 2]) == [0, 1, 2]
        assert tried == [0, 1, 1, 2]
    finally:
        dead.set()
    common[0].join(60)
    assert not common[0].is_alive()
    assert tried == [0, 1, 1, 2]


def test_common_threads_that_hang_are_as_few_as_others() -> None:
    """Each reload looks at all models: where their file system is dead, it must not hold one more thread each time."""
    dead, before = threading.Event(), threading.active_count()
    try:
        for _ in range(3 * foreign.STUCK):
            with pytest.raises(Unreadable):
                each_within(0.01, lambda n: within(0.01, dead.wait), [0])
        assert threading.active_count() - before <= foreign.STUCK
    finally:
        dead.set()
    for thread in threading.enumerate():
        if thread.name == "files":
            thread.join(60)
    assert each_within(10, lambda n: n, [0]) == [0]


def test_odd_names_reach_notes_quoted(tmp_path: Path) -> None:
    """A name with a line break would be a line of its own in the journal."""
    sparse(tmp_path / "a\nfake: line.safetensors", 10)
    (note,) = weights_of(tmp_path).notes
    assert note.isprintable()


def test_a_secret_that_is_a_fifo_is_an_error(tmp_path: Path) -> None:
    """hf_token_file may lie in a user's folder; a reload must not wait for him."""
    fifo(tmp_path / "token")
    with pytest.raises(ValueError, match="no regular file"):
        secrets.read("token", tmp_path, {})
    sparse(tmp_path / "large", 1 << 40)
    with pytest.raises(ValueError, match="larger than"):
        secrets.read("large", tmp_path, {})
