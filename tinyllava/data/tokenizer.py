"""Train a tokenizer on training data, for an LLM that starts from random weights and has none of its own."""

import re
from collections.abc import Iterable, Sequence
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinyllava.data.sample import IMAGE_TOKEN, Sample
from tinyllava.data.template import Template

MOST_SAMPLES = 20_000  # enough for a small vocabulary; they take a few seconds to render


def train_tokenizer(
    template: Template, samples: Iterable[Sample], vocab_size: int, own_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` entries on the samples as `template` writes them.

    Every byte is in its alphabet, so it can encode any text. own_tokens: will be added later, so nothing is learned
    from them.
    """
    specials = ["<s>", "</s>", "<pad>", IMAGE_TOKEN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kwargs = {"special_tokens": specials, "initial_alphabet": alphabet, "show_progress": False}
    # A template renders only with a tokenizer, so the first training makes one of single bytes.
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=len(specials) + 256, **kwargs))
    bytes_only = _wrap(tokenizer)
    rendered = (template.render(sample, bytes_only)[0] for sample in islice(samples, MOST_SAMPLES))
    # These tokens are cut out of the texts: they must not become parts of other entries.
    pattern = re.compile("|".join(map(re.escape, [*specials, *own_tokens])))
    texts = (piece for text in rendered for piece in pattern.split(text) if piece)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **kwargs))
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
