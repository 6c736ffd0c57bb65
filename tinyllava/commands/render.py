"""Draw what `tinyllava look` shows: a sample's text with supervised tokens in green, and a histogram of lengths."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from tinyllava.data.labels import IGNORE
from tinyllava.data.sample import IMAGE_TOKEN


def colour_tokens(
    input_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: Any,
    image_token_id: int,
    image_tokens: Sequence[int] = (),
) -> Text:
    """Colour a sample's text: supervised tokens are green, the rest is dim, and an image is `<image x 729>`.

    Line breaks are visible. image_tokens: the number of tokens of each image, to separate neighbouring images.
    """
    text, at, counts = Text(), 0, list(image_tokens)
    ids, supervised = [int(i) for i in input_ids], [int(label) != IGNORE for label in labels]
    for (is_image, is_supervised), run in groupby(
        zip(ids, supervised, strict=True), lambda pair: (pair[0] == image_token_id, pair[1])
    ):
        length = len(list(run))
        if is_image:
            while length > 0:
                count = counts.pop(0) if counts else length
                text.append(f"{IMAGE_TOKEN[:-1]} x {count}>", style="cyan")
                at, length = at + count, length - count
        else:
            piece = _decode_after(ids[max(at - 1, 0) : at], ids[at : at + length], tokenizer)
            text.append(piece.replace("\n", "↵\n"), style="bold green" if is_supervised else "dim")
        at += length
    return text


def _decode_after(before: list[int], ids: list[int], tokenizer: Any) -> str:
    """Decode `ids` after the ids `before`. Decoded alone, they would lose a SentencePiece tokenizer's leading space."""
    head = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(before + ids, clean_up_tokenization_spaces=False)
    return whole.removeprefix(head) if whole.startswith(head) else tokenizer.decode(ids)


def draw_histogram(lengths: Sequence[int] | np.ndarray, width: int = 40, rows: int = 10) -> str:
    """Draw a histogram of lengths as lines of text. The longest bar has `width` characters."""
    lengths = np.asarray(lengths)
    low, high = int(lengths.min()), int(lengths.max())
    step = max(1, -(-(high - low + 1) // rows))
    counts = np.bincount((lengths - low) // step)
    digits = len(str(low + step * len(counts)))
    lines = []
    for number, count in enumerate(counts):
        begin = low + number * step
        bar = "█" * round(width * count / counts.max()) or ("▏" if count else "")
        span = f"{begin:>{digits}} - {begin + step - 1:>{digits}}" if step > 1 else f"{begin:>{digits}}"
        lines.append(f"{span}  {bar} {count:,}")
    return "\n".join(lines)
