"""Changing a setting in a file that a person wrote: everything else stays as it is, to the byte.

V is the Ollama-like manager: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import pytest

from vllmd.config.edit import CannotEdit, assign, is_flat

TEXT = """\
# our box
models:
  # the small one
  Qwen/Qwen3-0.6B:   # for tests
    gpu_memory_utilization: 0.5  # half of it
    devices:
      - 0
      - 1
    # a comment after the list
    dtype: auto

  other: {pin: true}
  bare:
  braces: {}
"""

CASES = [
    ("Qwen/Qwen3-0.6B", "gpu_memory", "20GiB", "gpu_memory_utilization: 0.5  #", "gpu_memory_utilization: 20GiB  #"),
    ("Qwen/Qwen3-0.6B", "devices", "[1]", "devices:\n      - 0\n      - 1\n", "devices: [1]\n"),
    ("Qwen/Qwen3-0.6B", "pin", "true", "    gpu_memory_util", "    pin: true\n    gpu_memory_util"),
    ("other", "devices", "[0]", "{pin: true}", "{devices: [0], pin: true}"),
    ("other", "pin", "false", "{pin: true}", "{pin: false}"),
    ("braces", "devices", "[0]", "braces: {}", "braces: {devices: [0]}"),
    ("bare", "devices", "[0]", "bare:\n", "bare:\n    devices: [0]\n"),
    ("new/one", "devices", "[0]", "models:\n  #", "models:\n  #"),
]


@pytest.mark.parametrize(
    ("model", "name", "value", "before", "after"), CASES[:-1], ids=[f"{c[0]}-{c[1]}" for c in CASES[:-1]]
)
def test_V_assign_changes_only_the_setting(model: str, name: str, value: str, before: str, after: str) -> None:
    """Comments, order and blank lines are the administrator's."""
    assert before in TEXT
    assert assign(TEXT, model, {name: value}) == TEXT.replace(before, after, 1)


def test_a_model_that_is_not_there_is_added() -> None:
    """V's assign writes models that were never configured."""
    line = "  Qwen/Qwen3-0.6B:   # for tests"
    expected = TEXT.replace(line, f"  new/one:\n    devices: [0]\n{line}")
    assert assign(TEXT, "new/one", {"devices": "[0]"}) == expected
    assert assign("policy: lru", "m", {"pin": "true"}) == "policy: lru\nmodels:\n  m:\n    pin: true\n"
    assert assign("", "1.5", {"pin": "true"}) == 'models:\n  "1.5":\n    pin: true\n'


def test_flat_files_are_edited_at_the_top() -> None:
    """A file of V's, as it is."""
    assert is_flat("a: {pin: true}\n")
    assert not is_flat(TEXT)
    assert assign("a:\n  pin: true\n", "a", {"dtype": "half"}, flat=True) == "a:\n  dtype: half\n  pin: true\n"


def test_several_settings_at_once() -> None:
    """As ``assign --devices --gpu-memory`` does."""
    assert assign("models:\n  m:\n", "m", {"devices": "[0]", "gpu_memory": "0.5"}) == (
        "models:\n  m:\n    gpu_memory: 0.5\n    devices: [0]\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {a: &x {pin: true}, b: *x}", "b is written as an alias"),
        ("models:\n  a: 5\n  b: 5", "the model is not a mapping"),
        ("models: {a: {}}", "the models are written in braces"),
        ("models: {}", "models: is empty"),
    ],
)
def test_what_only_a_person_should_change_is_refused(text: str, message: str) -> None:
    """Better a clear no than a broken file."""
    with pytest.raises(CannotEdit, match=message):
        assign(text, "b", {"pin": "true"})
