"""Special tokens of a tokenizer: `<image>`, BOS, and the space that some tokenizers put before a text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import AddedToken

from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.errors import UserError


def add_image_token(tokenizer: Any) -> int:
    """Make `<image>` one special token and return its id. Embeddings without a row for this id must be resized."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return image_token_id(tokenizer)


def add_own_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add a recipe's own tokens, such as `<loc_1>`, and return the ids of those that the tokenizer did not have.

    They are part of answers. So they are not `special`: decoding would leave them out. Raises UserError for a text that
    cannot be such a token, or already is another one.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for token in tokens:
        if token != token.strip() or not token or IMAGE_TOKEN in token or tokens.count(token) > 1:
            reason = f"each is listed once, with no spaces around it and no {IMAGE_TOKEN} in it"
        elif added[token].special if token in added else has_token(tokenizer, token):
            reason = "the tokenizer has this token already"
        else:
            continue
        raise UserError(f"model.add_tokens: cannot add {token!r}: {reason}.")
    new = [token for token in tokens if token not in added]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in new])
    return tokenizer.convert_tokens_to_ids(new)


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
