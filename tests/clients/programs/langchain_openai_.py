"""LangChain's integration for OpenAI."""

from common import BASE, CHAT, EMBED, QUESTION, TEXTS, TOOLS, WEATHER, about_paris, alike, ended, refused, run, true
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import NotFoundError

AT = {"base_url": f"{BASE}/v1", "api_key": "none", "max_retries": 0}
model = ChatOpenAI(model=CHAT, temperature=0, max_tokens=24, **AT)


def chat() -> None:
    about_paris(str(model.invoke(QUESTION).content))


def stream() -> None:
    about_paris("".join(str(chunk.content) for chunk in model.stream(QUESTION)))


def tools() -> None:
    bound = ChatOpenAI(model=TOOLS, temperature=1, max_tokens=1500, **AT).bind_tools(
        [WEATHER], tool_choice="weather", strict=True
    )
    answer = bound.invoke("Weather in Paris?")
    true(answer.tool_calls and answer.tool_calls[0]["args"] == {"place": "Paris"}, "no call of the tool")


def embeddings() -> None:
    alike(OpenAIEmbeddings(model=EMBED, check_embedding_ctx_length=False, **AT).embed_documents(TEXTS))


def cancel() -> None:
    events = ChatOpenAI(model=CHAT, max_tokens=4000, **AT).stream(QUESTION)
    next(events)
    events.close()
    ended()


def errors() -> str:
    return refused(lambda: ChatOpenAI(model="nobody", **AT).invoke(QUESTION), NotFoundError, "nobody")


run("langchain-openai", {"chat": chat, "stream": stream, "tools": tools, "embeddings": embeddings,
                         "cancel": cancel, "errors": errors})  # fmt: skip
