"""llm, the command line tool, through its Python side with a model of extra-openai-models.yaml."""

import os
import tempfile
from pathlib import Path

folder = tempfile.mkdtemp()
os.environ["LLM_USER_PATH"] = folder

from common import BASE, CHAT, QUESTION, about_paris, ended, refused, run  # noqa: E402

Path(folder, "extra-openai-models.yaml").write_text("".join(
    f'- {{model_id: {name}, model_name: {name}, api_base: "{BASE}/v1"}}\n' for name in (CHAT, "nobody")
))  # fmt: skip

import llm  # noqa: E402
from openai import NotFoundError  # noqa: E402


def chat() -> None:
    answer = llm.get_model(CHAT).prompt(QUESTION, stream=False, temperature=0, max_tokens=24, key="none")
    about_paris(answer.text())


def stream() -> None:
    about_paris("".join(llm.get_model(CHAT).prompt(QUESTION, temperature=0, max_tokens=24, key="none")))


def cancel() -> None:
    answer = iter(llm.get_model(CHAT).prompt(QUESTION, max_tokens=4000, key="none"))
    next(answer)
    answer.close()
    ended()


def errors() -> str:
    ask = lambda: llm.get_model("nobody").prompt(QUESTION, stream=False, key="none").text()  # noqa: E731
    return refused(ask, NotFoundError, "nobody")


run("llm", {"chat": chat, "stream": stream, "cancel": cancel, "errors": errors})
