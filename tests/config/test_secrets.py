"""Which settings are secrets by their names, and how texts are told without them."""

from __future__ import annotations

import pytest

from vllmd.config.secrets import flags_with_secrets, flags_without_secrets, is_secret_name, kept_out, known_of
from vllmd.config.types import ModelConfig

SECRET = ["HF_TOKEN", "OPENAI_API_KEY", "--api-key", "key", "password", "AWS_SECRET_ACCESS_KEY", "--hf-token"]
PLAIN = [
    *("key_file", "--ssl-keyfile", "--max-num-batched-tokens", "tokenizer", "TOKENIZERS_PARALLELISM", "max_tokens"),
    *("key_env", "RAY_AUTH_TOKEN_PATH", "model", "--port", "cuda", "token_limit"),
]


@pytest.mark.parametrize("name", SECRET)
def test_what_is_called_like_a_secret_is_one(name: str) -> None:
    """In a variable, an option or a flag."""
    assert is_secret_name(name)


@pytest.mark.parametrize("name", PLAIN)
def test_where_one_is_and_how_many_tokens_is_none(name: str) -> None:
    """Hiding these would only make messages useless."""
    assert not is_secret_name(name)


def test_flags_keep_their_names_and_lose_their_secrets() -> None:
    """With an equals sign or the value behind; a flag at the end, or before another, has none."""
    argv = ("--api-key", "a-secret", "--port", "1", "--token=b-secret", "--key", "--verbose", "word", "--secret")
    assert flags_with_secrets(argv) == ["--api-key", "--token"]
    shown = ("--api-key", "*", "--port", "1", "--token=*", "--key", "--verbose", "word", "--secret")
    assert flags_without_secrets(argv, "*") == shown


def test_what_a_model_was_given_is_kept_out_of_what_it_says() -> None:
    """The longest first, so that nothing of one is left; short and ordinary values stay."""
    model = ModelConfig(
        "m",
        hf_token="hf_abcdef",
        env={"API_KEY": "hf_abcdef-and-more", "HF_HOME": "/data/hf", "X_KEY": "short"},
        options={"key": "remote-key", "nested": {"password": "inner-word"}, "health": "/health"},
        extra_args=("--api-key=in-the-args", "--dtype", "bfloat16"),
        command=("server", "--token", "on-the-line"),
    )
    said = " ".join([*known_of(model), "/data/hf", "short", "/health", "bfloat16"])
    assert kept_out(said, known_of(model)) == " ".join(["(hidden)"] * 6 + ["/data/hf", "short", "/health", "bfloat16"])
