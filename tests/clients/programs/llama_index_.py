"""LlamaIndex' integration for servers of OpenAI's API."""

from common import BASE, CHAT, QUESTION, about_paris, ended, refused, run
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import NotFoundError

AT = {"api_base": f"{BASE}/v1", "api_key": "none", "is_chat_model": True, "max_retries": 0}
MESSAGES = [ChatMessage(role="user", content=QUESTION)]
model = OpenAILike(model=CHAT, temperature=0, max_tokens=24, **AT)


def chat() -> None:
    about_paris(model.chat(MESSAGES).message.content)


def stream() -> None:
    about_paris("".join(str(chunk.delta or "") for chunk in model.stream_chat(MESSAGES)))


def cancel() -> None:
    events = OpenAILike(model=CHAT, max_tokens=4000, **AT).stream_chat(MESSAGES)
    next(iter(events))
    events.close()
    ended()


def errors() -> str:
    return refused(lambda: OpenAILike(model="nobody", **AT).chat(MESSAGES), NotFoundError, "nobody")


run("llama-index-llms-openai-like", {"chat": chat, "stream": stream, "cancel": cancel, "errors": errors})
