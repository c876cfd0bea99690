"""What a client may call a model."""

import difflib
from collections.abc import Callable

import pytest

from vllmd.api import names
from vllmd.api.names import Names
from vllmd.errors import BadRequest, UnknownModel

NAMES = Names([
    ("Qwen/Qwen3-0.6B", ("fast",)),
    ("meta/llama-3", ()),
    ("other/llama-3", ()),
    ("tagged:latest", ()),
    ("caf\u00e9", ()),
    ("openai/gpt-x", ()),
    ("two", ()),
    ("TWO", ()),
])  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("fast", "Qwen/Qwen3-0.6B"),
        ("Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("meta/llama-3", "meta/llama-3"),
        ("qwen/qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("FAST", "Qwen/Qwen3-0.6B"),
        ("fast:latest", "Qwen/Qwen3-0.6B"),
        ("fast:LATEST", "Qwen/Qwen3-0.6B"),
        (" fast ", "Qwen/Qwen3-0.6B"),
        ("/fast/", "Qwen/Qwen3-0.6B"),
        ("litellm_proxy/fast", "Qwen/Qwen3-0.6B"),
        ("azure/Fast:latest", "Qwen/Qwen3-0.6B"),
        ("Fast:latest", "Qwen/Qwen3-0.6B"),
        ("openai/fast", "Qwen/Qwen3-0.6B"),
        ("ollama/Fast:latest", "Qwen/Qwen3-0.6B"),
        ("hosted_vllm/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("openai/qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("Meta/Llama-3", "meta/llama-3"),
        ("tagged", "tagged:latest"),
        ("cafe\u0301", "caf\u00e9"),
        ("\uff31wen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("openai/gpt-x", "openai/gpt-x"),
        ("two", "two"),
        ("TWO", "TWO"),
    ],
)
def test_names_as_clients_write_them(asked: str, model: str) -> None:
    """Clients write names in the ways that are not ambiguous."""
    assert NAMES.resolve(asked) == model


def test_an_ambiguous_suffix_names_the_candidates() -> None:
    """Guessing would send a request to the wrong model."""
    with pytest.raises(BadRequest, match="could be 'meta/llama-3' or 'other/llama-3'; name one of them") as error:
        NAMES.resolve("llama-3")
    assert error.value.param == "model"


@pytest.mark.parametrize("asked", ["Two", "Two:latest", "openai/tWo", "LLAMA-3", "ollama/llama-3"])
def test_no_habit_is_a_guess(asked: str) -> None:
    """What could be two models is refused, whatever it was changed by."""
    with pytest.raises(BadRequest, match="could be"):
        NAMES.resolve(asked)


def test_the_only_model_need_not_be_named() -> None:
    """llama.cpp's own clients know of one model and never name it."""
    assert Names([("a", ("b",))]).resolve("") == "a"


def test_a_long_name_is_compared_with_nothing() -> None:
    """A megabyte of name would take minutes."""
    with pytest.raises(BadRequest, match="at most 256 characters"):
        NAMES.resolve("a" * 257)


@pytest.mark.parametrize("asked", ["qwen3-0.7b", "Qwen/Qwen3-0.6", "Qwen3"])
def test_an_unknown_name_suggests_the_close_one(asked: str) -> None:
    """A typo should cost one look at the error, not a search."""
    with pytest.raises(UnknownModel, match=r"did you mean .*Qwen/Qwen3-0\.6B"):
        NAMES.resolve(asked)


def test_a_name_of_another_house_suggests_nothing() -> None:
    """Programs ask for claude-3 or gpt-4o by default; what is hardly like it would only mislead."""
    with pytest.raises(UnknownModel) as caught:
        Names([("chat-32b", ())]).resolve("claude-3")
    assert "did you mean" not in caught.value.message


def visible(model: str) -> bool:
    """A key for one model."""
    return model == "meta/llama-3"


@pytest.mark.parametrize("asked", ["Qwen/Qwen3-0.6", "Qwen3-0.6B", "fas", "other/llama-4"])
def test_no_model_is_suggested_that_may_not_be_used(asked: str) -> None:
    """Nor guessed by the end of its name: what one may not use one need not know of."""
    with pytest.raises(UnknownModel) as error:
        NAMES.resolve(asked, visible)
    assert not {"Qwen/Qwen3-0.6B", "fast", "other/llama-3"} & set(error.value.message.split("'"))


def test_an_end_that_fits_only_one_of_ones_own_is_that() -> None:
    """Others' models are no reason to ask back, and are not named in asking."""
    assert NAMES.resolve("llama-3", visible) == "meta/llama-3"


def test_a_name_like_no_other_points_to_the_list() -> None:
    """With nothing close, the list is the best help."""
    with pytest.raises(UnknownModel, match="GET /v1/models"):
        NAMES.resolve("zzzzzz")


def test_without_models_it_says_so() -> None:
    """A fresh installation has none configured."""
    with pytest.raises(UnknownModel, match="no models are configured"):
        Names([]).resolve("x")


def test_a_request_that_names_no_model_is_told_so() -> None:
    """An empty name is no typo: suggesting one would mislead."""
    with pytest.raises(BadRequest, match="names no model") as error:
        NAMES.resolve("")
    assert error.value.param == "model"


def test_what_is_said_of_a_mistake_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs repeat it as long as they run: 20 ms each time, in which nobody else was served. Whoever may see other
    models is told others, and mistakes fill no memory."""
    looked = list[str]()

    def near(name: str, known: list[str], n: int, cutoff: float) -> list[str]:
        looked.append(name)
        return known[:1]

    monkeypatch.setattr(difflib, "get_close_matches", near)
    monkeypatch.setattr(names, "MOST_GUESSED", 3)
    known = Names([("one", ()), ("two", ())])

    def told(name: str, only: Callable[[str], bool]) -> str:
        with pytest.raises(UnknownModel) as error:
            known.resolve(name, only)
        return error.value.message

    def all(model: str) -> bool:
        return True

    def second(model: str) -> bool:
        return model == "two"

    assert [told("x", all) for _ in range(3)] == ["model 'x' does not exist; did you mean 'one'?"] * 3
    assert looked == ["x"]
    assert [told("x", second) for _ in range(2)] == ["model 'x' does not exist; did you mean 'two'?"] * 2
    for name in ("y", "z", "x"):  # the fourth mistake has all of them forgotten
        told(name, all)
    assert looked == ["x", "x", "y", "z", "x"]
