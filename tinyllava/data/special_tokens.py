"""Special tokens of a tokenizer: `<image>`, BOS, and the space that some tokenizers put before a text."""

from functools import lru_cache
from typing import Any

from transformers import AddedToken

from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.errors import UserError


def add_image_token(tokenizer: Any) -> int:
    """Make `<image>` one special token and return its id. Embeddings without a row for this id must be resized."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return image_token_id(tokenizer)


def image_token_id(tokenizer: Any) -> int:
    """The id of `<image>`. Raises UserError for a tokenizer without it."""
    if not has_token(tokenizer, IMAGE_TOKEN):
        raise UserError(f"the tokenizer has no {IMAGE_TOKEN} token. Call `add_image_token(tokenizer)` first.")
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def has_token(tokenizer: Any, token: str) -> bool:
    """Whether `token` has an id of its own."""
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id) or token == tokenizer.unk_token


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer begins every text with BOS. It is tested, because configs can be wrong."""
    bos = [tokenizer.bos_token_id]
    return tokenizer("a")["input_ids"][:1] == bos != tokenizer("a", add_special_tokens=False)["input_ids"][:1]


@lru_cache(maxsize=16)
def swallows_space(tokenizer: Any) -> bool:
    """Whether a leading space is lost, because the tokenizer puts a space before every text that has none."""
    return tokenizer(" a")["input_ids"] == tokenizer("a")["input_ids"]


def require_fast(tokenizer: Any) -> None:
    """Raise UserError for a slow tokenizer: it cannot tell which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"labels need the offsets of a fast tokenizer, and {type(tokenizer).__name__} is a slow one. "
            "Load its fast version."
        )
