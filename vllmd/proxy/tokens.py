"""How many tokens a request took: by the usage in its answer, in any API's form, or estimated from sizes."""

from __future__ import annotations

import re

from vllmd.frozen import frozen

TAIL_BYTES = 1024  # of an answer's end, in which its usage is looked for
BYTES_PER_EVENT = 250  # of a stream: about one token's
BYTES_PER_TOKEN = 4  # of text: English has about four letters in a token
FILE = b";base64,"  # a file within JSON (a data: URL)
TOKENS_PER_FILE = 1000  # of an image within JSON, or of a form with files: about what an image of 1 megapixel takes

COUNTS = re.compile(rb'"(\w{5,27})_tokens"\s*:\s*(\d{1,12})')  # inside a string, the quotes would be escaped
TOTAL = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')
PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,12})')
CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d{1,12})')
GENERATES = ("completions", "/messages", "/responses", "/infill", "/completion")  # path suffixes: the answer is text
COUNTED = (*GENERATES, "/embeddings", "/rerank", "/score", "/pooling", "/classify")  # and those that read text


@frozen
class Tokens:
    """Tokens of one request: ``prompt``, ``cached`` of them, and ``answer``. ``estimated``: from sizes alone."""

    prompt: int
    answer: int
    cached: int = 0
    estimated: bool = False

    @property
    def total(self) -> int:
        """Tokens of the prompt and of the answer."""
        return self.prompt + self.answer


def from_usage(tail: bytes | bytearray, opening: bytes = b"") -> Tokens | None:
    """The tokens by the usage in the last bytes of an answer, in the form of any of the APIs; None if there is none.

    ``opening``: the first bytes of a stream of Anthropic's, whose first usage has numbers that the last one leaves out.
    """
    start = tail.rfind(b'"usage"', -TAIL_BYTES)
    if start < 0:
        return None
    of_all, of_prompt = TOTAL.search(tail, start), PROMPT.search(tail, start)
    if of_all is not None and of_prompt is not None:  # OpenAI's: three literals are found in half the time of any name
        total, prompt, of_cached = int(of_all[1]), int(of_prompt[1]), CACHED.search(tail, start)
        return Tokens(prompt, total - prompt if total > prompt else 0, 0 if of_cached is None else int(of_cached[1]))
    counts, first = COUNTS.findall(tail, start), opening.find(b'"usage"')
    if first >= 0:
        counts = [*COUNTS.findall(opening, first, first + TAIL_BYTES), *counts]
    found = {name: int(number) for name, number in counts}
    cached = found.get(b"cached", 0)
    if b"total" in found:
        total = found[b"total"]
        prompt = found.get(b"input", max(0, total - found.get(b"completion", found.get(b"output", 0))))
        return Tokens(prompt, max(0, total - prompt), cached)
    if b"input" in found and b"output" in found:  # Anthropic's, whose input tokens do not include the cached ones
        cached = found.get(b"cache_read_input", 0)
        return Tokens(found[b"input"] + cached + found.get(b"cache_creation_input", 0), found[b"output"], cached)
    return None


def estimate(path: str, body: bytes, size: int, *, stream: bool) -> Tokens:
    """Estimate a request's tokens by its path at the engine, its body, and the bytes that came of its answer."""
    if not path.endswith(GENERATES):
        return Tokens(prompt_tokens(body), 0, estimated=True)
    return Tokens(prompt_tokens(body), -(-size // (BYTES_PER_EVENT if stream else BYTES_PER_TOKEN)), estimated=True)


def prompt_tokens(body: bytes) -> int:
    """About how many tokens an engine reads for a request with this body; each file in it counts the same."""
    if body.startswith(b"--"):  # a form
        return TOKENS_PER_FILE
    if body.find(FILE) < 0:  # not ``in``, which takes the bytes for a number first
        return len(body) // BYTES_PER_TOKEN
    text, *files = body.split(FILE)
    rest = sum(len(file) - (file.find(b'"') + 1 or len(file)) for file in files)
    return (len(text) + rest) // BYTES_PER_TOKEN + TOKENS_PER_FILE * len(files)
