"""LlamaIndex' integrations for Ollama."""

from common import BASE, CHAT, EMBED, QUESTION, TEXTS, about_paris, alike, ended, refused, run
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.llms.ollama import Ollama
from ollama import ResponseError

AT = {"base_url": BASE, "context_window": 4096, "request_timeout": 120}
MESSAGES = [ChatMessage(role="user", content=QUESTION)]
model = Ollama(model=CHAT, temperature=0, additional_kwargs={"num_predict": 24}, **AT)


def chat() -> None:
    about_paris(model.chat(MESSAGES).message.content)


def stream() -> None:
    about_paris("".join(str(chunk.delta or "") for chunk in model.stream_chat(MESSAGES)))


def embeddings() -> None:
    alike(OllamaEmbedding(model_name=EMBED, base_url=BASE).get_text_embedding_batch(TEXTS))


def cancel() -> None:
    events = Ollama(model=CHAT, additional_kwargs={"num_predict": 4000}, **AT).stream_chat(MESSAGES)
    next(iter(events))
    events.close()
    ended()


def errors() -> str:
    return refused(lambda: Ollama(model="nobody", **AT).chat(MESSAGES), ResponseError, "nobody")


run("llama-index-llms-ollama", {"chat": chat, "stream": stream, "embeddings": embeddings, "cancel": cancel,
                                "errors": errors})  # fmt: skip
