"""The fixtures of the data tests, for `tinyllava data check`."""

from tests.data.conftest import folder, llava, tokenizer, write  # noqa: F401
