"""The Hugging Face cache: what is found in it, and what is not taken for a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.estimate.files import LLAMA_8B, GiB, cached, model, sparse
from vllmd.engines.checkpoint import gguf_file, projector_file, weights_of
from vllmd.hub import Unreadable, discover, locate, read_json


def test_a_repository_is_found_by_its_ref(tmp_path: Path) -> None:
    """refs/main decides, not the newest folder."""
    wanted = cached(tmp_path, "Qwen/Qwen3-0.6B", "aaa")
    cached(tmp_path, "Qwen/Qwen3-0.6B", "bbb", ref="other")
    assert locate("Qwen/Qwen3-0.6B", tmp_path).path == wanted
    assert locate("Qwen/Qwen3-0.6B", tmp_path, "other").path == wanted.parent / "bbb"
    assert locate("Qwen/Qwen3-0.6B", tmp_path, "bbb").path == wanted.parent / "bbb"
    assert locate("Qwen/Qwen3-0.6B", tmp_path, "ccc").path is None


def test_a_cache_without_refs_has_its_only_snapshot(tmp_path: Path) -> None:
    """As ``hf download --revision HASH`` leaves it."""
    snapshot = cached(tmp_path, "org/m", ref="gone")
    (snapshot.parents[1] / "refs/gone").unlink()
    assert locate("org/m", tmp_path).path == snapshot


def test_a_name_may_pick_a_gguf(tmp_path: Path) -> None:
    """vLLM's and llama.cpp's ``repository:QUANTISATION``."""
    snapshot = cached(tmp_path, "org/m-GGUF")
    found = locate("org/m-GGUF:Q4_K_M", tmp_path)
    assert (found.path, found.tag) == (snapshot, "Q4_K_M")


def test_a_path_is_itself(tmp_path: Path) -> None:
    """Anything that begins like a path is one, and says so if it is not there."""
    assert locate(str(tmp_path), tmp_path / "nowhere").path == tmp_path
    assert locate("/no/such/model", tmp_path).why == "/no/such/model does not exist"


@pytest.mark.parametrize("name", ["", "a/../../etc", "..", "a/b/c", "a b", "a\0b", "a/..", "x--y/z"])
def test_odd_names_reach_no_file(tmp_path: Path, name: str) -> None:
    """A name comes from a request or a configuration: it must not walk about."""
    assert "neither a path nor a repository id" in locate(name, tmp_path).why


def test_a_ref_cannot_lead_out_of_the_cache(tmp_path: Path) -> None:
    """Nor its content."""
    refs = cached(tmp_path, "org/m").parents[1] / "refs"
    for evil in ("../../..", "..", ".", "/", ""):
        (refs / "evil").write_text(evil)
        assert locate("org/m", tmp_path, "evil").path is None
    assert locate("org/m", tmp_path, "../refs/main").path is None


def snapshot(hub: Path, name: str, architecture: str = "LlamaForCausalLM") -> Path:
    return model(cached(hub, name), LLAMA_8B | {"architectures": [architecture]}, BF16=GiB)


def test_discover_tells_name_path_size_and_kind(tmp_path: Path) -> None:
    """What ``discover: true`` serves, and on which routes."""
    chat = snapshot(tmp_path, "Qwen/Qwen3-0.6B", "Qwen3ForCausalLM")
    snapshot(tmp_path, "BAAI/bge-m3", "XLMRobertaModel")
    snapshot(tmp_path, "BAAI/bge-reranker", "XLMRobertaForSequenceClassification")
    snapshot(tmp_path, "Qwen/Qwen3-Reranker-0.6B", "Qwen3ForCausalLM")
    (snapshot(tmp_path, "Qwen/Qwen3-Embedding-0.6B", "Qwen3ForCausalLM") / "modules.json").write_text("[]")
    snapshot(tmp_path, "openai/whisper-large", "WhisperForConditionalGeneration")
    snapshot(tmp_path, "gpt2", "GPT2LMHeadModel")
    sparse(cached(tmp_path, "org/m-GGUF") / "m-Q4.gguf", GiB)
    found = {each.name: each for each in discover(tmp_path)}
    assert {name: each.kind for name, each in found.items()} == {
        "Qwen/Qwen3-0.6B": "generate",
        "BAAI/bge-m3": "embed",
        "BAAI/bge-reranker": "rerank",
        "Qwen/Qwen3-Reranker-0.6B": "rerank",
        "Qwen/Qwen3-Embedding-0.6B": "embed",
        "openai/whisper-large": "transcribe",
        "gpt2": "generate",
        "org/m-GGUF": "generate",
    }
    assert found["Qwen/Qwen3-0.6B"].path == chat
    assert found["org/m-GGUF"].size == GiB


def test_quantisations_may_have_folders_of_their_own(tmp_path: Path) -> None:
    """With shards in them, and a projector for images beside: the named one counts, with all its shards."""
    snapshot = cached(tmp_path, "org/m-GGUF")
    for folder, size in (("Q4_K_M", GiB), ("BF16", 8 * GiB)):
        (snapshot / folder).mkdir()
        for part in (1, 2):
            sparse(snapshot / folder / f"m-{folder}-0000{part}-of-00002.gguf", size)
    sparse(snapshot / "m-mmproj-F16.gguf", GiB // 2)
    (found,) = discover(tmp_path)
    assert (found.name, found.kind) == ("org/m-GGUF", "generate")
    located = locate("org/m-GGUF:Q4_K_M", tmp_path)
    assert located.path
    assert weights_of(located.path, located.tag, located.root).total == 2 * GiB
    assert weights_of(located.path, "", located.root).total == 16 * GiB
    assert projector_file(located.path, located.root) == snapshot / "m-mmproj-F16.gguf"
    assert gguf_file(located.path, "q4_k_m", located.root) == snapshot / "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf"


def test_a_projector_alone_is_no_model(tmp_path: Path) -> None:
    """As an interrupted download leaves it."""
    snapshot = cached(tmp_path, "org/m-GGUF")
    sparse(snapshot / "mmproj-F16.gguf", GiB)
    assert weights_of(snapshot).total == 0
    assert discover(tmp_path) == ()


def test_a_ref_whose_snapshot_is_gone_means_the_newest(tmp_path: Path) -> None:
    """The repository has moved on, and the download of the new commit has not come yet; or the cache was tidied."""
    snapshot = cached(tmp_path, "org/m", "aaa")
    (snapshot.parents[1] / "refs/main").write_text("bbb")
    assert locate("org/m", tmp_path).path == snapshot


def test_discover_skips_what_no_engine_serves(tmp_path: Path) -> None:
    """Data sets, adapters, bare tokenizers, image generators, half downloads, broken configurations."""
    (snapshot(tmp_path, "org/lora") / "adapter_config.json").write_text("{}")
    (snapshot(tmp_path, "org/diffusion") / "model_index.json").write_text("{}")
    (snapshot(tmp_path, "org/broken") / "config.json").write_text("{")
    snapshot(tmp_path, "google/vit", "ViTForImageClassification")
    model(cached(tmp_path, "org/no-weights"), LLAMA_8B)
    model(cached(tmp_path, "org/no-config"), None, BF16=GiB)
    (tmp_path / "models--org--no-snapshot").mkdir()
    (tmp_path / "datasets--org--d").mkdir()
    (tmp_path / "models--org--a-file").touch()
    assert discover(tmp_path) == ()


def test_discover_without_a_cache_finds_nothing(tmp_path: Path) -> None:
    """A new machine."""
    assert discover(tmp_path / "none") == ()


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 100_000, "\xff"])
def test_json_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    """The message carries the file's name."""
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(Unreadable, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_a_huge_json_is_not_read(tmp_path: Path) -> None:
    """It is not a configuration, and would fill the memory."""
    (tmp_path / "config.json").write_text(json.dumps({}))
    sparse(tmp_path / "config.json", 1 << 40)
    with pytest.raises(Unreadable, match="larger than 8 MiB"):
        read_json(tmp_path / "config.json")
