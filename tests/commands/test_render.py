"""`tinyllava look` colours tokens correctly, and its histogram counts every sample once."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinyllava.commands.render import colour_tokens, draw_histogram
from tinyllava.data.labels import IGNORE
from tinyllava.data.sample import Sample
from tinyllava.data.template import Template, add_image_token, image_token_id
from tinyllava.data.tokenizer import train_tokenizer


def train_sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: the space before a word is a part of it, and is dropped at the beginning of a text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(
        ["USER: what is it? ASSISTANT: a red cat\n."] * 9, trainers.BpeTrainer(special_tokens=specials)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    add_image_token(tokenizer)
    return tokenizer


def train_bytelevel() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(Template.load("llama"), [], 300)
    add_image_token(tokenizer)
    return tokenizer


@pytest.mark.parametrize("tokenizer", [train_sentencepiece(), train_bytelevel()], ids=["sentencepiece", "bytelevel"])
def test_supervised_tokens_are_green(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}]}
    record["conversations"] += [{"from": "gpt", "value": "a red cat"}, {"from": "human", "value": "what?"}]
    record["conversations"] += [{"from": "gpt", "value": "it"}]
    encoded = Template.load("llama").encode(Sample.from_llava(record), tokenizer)
    image = image_token_id(tokenizer)
    at = encoded["input_ids"].index(image)
    ids = encoded["input_ids"][:at] + [image] * 9 + encoded["input_ids"][at + 1 :]
    labels = encoded["labels"][:at] + [IGNORE] * 9 + encoded["labels"][at + 1 :]

    text = colour_tokens(ids, labels, tokenizer, image)
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == [" a red cat</s>", " it</s>"]
    assert "USER: <image x 9>" in text.plain and text.plain.count("<image") == 1
    if "\n" in tokenizer.decode(ids):
        assert "↵\n" in text.plain


def test_neighbouring_images_are_separate() -> None:
    tokenizer = train_bytelevel()
    image = image_token_id(tokenizer)
    assert colour_tokens([image] * 6, [IGNORE] * 6, tokenizer, image).plain == "<image x 6>"
    assert colour_tokens([image] * 6, [IGNORE] * 6, tokenizer, image, [3, 3]).plain == "<image x 3><image x 3>"


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 2, 3, 3], list(range(10, 2000, 7))])
def test_a_histogram_counts_every_sample_once(lengths: list[int]) -> None:
    lines = draw_histogram(lengths, width=30).splitlines()
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == len(lengths)
    assert len(lines) <= 10
    assert max(line.count("█") for line in lines) == 30
    assert str(min(lengths)) in lines[0] and (
        len(lengths) == 1 or lengths[-1] <= int(lines[-1].split("  ")[-2].split()[-1])
    )
