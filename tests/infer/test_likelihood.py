"""Log-likelihoods of given answers: those of a plain forward pass, whatever shares a batch with what."""

import random

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.conftest import SIGLIP
from tests.many_llms import LLMS, OTHERS, grouped
from tests.tiny_session import WORDS, tiny_session
from tinyllava import checkpoint
from tinyllava.data.images import open_image
from tinyllava.data.sample import Message, Sample
from tinyllava.errors import UserError
from tinyllava.infer import Session

OPTIONS = ["A", "a red cat", "two, three or four of them", "a red dog"]


def score_with_transformers(model, session: Session, sample: Sample, option: str) -> tuple[float, int]:
    """transformers' own model on the whole text: the sum over the ids that the option adds to the prompt."""
    text = session.template.encode_prompt(sample, session.tokenizer)["text"]
    expanded = [
        session.tokenizer(part.replace("<image>", "<image>" * 16), add_special_tokens=False)["input_ids"]
        for part in (text, f"{text} {option}")
    ]
    asked, whole = expanded
    assert whole[: len(asked)] == asked
    pixels = [session.processor.image_processor(open_image(image), return_tensors="pt") for image in sample.images]
    inputs = {"pixel_values": torch.cat([one["pixel_values"] for one in pixels])} if pixels else {}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole]), **inputs).logits[0].log_softmax(-1)
    added = range(len(asked), len(whole))
    return sum(logits[at - 1, whole[at]].item() for at in added), len(added)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_likelihoods_are_those_of_transformers(name: str, tmp_path) -> None:
    session = tiny_session((LLMS | OTHERS)[name], tower=SIGLIP)
    checkpoint.save(session.vlm, tmp_path / "c")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "c").eval()
    rng = random.Random(0)
    samples = rng.sample(grouped(2), 12)
    options = [rng.sample(OPTIONS, rng.randint(1, 4)) for _ in samples]
    wanted = [
        [score_with_transformers(model, session, sample, one) for one in own]
        for sample, own in zip(samples, options, strict=True)
    ]
    for size in (1, 5, None):
        found = session.loglikelihood(samples, options, batch_size=size)
        for one, own in zip(found, wanted, strict=True):
            assert [likelihood.total for likelihood in one] == pytest.approx([total for total, _ in own], abs=2e-4)
            assert [likelihood.tokens for likelihood in one] == [tokens for _, tokens in own]
    assert found[0][0].per_token == found[0][0].total / found[0][0].tokens


def test_what_has_no_likelihood_is_refused() -> None:
    session = tiny_session()
    with pytest.raises(UserError, match="an empty option has no likelihood"):
        session.loglikelihood([Sample([Message("user", WORDS[0])], [])], [["A", " "]])
