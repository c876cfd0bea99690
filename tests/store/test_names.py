"""What people call models, what other programs have, and what of the cache is whose: no process, no socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllmd.errors import BadRequest
from vllmd.hub import cached_files
from vllmd.store.elsewhere import everything
from vllmd.store.fetch import Failed, File, check_called, choose_quantization, quantization_of
from vllmd.store.known import KNOWN
from vllmd.store.names import Hub, wanted


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("Qwen/Qwen3-0.6B", Hub("Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B-GGUF:Q8_0", Hub("Qwen/Qwen3-0.6B-GGUF", "Q8_0")),
        ("hf.co/a/b", Hub("a/b")),
        ("https://huggingface.co/a/b:Q4_K_M", Hub("a/b", "Q4_K_M")),
        ("a/b/UD/m-Q4.gguf", Hub("a/b", "", "UD/m-Q4.gguf")),
    ],
)
def test_a_repository_is_named_in_the_ways_that_people_know(text: str, source: Hub) -> None:
    """Ollama's, llama.cpp's and the hub's own."""
    assert wanted(text).sources == (source,)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "x" * 400, "smolm2", "a", "/etc/passwd", "../a/b", "a/../b", "-a/b", "a/--b", "a/b:", "a/b/", "a//b",
        "a/b:../../c", "a/b:-x", "a/b c", "a/b\n/c", "a/b/../../c.gguf", "a/b/c.sh", "a/b:Q4 --evil", "http://a/b/c",
        "a/b\x00", "a/b--c", "ä/b",
    ],
)  # fmt: skip
def test_what_is_no_name_becomes_nothing_else(text: str) -> None:
    """Neither a path, nor an option, nor an address of another server."""
    with pytest.raises(BadRequest):
        wanted(text)


def test_well_known_names_mean_what_the_machine_can_run() -> None:
    """GGUF for llama.cpp, with a GPU and vLLM its own files; and each is itself a name that can be fetched."""
    assert wanted("SmolLM2:latest").sources == wanted("smollm2").sources
    for name, known in KNOWN.items():
        hub = wanted(name).sources[-1]
        assert isinstance(hub, Hub) and str(hub) == known.gguf and wanted(known.gguf).sources == (hub,)
        assert wanted(name, device=True).sources == (Hub(known.repository),)
        assert wanted(name).about and wanted(name, device=True).about


@pytest.mark.parametrize(
    ("file", "tag"),
    [("m-Q4_K_M.gguf", "Q4_K_M"), ("x/M.Q8_0.gguf", "Q8_0"), ("m-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
     ("gpt-oss-20b-mxfp4.gguf", "mxfp4"), ("model.gguf", ""), ("Qwen3-4B-BF16.gguf", "BF16")],
)  # fmt: skip
def test_the_quantisation_stands_in_the_name(file: str, tag: str) -> None:
    """As all who make GGUF files write it."""
    assert quantization_of(file) == tag


def test_ollama_and_lm_studio_are_read_where_they_are(tmp_path: Path) -> None:
    """Their GGUF files by path, under their own names; a manifest that leads elsewhere is left out."""
    store, digest = tmp_path / ".ollama/models", "sha256:" + "a" * 64
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 7}
    for name, layers in {"llama3.2/1b": [layer], "evil/latest": [{**layer, "digest": "sha256:../../x"}]}.items():
        manifest = store / "manifests/registry.ollama.ai/library" / name
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"layers": layers}))
    (store / "blobs").mkdir()
    (store / "blobs" / digest.replace(":", "-")).write_bytes(b"GGUFxxx")
    studio = tmp_path / ".lmstudio/models/org/m-GGUF"
    studio.mkdir(parents=True)
    for name in ("m-Q4_K_M.gguf", "mmproj-m.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (studio / name).write_bytes(b"GGUF")
    found = everything({"HOME": str(tmp_path)})
    assert [(one.name, one.program, one.size) for one in found] == [
        ("llama3.2:1b", "Ollama", 7),
        ("org/m-GGUF/b-00001-of-00002.gguf", "LM Studio", 4),
        ("org/m-GGUF/m-Q4_K_M.gguf", "LM Studio", 4),
    ]
    assert found[0].path == store / "blobs" / f"sha256-{'a' * 64}"


def test_of_a_repository_goes_what_nobody_else_needs(tmp_path: Path) -> None:
    """One quantisation of several, or all of it; never anything that is no repository."""
    snapshot = tmp_path / "models--org--m/snapshots/abc"
    (tmp_path / "models--org--m/refs").mkdir(parents=True)
    (tmp_path / "models--org--m/refs/main").write_text("abc")
    snapshot.mkdir(parents=True)
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        (snapshot / name).write_bytes(b"GGUF")
    repository = tmp_path / "models--org--m"
    assert cached_files(tmp_path, "org/m", "Q8_0", whole=True) == (snapshot / "m-Q8_0.gguf",)
    assert cached_files(tmp_path, "org/m", whole=True) == (repository,)
    assert cached_files(tmp_path, "org/m", whole=False) == ()
    (snapshot / "m-Q4_K_M.gguf").unlink()
    assert cached_files(tmp_path, "org/m", "Q8_0", whole=True) == (repository,)
    (tmp_path / "models--org--link").symlink_to("/etc")
    assert cached_files(tmp_path, "org/link", whole=True) == ()
    assert cached_files(tmp_path, "../org/m", whole=True) == ()


@pytest.mark.parametrize("wish", ["Q8_0", "q8_0", "8_0", "m-Q8", "_0", "q8"])
def test_a_quantisation_has_one_name_however_it_is_asked_for(wish: str) -> None:
    """As its file has it; the name that was said only where that alone would mean another file."""
    files = [File(name, 1, "a" * 40, "/b") for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf")]
    assert [choose_quantization(files, wish, "org/m")[0].name, choose_quantization(files, wish, "org/m")[1]] == [
        "m-Q8_0.gguf",
        "Q8_0",
    ]
    two = [File(name, 1, "a" * 40, "/b") for name in ("a-Q8_0.gguf", "b-Q8_0.gguf", "c.gguf")]
    assert choose_quantization(two, "b-q8", "org/m") == (two[1], "b-q8")
    assert choose_quantization(two, "c.g", "org/m") == (two[2], "c.g")


@pytest.mark.parametrize(
    ("repository", "wish", "called"),
    [
        ("org/m", "q8_0", "org/m:Q8_0"),
        ("Org/M", "", "org/m"),
        ("old/m", "Q8_0", "org/m:Q8_0"),
        ("org/m", "c.g", "org/m"),
    ],
)
def test_a_request_says_the_one_name_of_what_it_has_fetched(repository: str, wish: str, called: str) -> None:
    """Of many spellings of one file each would add a model; the message says which is right."""
    with pytest.raises(Failed, match=f"by its own name only, which is {called}$"):
        check_called({"repository": repository, "quantization": wish}, called)
    own, _, tag = called.partition(":")
    check_called({"repository": own, "quantization": tag}, called)
