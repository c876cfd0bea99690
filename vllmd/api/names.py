"""Which model a name means: as clients send it to the daemon, and as it is typed after a verb of vllmctl.

An exact name or alias comes first. After it come the ways in which clients change names by habit, one after another,
and each counts only where it leads to one model:

1. the tag ``:latest`` that Ollama's clients add;
2. other case, or another Unicode form of the same letters;
3. a provider's prefix, such as ``openai/``, ``ollama/`` or ``hosted_vllm/``, that LiteLLM and others add;
4. the end of a name, without what stands before its slashes, alone or behind such a prefix.

White space and slashes at either end are ignored. A name that could be two models is an error, not a guess.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vllmd.errors import BadRequest, UnknownModel

LONGEST_NAME = 256  # characters of a model's name; a longer one is refused before anything is compared with it
TOO_LONG_A_NAME = f"a model's name has at most {LONGEST_NAME} characters"

MOST_NAMED = 3  # names in a message
MOST_COMPARED = 500  # names that a wrong one is compared with
MOST_GUESSED = 1000  # inexact names whose meanings are remembered; as many of which the error is, for each caller

FIRST_MODEL = "vllmctl run smollm2"  # the command that fetches a model, serves it and asks it
LATEST = ":latest"
# Prefixes by which programs choose an API; some send them on with the name.
PREFIXES = tuple(
    f"{name}/"
    for name in (
        *("openai", "ollama", "ollama_chat", "hosted_vllm", "vllm", "llamacpp", "lm_studio", "custom_openai"),
        *("vllmd", "openai_like", "text-completion-openai", "azure", "azure_ai", "anthropic", "litellm_proxy"),
        *("openrouter", "together_ai", "huggingface", "llamafile", "lmstudio", "llama.cpp", "llama_cpp", "xinference"),
        "models",
    )
)


class Guesses:
    """Which models an inexact name can mean, by other case and by its end: each way of reading it, in order."""

    def __init__(self, name: str, names: Mapping[str, str]) -> None:
        """``names``: every one there is, with its model. All of them are looked at: 5 ms with ten thousand."""
        lowered = name.lower()
        without_prefix = [name[len(prefix) :] for prefix in PREFIXES if lowered.startswith(prefix)]
        readings = (name, *without_prefix)
        self._folded: dict[str, set[str]] = {folded(each): set() for each in readings}
        self._ends: dict[str, set[str]] = {f"/{each}": set() for each in readings}
        self._folded_ends: dict[str, set[str]] = {f"/{folded(each)}": set() for each in readings}
        for known, model in names.items():
            self._compare(known, folded(known), model)
        self.meanings = [self._folded[folded(each)] for each in readings]
        for each in readings:
            self.meanings += self._ends[f"/{each}"], self._folded_ends[f"/{folded(each)}"]

    def _compare(self, known: str, plain: str, model: str) -> None:
        """Note what ``known``, a model's name or alias, could be meant by. ``plain``: it, folded."""
        if plain in self._folded:
            self._folded[plain].add(model)
        if known.endswith(LATEST) and (tagless := folded(known.removesuffix(LATEST))) in self._folded:
            self._folded[tagless].add(model)
        if "/" not in known:
            return
        for end, models in self._ends.items():
            if known.endswith(end):
                models.add(model)
        for end, models in self._folded_ends.items():
            if plain.endswith(end):
                models.add(model)


class Names:
    """The names of all models, and of adapters, variants and pools (``offers``).

    ``models``: each model's name with its aliases. ``listed_by``: how a user gets a list of them, for messages.
    """

    def __init__(
        self,
        models: Iterable[tuple[str, Sequence[str]]],
        offers: Iterable[str] = (),
        listed_by: str = "GET /v1/models lists those that do",
    ) -> None:
        self._exact: dict[str, str] = {}
        self._listed_by = listed_by
        for model, aliases in models:
            for name in (model, *aliases):
                self._exact[name] = model
        self._of_models = len(self._exact)  # the first of the names; the others are offers'
        for name in offers:
            self._exact.setdefault(name, name)
        self._guessed: dict[str, list[set[str]]] = {}  # what inexact names can mean, of the last ones that were asked
        self._unknown: dict[tuple[str, object], str] = {}  # of names that mean nothing: what is said to whom

    def __contains__(self, name: str) -> bool:
        return name in self._exact

    def _guesses(self, name: str) -> list[set[str]]:
        """What an inexact name can mean. Clients send the same ones again and again."""
        if name not in self._guessed:
            if len(self._guessed) >= MOST_GUESSED:
                self._guessed.clear()
            self._guessed[name] = Guesses(name, self._exact).meanings
        return self._guessed[name]

    def resolve(self, name: str, visible: Callable[[str], bool] = lambda model: True) -> str:
        """The configured name of the model or offer that ``name`` means.

        Raises UnknownModel, or BadRequest for a name that is missing, too long, or could be several models. Only
        ``visible`` models are guessed and suggested; any other is found by its full name or alias alone, and whether
        the caller may use it is decided elsewhere.
        """
        if name in self._exact:
            return self._exact[name]
        if not name:  # llama.cpp's own clients send none: the only model there is
            models = set(filter(visible, itertools.islice(self._exact.values(), self._of_models)))
            if len(models) != 1:
                raise BadRequest("the request names no model; GET /v1/models lists those there are", param="model")
            return models.pop()
        if len(name) > LONGEST_NAME:
            raise BadRequest(TOO_LONG_A_NAME, param="model")
        for meanings in self._meanings(name):
            models = set(filter(visible, meanings))
            if len(models) == 1:
                return next(iter(models))
            if models:
                some, others = sorted(models)[:MOST_NAMED], len(models) - MOST_NAMED
                either = " or ".join(map(repr, some)) + (f" or {others} others" if others > 0 else "")
                raise BadRequest(f"model {name!r} could be {either}; name one of them", param="model")
        # Programs ask for a model that is gone again and again, and to find what they may mean takes long.
        if (name, visible) not in self._unknown:
            if len(self._unknown) >= MOST_GUESSED:
                self._unknown.clear()
            self._unknown[name, visible] = self._mistake(name, visible)
        raise UnknownModel(self._unknown[name, visible], param="model")

    def with_replica(
        self, name: str, is_replica: Callable[[str], bool], visible: Callable[[str], bool] = lambda model: True
    ) -> str:
        """The configured name of a model, or the id of a replica. ``is_replica`` tells ids of replicas.

        A replica may also be called ``ALIAS@2``, or by the end of its model's name. Raises as ``resolve`` does.
        """
        if is_replica(name):
            return name
        short, _, label = name.rpartition("@")
        try:
            return self.resolve(name, visible)
        except UnknownModel:
            if not short or not is_replica(known := f"{self.resolve(short, visible)}@{label}"):
                raise
            return known

    def _meanings(self, name: str) -> Iterator[set[str]]:
        """The models that ``name`` can mean, in the order of the file's docstring."""
        plain = name.strip().strip("/")
        if plain.lower().endswith(LATEST):
            plain = plain[: -len(LATEST)]
        for tagged in (plain, plain + LATEST):
            if tagged in self._exact:
                yield {self._exact[tagged]}
        yield from self._guesses(plain)

    def _mistake(self, name: str, visible: Callable[[str], bool]) -> str:
        """The error for a name that means nothing: with the nearest names, else with how to list them."""
        if not self._exact:
            return f"model {name!r} does not exist: no models are configured; on its machine: {FIRST_MODEL}"
        seen = [known for known, model in self._exact.items() if visible(model)]
        lowered = {known.lower(): known for known in seen}
        if len(lowered) > MOST_COMPARED:  # a comparison takes 50 microseconds, and everybody else waits
            alike = (known for known in lowered if known[:2] == name[:2].lower() and abs(len(known) - len(name)) < 4)
            lowered = {known: lowered[known] for known in itertools.islice(alike, MOST_COMPARED)}
        import difflib  # for mistakes only

        close = [lowered[hit] for hit in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.6)]
        close += [known for known in seen if name and name.lower() in known.lower() and known not in close]
        if close:
            return f"model {name!r} does not exist; did you mean {' or '.join(map(repr, close[:3]))}?"
        return f"model {name!r} does not exist; {self._listed_by}"


def folded(name: str) -> str:
    """``name`` without the difference between cases, and between the ways in which Unicode writes one letter."""
    if name.isascii():  # of these there is one way, and a name that is so already is not kept twice
        lowered = name.lower()
        return name if lowered == name else lowered
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
