"""LangChain's integration for OpenAI."""

from common import BASE, CHAT, EMBED, QUESTION, TOOLS, WEATHER, about_paris, ended, refused, run, true
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import NotFoundError

AT = {"base_url": f"{BASE}/v1", "api_key": "none", "max_retries": 0}
model = ChatOpenAI(model=CHAT, temperature=0, max_tokens=24, **AT)


def chat() -> None:
    about_paris(str(model.invoke(QUESTION).content))


def stream() -> None:
    about_paris("".join(str(chunk.content) for chunk in model.stream(QUESTION)))


def tools() -> None:
    bound = ChatOpenAI(model=TOOLS, temperature=0, max_tokens=200, **AT).bind_tools([WEATHER], tool_choice="weather")
    answer = bound.invoke("Weather in Paris?")
    calls = [*answer.tool_calls, *answer.invalid_tool_calls]  # a model of random weights makes no sound arguments
    true(calls and calls[0]["name"] == "weather", "no call of the tool")


def embeddings() -> None:
    found = OpenAIEmbeddings(model=EMBED, check_embedding_ctx_length=False, **AT).embed_documents(["a cat", "a couch"])
    true(len(found) == 2 and len(found[0]) > 100, "no embeddings")


def cancel() -> None:
    events = ChatOpenAI(model=CHAT, max_tokens=4000, **AT).stream(QUESTION)
    next(events)
    events.close()
    ended()


def errors() -> str:
    return refused(lambda: ChatOpenAI(model="nobody", **AT).invoke(QUESTION), NotFoundError, "nobody")


run("langchain-openai", {"chat": chat, "stream": stream, "tools": tools, "embeddings": embeddings,
                         "cancel": cancel, "errors": errors})  # fmt: skip
