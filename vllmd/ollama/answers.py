"""Translate an engine's answer for Ollama's clients. Pure: one event of a stream in, objects out.

=================================  ==============================================================
an engine's event                  the client's line
=================================  ==============================================================
``delta.content``, ``text``        ``message.content`` or ``response``, at once
``delta.reasoning(_content)``      ``message.thinking`` or ``thinking``; nothing where the client wants none
``delta.tool_calls``               gathered; ``message.tool_calls``, with objects as arguments, before the last line
``logprobs``                       ``logprobs``, in chat's form
``finish_reason``                  ``done_reason`` of the last line
``usage``, ``timings``             counts and durations of the last line
``error``                          ``{"error": "..."}``, and it is over
a comment (``: loading``)          a line without text, as a sign of life
=================================  ==============================================================
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from vllmd.ollama.context import Turn, encoded

REASONING = ("reasoning_content", "reasoning")  # llama.cpp's and older vLLM's, newer vLLM's
REASONS = {"length": "length"}  # any other reason is ``stop``, tool calls as well
NANOSECONDS = 1_000_000_000
Object = dict[str, Any]


class Piece(Protocol):
    """The form of a route's pieces of an answer. A function, so it can be a key of a cache."""

    def __call__(self, text: str, thinking: str = "", calls: list[Object] | None = None) -> Object:
        """The members of one piece of an answer; ``calls`` are tool calls."""

    def __hash__(self) -> int: ...


def chat_piece(text: str, thinking: str = "", calls: list[Object] | None = None) -> Object:
    """A piece of a chat's answer."""
    message: Object = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def generate_piece(text: str, thinking: str = "", calls: list[Object] | None = None) -> Object:
    """A piece of a completion."""
    return {
        "response": text,
        **({"thinking": thinking} if thinking else {}),
        **({"tool_calls": calls} if calls else {}),
    }


class Timing:
    """The times of one request, on a clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._sent: float | None = None
        self._first: float | None = None

    def sent(self) -> None:
        """The engine has the request: the wait for the model is over."""
        if self._sent is None:
            self._sent = self._now()

    def answered(self) -> None:
        """The first text has come."""
        if self._first is None:
            self._first = self._now()

    def durations(self, engine: Mapping[str, Any]) -> dict[str, int]:
        """The durations in nanoseconds; for prompt and answer those in llama.cpp's ``timings``, if they are there."""
        end = self._now()
        sent = end if self._sent is None else self._sent
        first = sent if self._first is None else self._first  # an answer that came whole counts as written all the time
        reading, writing = first - sent, end - first
        if isinstance(engine.get("prompt_ms"), int | float) and isinstance(engine.get("predicted_ms"), int | float):
            reading, writing = engine["prompt_ms"] / 1000, engine["predicted_ms"] / 1000
        return {
            "total_duration": _nanoseconds(end - self._began),
            "load_duration": _nanoseconds(sent - self._began),
            "prompt_eval_duration": _nanoseconds(reading),
            "eval_duration": _nanoseconds(writing),
        }


def _nanoseconds(seconds: float) -> int:
    """At least 1: clients divide by it."""
    return max(1, round(seconds * NANOSECONDS))


class Reply:
    """The translation of one answer; collects its tool calls, counts and text."""

    def __init__(
        self, piece: Piece, timing: Timing, *, thinking: bool = True, turns: tuple[Turn, ...] | None = None
    ) -> None:
        """``thinking``: whether it is shown. ``turns``: the conversation before the answer, None for no ``context``."""
        self.timing = timing
        self.texts: list[str] | None = None if turns is None else []  # the answer so far, for ``context``
        self.piece = piece
        self.plain = False  # the last event had nothing but a text
        self._thinking = thinking
        self._turns = turns
        self._calls: dict[int, Object] = {}
        self._finish = ""
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}

    def event(self, event: Object) -> Iterator[Object]:
        """The object for one event of a stream, if there is one."""
        self._note(event)
        choice = _choice(event)
        self.plain = False
        delta = choice.get("delta") or choice
        text, thinking, calls = self._parts(delta)
        for call in calls:
            self._gather(call)
        logprobs = _logprobs(choice)
        if text or thinking or logprobs:
            self.timing.answered()
            self.plain = bool(text) and not calls
            yield {**self.piece(text, thinking), **({"logprobs": logprobs} if logprobs else {})}

    def heartbeat(self) -> Object:
        """A piece without text, as Ollama's own engines send them, too."""
        return self.piece("")

    def gathered(self) -> Iterator[Object]:
        """The piece with the tool calls, once the stream is over; arguments that are no JSON object are text of it."""
        calls, broken = self._take_calls()
        if calls or broken:
            yield self.piece(broken, "", calls)

    def last(self) -> Object:
        """The object that closes a stream: an empty piece, with the durations and counts."""
        return {**self.piece(""), **self._done()}

    def whole(self, answer: Object) -> Object:
        """The object for an answer that is not a stream."""
        self._note(answer)
        choice = _choice(answer)
        text, thinking, calls = self._parts(choice.get("message") or choice)
        for number, call in enumerate(calls):
            self._gather({"index": number, **call})
        made, broken = self._take_calls()
        logprobs = _logprobs(choice)
        piece = self.piece(text + broken, thinking, made)
        return {**piece, **({"logprobs": logprobs} if logprobs else {}), **self._done()}

    def _note(self, event: Object) -> None:
        choice = _choice(event)
        if reason := choice.get("finish_reason") or event.get("stop_type"):
            self._finish = "length" if reason == "limit" else str(reason)
        if isinstance(usage := event.get("usage"), dict):
            self._usage = usage
        if isinstance(timings := event.get("timings"), dict):
            self._timings = timings

    def _parts(self, message: Mapping[str, Any]) -> tuple[str, str, list[Object]]:
        text = message.get("content") or message.get("text") or ""
        if self.texts is not None and text:
            self.texts.append(text)
        thinking = next((message[name] for name in REASONING if message.get(name)), "") if self._thinking else ""
        return text, thinking, message.get("tool_calls") or []

    def _gather(self, piece: Object) -> None:
        call = self._calls.setdefault(piece.get("index") or 0, {"id": "", "name": "", "arguments": ""})
        function = piece.get("function") or {}
        call["id"] = call["id"] or piece.get("id") or ""
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def _take_calls(self) -> tuple[list[Object], str]:
        """The tool calls that were collected, and the arguments of those in which they are no JSON object."""
        made: list[Object] = []
        broken = ""
        for index, call in sorted(self._calls.items()):
            try:
                arguments = json.loads(call["arguments"] or "{}")
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                named = {"index": index, "name": call["name"], "arguments": arguments}
                made.append({**({"id": call["id"]} if call["id"] else {}), "function": named})
            else:
                broken += call["arguments"]
        self._calls.clear()
        return made, broken

    def _done(self) -> Object:
        durations = self.timing.durations(self._timings)
        prompt = self._usage.get("prompt_tokens", self._timings.get("prompt_n"))
        answer = self._usage.get("completion_tokens", self._timings.get("predicted_n"))
        counts = {"prompt_eval_count": prompt, "eval_count": answer}
        done: Object = {"done": True, "done_reason": REASONS.get(self._finish, "stop")}
        done |= durations | {name: count for name, count in counts.items() if isinstance(count, int)}
        if self._turns is not None and self.texts is not None:
            context = encoded([*self._turns, ("assistant", "".join(self.texts))])
            done |= {} if context is None else {"context": context}
        return done


def _choice(event: Object) -> Object:
    """The first choice; an answer of llama.cpp's /infill has none, and is one itself."""
    choices = event.get("choices")
    if isinstance(choices, list):
        return choices[0] if choices and isinstance(choices[0], dict) else {}
    return event


def _logprobs(choice: Object) -> list[Object]:
    """Log probabilities as chat has them; those of /v1/completions, three lists, in the same form."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return []
    if isinstance(content := found.get("content"), list):
        return content
    tokens, values, tops = (found.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    entries = [{"token": token, "logprob": value} for token, value in zip(tokens, values, strict=False)]
    for one, top in zip(entries, tops, strict=False):
        one["top_logprobs"] = [{"token": token, "logprob": value} for token, value in (top or {}).items()]
    return entries


def error_text(answer: Any, default: str) -> str:
    """The message of an error in OpenAI's form, an engine's or the daemon's; ``default`` if there is none."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return error if isinstance(error, str) and error else default
