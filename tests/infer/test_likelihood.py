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


def test_a_sample_may_have_no_options_and_each_needs_a_list_of_texts() -> None:
    session = tiny_session()
    samples = [Sample([Message("user", text)]) for text in WORDS[:3]]
    assert session.loglikelihood(samples[:1], [[]]) == [[]]
    some = session.loglikelihood(samples, [[], ["a", "a", "a red", "a red cat"], []])
    assert some[0] == some[2] == [] and some[1][0].total == pytest.approx(some[1][1].total, abs=1e-4)
    alone = session.loglikelihood(samples[1:2], [["a red", "a red cat"]])[0]
    assert [one.total for one in some[1][2:]] == pytest.approx([one.total for one in alone], abs=1e-4)
    for wrong in ([], ["a"] * 3, "abc", None, [["a"]] * 4, [[5]] * 3, [[None]] * 3, [{"a"}] * 3):
        with pytest.raises(UserError, match="options: expected a list of texts for each of 3 samples, found"):
            session.loglikelihood(samples, wrong)
    with pytest.raises(UserError, match=r"takes \d+ positions .* the LLM has 2048"):
        session.loglikelihood(samples[:1], [["a " * 3000]])
