"""LiteLLM, with its provider for any server of OpenAI's API."""

from common import BASE, CHAT, EMBED, QUESTION, TEXTS, TOOLS, WEATHER, about_paris, alike, ended, refused, run, true
from litellm import NotFoundError, completion, embedding

AT = {"api_base": f"{BASE}/v1", "api_key": "none", "num_retries": 0, "max_retries": 0}
MESSAGES = [{"role": "user", "content": QUESTION}]


def chat() -> None:
    answer = completion(model=f"openai/{CHAT}", messages=MESSAGES, max_tokens=24, temperature=0, **AT)
    about_paris(answer.choices[0].message.content)


def stream() -> None:
    events = completion(model=f"openai/{CHAT}", messages=MESSAGES, max_tokens=24, temperature=0, stream=True, **AT)
    about_paris("".join(chunk.choices[0].delta.content or "" for chunk in events))


def tools() -> None:
    answer = completion(
        model=f"openai/{TOOLS}", messages=[{"role": "user", "content": "Weather in Paris?"}], max_tokens=1500,
        tools=[{"type": "function", "function": WEATHER}], temperature=1,
        tool_choice={"type": "function", "function": {"name": "weather"}}, **AT,
    )  # fmt: skip
    true("Paris" in answer.choices[0].message.tool_calls[0].function.arguments, "no call of the tool")


def embeddings() -> None:
    answer = embedding(model=f"openai/{EMBED}", input=TEXTS, encoding_format="float", **AT)
    alike([each["embedding"] for each in answer.data])


def cancel() -> None:
    events = completion(model=f"openai/{CHAT}", messages=MESSAGES, max_tokens=4000, stream=True, **AT)
    next(iter(events))
    events.completion_stream.close()
    ended()


def errors() -> str:
    return refused(lambda: completion(model="openai/nobody", messages=MESSAGES, **AT), NotFoundError, "nobody")


run("litellm", {"chat": chat, "stream": stream, "tools": tools, "embeddings": embeddings,
                "cancel": cancel, "errors": errors})  # fmt: skip
