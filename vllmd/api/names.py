"""The model that a name means: as clients send it to the daemon, and as it is typed after a verb of vllmctl.

The exact name or alias first. What clients make of names by habit comes after it, one habit after another, and each
only where it leads to one model: a tag ``:latest`` (Ollama's clients), other case or another Unicode form of the same
letters, a provider's prefix (LiteLLM's and others' ``openai/``, ``ollama/``, ``hosted_vllm/``), and the end of a name
without what stands before its slashes. White space and slashes at either end mean nothing. Nothing that could be two
models is guessed.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vllmd.errors import BadRequest, UnknownModel

LONGEST_NAME = 256  # characters of a model's name; a longer one is refused before anything is compared with it
TOO_LONG_A_NAME = f"a model's name has at most {LONGEST_NAME} characters"

MOST_TOLD = 3  # names in a message
MOST_COMPARED = 500  # names that a wrong one is compared with

FIRST_MODEL = "vllmctl run smollm2"  # fetches one, serves it and asks it
LATEST = ":latest"
# By which programs choose an API; some send it on with the name.
PREFIXES = tuple(
    f"{name}/"
    for name in (
        *("openai", "ollama", "ollama_chat", "hosted_vllm", "vllm", "llamacpp", "lm_studio", "custom_openai"),
        *("vllmd", "openai_like", "text-completion-openai", "azure", "azure_ai", "anthropic", "litellm_proxy"),
        *("openrouter", "together_ai", "huggingface", "llamafile", "lmstudio", "llama.cpp", "llama_cpp", "xinference"),
        "models",
    )
)


class Meanings:
    """Which models each of many names can mean; nearly always that is one, which has no set of its own."""

    def __init__(self) -> None:
        self._known: dict[str, str | set[str]] = {}

    def note(self, name: str, model: str) -> None:
        """``name`` can mean ``model`` as well."""
        before = self._known.setdefault(name, model)
        if isinstance(before, set):
            before.add(model)
        elif before != model:
            self._known[name] = {before, model}

    def of(self, name: str) -> set[str]:
        """The models, none for a name that nobody noted."""
        known = self._known.get(name, set())
        return {known} if isinstance(known, str) else known


class Guesses:
    """What names can mean that are none exactly, by other case, and by their ends. ``names``: each with its model."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.folded, self.suffixes, self.folded_suffixes = Meanings(), Meanings(), Meanings()
        for name, model in names.items():
            self.folded.note(folded(name), model)
            if name.endswith(LATEST):
                self.folded.note(folded(name.removesuffix(LATEST)), model)
            for suffix in _suffixes(name):
                self.suffixes.note(suffix, model)
                self.folded_suffixes.note(folded(suffix), model)


class Names:
    """The names of all models, and of what else is offered (``offers``).

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
        self._of_models = len(self._exact)  # so many names, the first ones, are models'
        for name in offers:
            self._exact.setdefault(name, name)
        self._known_guesses: Guesses | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._exact

    @property
    def _guesses(self) -> Guesses:
        """Made when a name is asked for that is none exactly: of ten thousand models they take megabytes."""
        if self._known_guesses is None:
            self._known_guesses = Guesses(self._exact)
        return self._known_guesses

    def resolve(self, name: str, visible: Callable[[str], bool] = lambda model: True) -> str:
        """The configured name, of a model or another offer. Raises UnknownModel, or BadRequest if it is missing or
        could be several.

        Only ``visible`` models are guessed and suggested; another one is found by its full name or alias alone,
        and whoever asks finds out whether it may be used.
        """
        if name in self._exact:
            return self._exact[name]
        if not name:
            return self._only(visible)
        if len(name) > LONGEST_NAME:  # before anything is compared with it
            raise BadRequest(TOO_LONG_A_NAME, param="model")
        for readings in self._readings(name):
            found = set(filter(visible, readings))
            if len(found) == 1:
                return next(iter(found))
            if found:
                raise BadRequest(f"model {name!r} could be {_either(sorted(found))}; name one of them", param="model")
        raise UnknownModel(self._unknown(name, visible), param="model")

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

    def _readings(self, name: str) -> Iterator[set[str]]:
        """The models that ``name`` can mean, by one habit after another."""
        plain = name.strip().strip("/")
        if plain.lower().endswith(LATEST):
            plain = plain[: -len(LATEST)]
        for tagged in (plain, plain + LATEST):
            if tagged in self._exact:
                yield {self._exact[tagged]}
        guesses = self._guesses
        yield guesses.folded.of(folded(plain))
        lowered = plain.lower()
        for prefix in PREFIXES:
            if lowered.startswith(prefix):
                yield guesses.folded.of(folded(plain[len(prefix) :]))
        for known, wanted in _by_suffix(guesses, plain):
            yield known.of(wanted)

    def _only(self, visible: Callable[[str], bool]) -> str:
        """The model of a request that names none, as llama.cpp's own clients do: the only one there is."""
        models = set(filter(visible, itertools.islice(self._exact.values(), self._of_models)))
        if len(models) != 1:
            raise BadRequest("the request names no model; GET /v1/models lists those there are", param="model")
        return models.pop()

    def _unknown(self, name: str, visible: Callable[[str], bool]) -> str:
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


def _either(names: Sequence[str]) -> str:
    """``'a' or 'b'``; of many the first ones."""
    more = f" or {len(names) - MOST_TOLD} others" if len(names) > MOST_TOLD else ""
    return " or ".join(map(repr, names[:MOST_TOLD])) + more


def _suffixes(name: str) -> Iterable[str]:
    """``org/team/name`` may also be called ``team/name`` or ``name``."""
    parts = name.split("/")
    return ("/".join(parts[start:]) for start in range(1, len(parts)))


def folded(name: str) -> str:
    """``name`` without the difference between cases, and between the ways in which Unicode writes one letter."""
    if name.isascii():  # of these there is one way, and a name that is so already is not kept twice
        lowered = name.lower()
        return name if lowered == name else lowered
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _by_suffix(guesses: Guesses, name: str) -> Iterator[tuple[Meanings, str]]:
    """Where to look for a name that is the end of another one, also behind a provider's prefix."""
    lowered = name.lower()
    for asked in (name, *(name[len(prefix) :] for prefix in PREFIXES if lowered.startswith(prefix))):
        yield guesses.suffixes, asked
        yield guesses.folded_suffixes, folded(asked)
