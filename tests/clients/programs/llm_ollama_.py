"""llm with its plug-in for Ollama."""

import os
import tempfile

os.environ["LLM_USER_PATH"] = tempfile.mkdtemp()

from common import BASE, CHAT, EMBED, QUESTION, TEXTS, about_paris, alike, ended, run, true

os.environ["OLLAMA_HOST"] = BASE

import llm


def listed() -> None:
    true(f"ollama/{CHAT}:latest" in [model.model_id for model in llm.get_models()], "the model is not in the list")


def chat() -> None:
    about_paris(llm.get_model(f"ollama/{CHAT}").prompt(QUESTION, stream=False, temperature=0, num_predict=24).text())


def stream() -> None:
    about_paris("".join(llm.get_model(f"ollama/{CHAT}").prompt(QUESTION, temperature=0, num_predict=24)))


def embeddings() -> None:
    alike([*llm.get_embedding_model(f"ollama/{EMBED}:latest").embed_multi(TEXTS)])


def cancel() -> None:
    answer = iter(llm.get_model(f"ollama/{CHAT}").prompt(QUESTION, num_predict=4000))
    next(answer)
    answer.close()
    ended()


run("llm-ollama", {"list": listed, "chat": chat, "stream": stream, "embeddings": embeddings, "cancel": cancel})
