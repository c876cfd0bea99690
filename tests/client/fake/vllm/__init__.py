"""Stands for vLLM where none is installed: the classes that ModelManager and its users touch, without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class EngineArgs:
    model: str = "facebook/opt-125m"
    gpu_memory_utilization: float = 0.92
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False


@dataclass
class SamplingParams:
    max_tokens: int = 16


@dataclass
class CompletionOutput:
    text: str


@dataclass
class RequestOutput:
    prompt: object
    outputs: list[CompletionOutput] = field(default_factory=list)


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class LLM:
    """``EngineCore`` is a process of its own, as in vLLM, and one that ignores SIGTERM."""

    def __init__(self, model: str, **arguments: object) -> None:
        if "broken" in model:
            print("loading weights failed: no such file")
            raise ValueError(f"cannot load {model}")
        if "dies" in model:
            os.kill(os.getpid(), signal.SIGSEGV)
        self.arguments = arguments
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        self.core = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    def generate(self, prompts: object, params: object = None) -> list[RequestOutput]:
        if params == "slow":
            time.sleep(1)
        if params == "interrupt":  # Ctrl-C at the caller, whose pid is the prompt, in the middle of its call
            os.kill(int(str(prompts)), signal.SIGINT)
            time.sleep(600)
        if params == "hang":  # once the file that is the prompt is there
            Path(str(prompts)).touch()
            time.sleep(600)
        if params == "kill":  # the process whose pid is the prompt, in the middle of a call
            os.kill(int(str(prompts)), signal.SIGKILL)
            time.sleep(600)
        if params == "raise":
            raise Unpicklable("out", "of luck")
        return [RequestOutput(prompts, [CompletionOutput(f"{os.getpid()} {self.core.pid}")])]

    def chat(self, messages: object) -> list[RequestOutput]:
        return [RequestOutput(messages, [CompletionOutput(str(self.arguments))])]

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def lambda_result(self) -> object:
        return lambda: None
