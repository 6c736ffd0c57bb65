"""Checkpoints in `llava-hf` layout, written by transformers alone: same logits, same answers, and back again."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import tinyllava
from tests.conftest import CLIP, LLAMA
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.data.sample import Message, Sample
from tinyllava.errors import UserError

# Of the shape that llava-hf publishes: content is a list, pictures come first in their turn, answers are marked.
CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers writes it, with padded vocabulary rows."""
    texts = [Sample([Message("user", f"<image>\n{QUESTION}"), Message("assistant", "A red cat.")], ["x"])] * 5
    tokenizer = build_tiny(samples=texts).tokenizer
    text = {**LLAMA, "vocab_size": len(tokenizer) + 6, "tie_word_embeddings": False}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{key: value for key, value in CLIP.items() if key != "model_type"}),
        text_config=LlamaConfig(**{key: value for key, value in text.items() if key != "model_type"}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    config.text_config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(images, tokenizer, 8, "default", CHAT, num_additional_image_tokens=1)
    directory = tmp_path_factory.mktemp("llava-hf")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def answer_with_transformers(directory: Path, picture: Path) -> tuple[torch.Tensor, str]:
    """Logits of the prompt and the greedy answer, through transformers alone."""
    processor = AutoProcessor.from_pretrained(directory, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return model(**inputs).logits, processor.tokenizer.decode(made, skip_special_tokens=True).strip()


def test_it_loads_with_the_same_logits_and_answers(published: Path, pictures: Path) -> None:
    logits, answer = answer_with_transformers(published, pictures / "3.png")
    session = tinyllava.load(published)
    sample = Sample([Message("user", f"<image>{QUESTION}")], [str(pictures / "3.png")])
    prompt = session.template.encode_prompt(sample, session.tokenizer)
    assert prompt["text"] == f"USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = session.processor(images=Image.open(pictures / "3.png"), text=prompt["text"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(session.model(**inputs).logits, logits)
    assert session.chat(QUESTION, str(pictures / "3.png"), max_new_tokens=8) == answer


def test_its_template_is_refused_for_training_and_another_one_taken(
    published: Path, pictures: Path, tmp_path: Path
) -> None:
    session = tinyllava.load(published)
    sample = Sample([Message("user", f"<image>{QUESTION}"), Message("assistant", "A cat.")], ["x"])
    with pytest.raises(UserError, match="ends its prompt with"):
        session.template.encode(sample, session.tokenizer)
    session = tinyllava.load(published, template="llama")
    template = session.template
    encoded = template.encode(sample, session.tokenizer)
    learned = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
    assert session.tokenizer.decode(learned) == " A cat.</s>"
    checkpoint.save(session.vlm, tmp_path / "again")
    again = tinyllava.load(tmp_path / "again")
    asked = [str(pictures / "3.png")]
    assert again.chat(QUESTION, asked, max_new_tokens=8) == session.chat(QUESTION, asked, max_new_tokens=8)
    _, answer = answer_with_transformers(tmp_path / "again", pictures / "3.png")
    assert again.conversation.messages[-1].text == answer
    with pytest.raises(UserError, match="carries its own template"):
        tinyllava.load(tmp_path / "again", template="phi")
