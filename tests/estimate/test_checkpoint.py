"""Weights from the files: the exact bytes where they can be told, a note and the next best where not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.estimate.files import GiB, gguf, model, safetensors, sparse
from vllmd.engines.checkpoint import weights_of
from vllmd.engines.gguf import config_of
from vllmd.hub import Unreadable


def index(folder: Path, names: list[str], total: object, prefix: str = "model.safetensors") -> None:
    weight_map = {f"layer.{number}": name for number, name in enumerate(names)}
    (folder / f"{prefix}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )


def test_headers_tell_bytes_by_type(tmp_path: Path) -> None:
    """Without loading a byte of the tensors."""
    found = weights_of(model(tmp_path, BF16=14 * GiB, F32=GiB))
    assert found.sizes == {"BF16": 14 * GiB, "F32": GiB}
    assert (found.how, found.notes) == ("headers of 1 safetensors files", ())


def test_shards_add_up_and_strays_do_not_count(tmp_path: Path) -> None:
    """Only what the index names: repositories carry a second copy of the weights, or a training state."""
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        safetensors(tmp_path / name, {"BF16": GiB})
    index(tmp_path, ["model-1.safetensors", "model-2.safetensors"], 2 * GiB)
    assert weights_of(tmp_path).total == 2 * GiB
    (tmp_path / "model.safetensors.index.json").unlink()
    assert weights_of(tmp_path).total == 2 * GiB


def test_missing_shards_are_taken_from_the_index(tmp_path: Path) -> None:
    """A download that has not finished must not be taken for a small model."""
    safetensors(tmp_path / "model-1.safetensors", {"BF16": GiB})
    index(tmp_path, ["model-1.safetensors", "model-2.safetensors"], 9 * GiB)
    found = weights_of(tmp_path)
    assert (found.total, found.how) == (9 * GiB, "total_size of model.safetensors.index.json")
    assert found.notes == ("1 of 2 safetensors files are not here",)


def test_a_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    """So the cache looks while a blob is being downloaded."""
    (tmp_path / "model-1.safetensors").symlink_to(tmp_path / "no-such-blob")
    index(tmp_path, ["model-1.safetensors"], 3 * GiB)
    assert weights_of(tmp_path).total == 3 * GiB


def test_a_file_that_is_cut_off_counts_whole(tmp_path: Path) -> None:
    """Its header knows what it will be."""
    safetensors(tmp_path / "model.safetensors", {"BF16": GiB}, missing=1000)
    found = weights_of(tmp_path)
    assert found.total == GiB
    assert "model.safetensors is cut off" in found.notes[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut off or corrupt"),
        (b"\x10\0\0", "cut off or corrupt"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cut off or corrupt"),
        (struct.pack("<Q", 4) + b"}{][", "header is no JSON object"),
        (struct.pack("<Q", 4) + b"{1:2", "header is not JSON"),
        (struct.pack("<Q", 4) + b"[12]", "no JSON object"),
        (struct.pack("<Q", 12) + b'{"a": "odd"}', "no sensible place for tensor 'a'"),
        (struct.pack("<Q", 46) + b'{"a":{"dtype":"F8","data_offsets":[ 9 , -1 ]}}', "no sensible place"),
    ],
)
def test_a_corrupt_header_is_noted_and_the_size_taken(tmp_path: Path, content: bytes, says: str) -> None:
    """Whatever somebody put there, the daemon starts."""
    (tmp_path / "model.safetensors").write_bytes(content)
    found = weights_of(tmp_path)
    assert found.total == len(content)
    assert says in found.notes[0]


@pytest.mark.parametrize("total", [None, -5, "much", 1 << 60])
def test_an_absurd_total_is_noted_and_not_believed(tmp_path: Path, total: object) -> None:
    """Then the shards that are here count."""
    safetensors(tmp_path / "a.safetensors", {"BF16": GiB})
    index(tmp_path, ["a.safetensors", "b.safetensors"], total)
    found = weights_of(tmp_path)
    assert found.total == GiB
    assert "has no sensible total_size" in found.notes[0]


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """A model's files are others' input."""
    outside = safetensors(tmp_path / "outside.safetensors", {"BF16": GiB})
    folder = model(tmp_path / "model")
    index(folder, [f"../{outside.name}", str(outside)], 5)
    found = weights_of(folder)
    assert found.total == 0
    assert "names files outside its folder" in found.notes[0]


def test_pytorch_files_count_by_size_or_index(tmp_path: Path) -> None:
    """Never unpickled."""
    sparse(tmp_path / "pytorch_model.bin", 2 * GiB)
    sparse(tmp_path / "training_args.bin", GiB)
    assert weights_of(tmp_path).sizes == {"": 2 * GiB}
    index(tmp_path, ["pytorch_model.bin"], 3 * GiB, "pytorch_model.bin")
    assert weights_of(tmp_path).total == 3 * GiB


def test_gguf_is_one_model_of_several_in_a_folder(tmp_path: Path) -> None:
    """Repositories hold every quantisation; a split file is all its parts; a projector is none."""
    sparse(tmp_path / "m-Q4_K_M.gguf", 4 * GiB)
    sparse(tmp_path / "m-Q8_0-00001-of-00002.gguf", 3 * GiB)
    sparse(tmp_path / "m-Q8_0-00002-of-00002.gguf", 5 * GiB)
    sparse(tmp_path / "mmproj-m.gguf", 20 * GiB)
    assert weights_of(tmp_path).total == 8 * GiB
    assert weights_of(tmp_path, "q4_k_m").total == 4 * GiB
    assert weights_of(tmp_path / "m-Q4_K_M.gguf").total == 4 * GiB


def test_a_gguf_head_tells_the_architecture(tmp_path: Path) -> None:
    """The tokenizer's tables after it are never read."""
    figures = {"llama.block_count": 32, "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8}
    head = {"general.architecture": "llama", "general.tags": ["a", "b"], **figures, "llama.embedding_length": 4096}
    path = gguf(tmp_path / "m.gguf", {**head, "tokenizer.ggml.tokens": ["x"] * 9, "llama.context_length": 1}, 4 * GiB)
    config = config_of(path)
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["hidden_size"]) == (32, 8, 4096)
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", None)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"nonsense" * 9, b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), b"GGUF" + b"\xff" * 40],
)
def test_a_corrupt_gguf_head_is_refused(tmp_path: Path, content: bytes) -> None:
    """Absurd lengths are not allocated, and the file is named."""
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(Unreadable, match=r"no GGUF file|m\.gguf: its head is cut off"):
        config_of(tmp_path / "m.gguf")


def test_an_empty_folder_has_no_weights(tmp_path: Path) -> None:
    """Zero says: unknown."""
    assert weights_of(tmp_path).total == 0
