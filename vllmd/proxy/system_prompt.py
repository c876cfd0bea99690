"""A system prompt for requests that have none, in the form that each route has for it.

Chat has it as the first of its ``messages``; Anthropic's messages as ``system``, and OpenAI's responses as
``instructions``. Other routes have none. A client that sends a prompt of its own keeps it.
"""

from __future__ import annotations

import json
import re

from vllmd.frozen import frozen

CHAT = ("/v1/chat/completions", "/v1/chat/completions/render", "/v1/chat/completions/input_tokens", "/apply-template")
MEMBERS = {
    "/v1/messages": "system",
    "/v1/messages/count_tokens": "system",
    "/v1/messages/render": "system",
    "/v1/responses": "instructions",
    "/v1/responses/render": "instructions",
    "/v1/responses/input_tokens": "instructions",
}
MESSAGES = re.compile(rb'"(?:[^"\\]|\\.)*"[ \t\r\n]*:[ \t\r\n]*\[[ \t\r\n]*')
# In sound JSON this cannot stand inside a string: its quotes would be escaped there.
PROMPTED = re.compile(rb'"role"[ \t\r\n]*:[ \t\r\n]*"(?:system|developer)"')


@frozen
class Prompt:
    """The system prompt ``text`` for requests of a route."""

    text: str
    route: str

    def before(self, members: dict[str, bytes | memoryview]) -> dict[str, bytes | memoryview]:
        """The members of a request, each whole (``"key": value``), with the prompt where they have none."""
        name = MEMBERS.get(self.route)
        if name is not None:
            own = f"{json.dumps(name)}:{json.dumps(self.text)}".encode()
            return members if name in members else {**members, name: own}
        messages = members.get("messages")
        if self.route not in CHAT or messages is None or PROMPTED.search(messages):
            return members
        start = MESSAGES.match(messages)
        if start is None:  # no list: the engine says so
            return members
        first = json.dumps({"role": "system", "content": self.text}).encode()
        comma = b"" if bytes(messages[start.end() : start.end() + 1]) == b"]" else b","
        return {**members, "messages": b"".join((messages[: start.end()], first, comma, messages[start.end() :]))}
