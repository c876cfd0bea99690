"""What an engine answers -> what Ollama's clients get. Pure: one object of a stream in, objects out.

=================================  ==============================================================
an engine's event                  what becomes of it
=================================  ==============================================================
``delta.content``, ``text``        ``message.content`` or ``response``, at once
``delta.reasoning(_content)``      ``message.thinking`` or ``thinking``; nothing where the client wants none
``delta.tool_calls``               gathered; ``message.tool_calls``, with objects as arguments, before the last line
``logprobs``                       ``logprobs``, in chat's form
``finish_reason``                  ``done_reason`` of the last line
``usage``, ``timings``             counts and durations of the last line
``error``                          ``{"error": "..."}``, and it is over
a comment (``: loading``)          a line without text, by which a client knows that all is well
=================================  ==============================================================
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from vllmd.ollama.context import Turn, encoded

REASONING = ("reasoning_content", "reasoning")  # llama.cpp's and older vLLM's, newer vLLM's
REASONS = {"length": "length"}  # anything else is ``stop``, calls of tools as well
NANO = 1_000_000_000
Object = dict[str, Any]


class Piece(Protocol):
    """How a route puts a piece of an answer."""

    def __call__(self, text: str, thinking: str = "", calls: list[Object] | None = None) -> Object:
        """The members of one piece of an answer; ``calls`` are calls of tools."""

    def __hash__(self) -> int:
        """A function has one: what is made of it once may be kept by it."""


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
    """When what happened, on a clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._sent: float | None = None
        self._first: float | None = None

    def sent(self) -> None:
        """The engine has the request: until now it was waited for, or loaded."""
        if self._sent is None:
            self._sent = self._now()

    def answered(self) -> None:
        """The first text has come."""
        if self._first is None:
            self._first = self._now()

    def told(self, engine: Mapping[str, Any]) -> dict[str, int]:
        """The durations in nanoseconds; of reading and writing the engine's own word, if it has one (llama.cpp's)."""
        end = self._now()
        sent = end if self._sent is None else self._sent
        first = sent if self._first is None else self._first  # of an answer that came whole, all of it was the writing
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
    """Never 0: programs divide by them."""
    return max(1, round(seconds * NANO))


class Reply:
    """One answer, as it comes."""

    def __init__(
        self, piece: Piece, timing: Timing, *, thinking: bool = True, said: tuple[Turn, ...] | None = None
    ) -> None:
        """``thinking``: whether it is shown. ``said``: the conversation that the answer ends, None to keep none."""
        self.timing = timing
        self.heard: list[str] | None = None if said is None else []  # the answer's text, for ``context``
        self.piece = piece
        self.plain = False  # the last event had a text, and no more than that is kept of it
        self._thinking = thinking
        self._said = said
        self._calls: dict[int, Object] = {}
        self._finish = ""
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}

    def event(self, event: Object) -> Iterator[Object]:
        """What one event of a stream becomes: nothing, or one object."""
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
        """A piece without text: every client takes it, for engines send such ones, too."""
        return self.piece("")

    def gathered(self) -> Iterator[Object]:
        """The calls of tools, once all of them has come. Arguments that are no object are told as the text they are."""
        calls, broken = self._called()
        if calls or broken:
            yield self.piece(broken, "", calls)

    def last(self) -> Object:
        """The object that closes a stream: an empty piece, with the durations and counts."""
        return {**self.piece(""), **self._done()}

    def whole(self, answer: Object) -> Object:
        """What an answer that is not a stream becomes."""
        self._note(answer)
        choice = _choice(answer)
        text, thinking, calls = self._parts(choice.get("message") or choice)
        for number, call in enumerate(calls):
            self._gather({"index": number, **call})
        made, broken = self._called()
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
        if self.heard is not None and text:
            self.heard.append(text)
        thinking = next((message[name] for name in REASONING if message.get(name)), "") if self._thinking else ""
        return text, thinking, message.get("tool_calls") or []

    def _gather(self, piece: Object) -> None:
        call = self._calls.setdefault(piece.get("index") or 0, {"id": "", "name": "", "arguments": ""})
        function = piece.get("function") or {}
        call["id"] = call["id"] or piece.get("id") or ""
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def _called(self) -> tuple[list[Object], str]:
        """The calls that were gathered, and the text of those whose arguments are no object."""
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
        durations = self.timing.told(self._timings)
        prompt = self._usage.get("prompt_tokens", self._timings.get("prompt_n"))
        answer = self._usage.get("completion_tokens", self._timings.get("predicted_n"))
        counts = {"prompt_eval_count": prompt, "eval_count": answer}
        done: Object = {"done": True, "done_reason": REASONS.get(self._finish, "stop")}
        done |= durations | {name: count for name, count in counts.items() if isinstance(count, int)}
        if self._said is not None and self.heard is not None:
            context = encoded([*self._said, ("assistant", "".join(self.heard))])
            done |= {} if context is None else {"context": context}
        return done


def _choice(event: Object) -> Object:
    """The one choice there is; llama.cpp's route for text between has its own form, without choices."""
    choices = event.get("choices")
    if isinstance(choices, list):
        return choices[0] if choices and isinstance(choices[0], dict) else {}
    return event


def _logprobs(choice: Object) -> list[Object]:
    """Chat's list as it is; of /v1/completions, whose form is three lists, the same."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return []
    if isinstance(content := found.get("content"), list):
        return content
    tokens, values, tops = (found.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    told = [{"token": token, "logprob": value} for token, value in zip(tokens, values, strict=False)]
    for one, top in zip(told, tops, strict=False):
        one["top_logprobs"] = [{"token": token, "logprob": value} for token, value in (top or {}).items()]
    return told


def error_text(answer: Any, otherwise: str) -> str:
    """What an engine's or our own error in OpenAI's form says."""
    told = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(told, dict):
        told = told.get("message") or told.get("detail")
    return told if isinstance(told, str) and told else otherwise
