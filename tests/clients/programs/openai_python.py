"""openai, OpenAI's Python library."""

from common import (
    BASE,
    CHAT,
    EMBED,
    IMAGES,
    PICTURE,
    QUESTION,
    TEXTS,
    TOOLS,
    WEATHER,
    about_paris,
    alike,
    ended,
    refused,
    run,
    sees,
    true,
)
from openai import NotFoundError, OpenAI

client = OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0, timeout=120)
MESSAGES = [{"role": "user", "content": QUESTION}]


def listed() -> None:
    true(CHAT in [model.id for model in client.models.list()], "the model is not in the list")


def chat() -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=24, temperature=0)
    about_paris(answer.choices[0].message.content)
    true(answer.model == CHAT and answer.usage.total_tokens > 0, "model or usage is wrong")


def responses() -> None:
    about_paris(client.responses.create(model=CHAT, input=QUESTION, max_output_tokens=24, temperature=0).output_text)


def stream() -> None:
    events = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(events)
    about_paris("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
    true(chunks[-1].usage is not None, "no usage at the end")


def tools() -> None:
    answer = client.chat.completions.create(
        model=TOOLS, messages=[{"role": "user", "content": "Weather in Paris?"}], max_tokens=1500, temperature=1,
        tools=[{"type": "function", "function": WEATHER}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )  # fmt: skip
    true(answer.choices[0].message.tool_calls[0].function.arguments.replace(" ", "") == '{"place":"Paris"}', "no call")


def images() -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    sees(
        client.chat.completions.create(model=IMAGES, messages=[{"role": "user", "content": content}])
        .choices[0]
        .message.content
    )


def embeddings() -> None:
    alike([each.embedding for each in client.embeddings.create(model=EMBED, input=TEXTS).data])


def cancel() -> None:
    with client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=4000, stream=True) as events:
        next(iter(events))
    ended()


def errors() -> str:
    return refused(lambda: client.chat.completions.create(model="nobody", messages=MESSAGES), NotFoundError, "nobody")


run("openai", {"list": listed, "chat": chat, "responses": responses, "stream": stream, "tools": tools,
               "images": images, "embeddings": embeddings, "cancel": cancel, "errors": errors})  # fmt: skip
