"""The model itself under transformers' `generate`, with every way of decoding, also where it is not a plain Llava."""

import pytest
import torch
from transformers import GenerationConfig

from tests.conftest import CLIP, PHI
from tests.tiny_session import question, tiny_session

MODELS = {"plain": {}, "tiles": {"vision_tower": {"config": CLIP, "tiles": 2}}, "phi": {"llm": PHI}}
SAMPLE = question(1, images=2)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_decoding_works_on_the_model(name: str) -> None:
    session = tiny_session(**MODELS[name])
    model, tokenizer = session.model, session.tokenizer
    text = session.template.encode_prompt(SAMPLE, tokenizer)["text"]
    inputs = session.processor(images=SAMPLE.images, text=text, return_tensors="pt", add_special_tokens=False)
    start = inputs["input_ids"].shape[1]

    def generate(**options: object) -> list[list[int]]:
        torch.manual_seed(0)
        limit = {} if "generation_config" in options else {"max_new_tokens": 8}
        made = model.generate(**inputs, **limit, **options)
        return getattr(made, "sequences", made)[:, start:].tolist()

    (greedy,) = generate()
    assert session.reader.decode(greedy) == session.generate([SAMPLE], max_new_tokens=8)[0]
    for same in (
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": model},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        assert generate(**same) == [greedy], same
    assert generate(generation_config=GenerationConfig(max_new_tokens=3)) == [greedy[:3]]
    sampled = generate(do_sample=True, num_return_sequences=3)
    assert len(sampled) == 3 and len({tuple(row) for row in sampled}) > 1
    assert len(generate(num_beams=3, num_return_sequences=3)) == 3
    stop = next(text for text in map(tokenizer.decode, greedy[:7]) if text.isascii() and text.strip())
    assert len(generate(stop_strings=[stop], tokenizer=tokenizer)[0]) < 8
