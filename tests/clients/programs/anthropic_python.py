"""anthropic, Anthropic's Python library."""

from anthropic import Anthropic, NotFoundError
from common import BASE, CHAT, IMAGES, PIXEL, QUESTION, TOOLS, WEATHER, about_paris, ended, refused, run, sees, true

client = Anthropic(base_url=BASE, api_key="none", max_retries=0, timeout=120)
COLD = {"extra_body": {"temperature": 0}}  # newer versions have no argument for it
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {
    "name": WEATHER["name"],
    "description": WEATHER["description"],
    "strict": True,
    "input_schema": WEATHER["parameters"],
}


def listed() -> None:
    found = {model.id: model for model in client.models.list()}
    true(found[CHAT].display_name and found[CHAT].type == "model", "no display name or type")


def chat() -> None:
    answer = client.messages.create(model=CHAT, messages=MESSAGES, max_tokens=24, **COLD)
    about_paris(answer.content[0].text)
    true(answer.model == CHAT and answer.usage.output_tokens > 0, "model or usage is wrong")


def count() -> None:
    true(client.messages.count_tokens(model=CHAT, messages=MESSAGES).input_tokens > 5, "too few tokens")


def stream() -> None:
    with client.messages.stream(model=CHAT, messages=MESSAGES, max_tokens=24, **COLD) as events:
        about_paris(events.get_final_text())


def tools() -> None:
    answer = client.messages.create(
        model=TOOLS, messages=[{"role": "user", "content": "Weather in Paris?"}], max_tokens=1500,
        tools=[TOOL], tool_choice={"type": "tool", "name": "weather"},
    )  # fmt: skip
    true(
        any(part.type == "tool_use" and part.input == {"place": "Paris"} for part in answer.content),
        "no call of the tool",
    )


def images() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    sees(
        client.messages.create(model=IMAGES, max_tokens=8, messages=[{"role": "user", "content": content}])
        .content[0]
        .text
    )


def cancel() -> None:
    with client.messages.stream(model=CHAT, messages=MESSAGES, max_tokens=4000) as events:
        next(iter(events.text_stream))
    ended()


def errors() -> str:
    ask = lambda: client.messages.create(model="nobody", messages=MESSAGES, max_tokens=8)  # noqa: E731
    return refused(ask, NotFoundError, "nobody")


run("anthropic", {"list": listed, "chat": chat, "count tokens": count, "stream": stream, "tools": tools,
                  "images": images, "cancel": cancel, "errors": errors})  # fmt: skip
