"""`template: native`: in the chat format of each family's own tokenizer, labels are the answers and what ends them.

The formats are written here as the families' tokenizers render them; the tokenizers are byte-level BPEs with their
special tokens, and for Llama-2 and TinyLlama a SentencePiece one too, which writes spaces its own way.
"""

from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests.tiny_session import corpus
from tinyllava.data.sample import Message, Sample
from tinyllava.data.template import Template, add_image_token
from tinyllava.data.tokenizer import train_tokenizer
from tinyllava.errors import UserError

SENTENCEPIECE = Path(__file__).parents[1] / "parity" / "training" / "init"
EACH = "{%- for message in messages -%}"
END = "{%- endfor -%}"


def turns(begin: str, end: str, answer: str = "", system: str = "", prompt: str = "") -> str:
    """A format that writes every turn as begin + content + end, with the role in `begin`."""
    head = "{%- if messages[0].role != 'system' -%}" + system + "{%- endif -%}" if system else ""
    body = f"{{{{- {begin} + {answer or 'message.content'} + {end} -}}}}"
    return head + EACH + body + END + "{%- if add_generation_prompt -%}{{- " + prompt + " -}}{%- endif -%}"


IM = ["<|im_start|>", "<|im_end|>"]
CHATML = turns("'<|im_start|>' + message.role + '\n'", "'<|im_end|>\n'", prompt="'<|im_start|>assistant\n'")
ASSISTANT = "message.role == 'assistant'"
FORMATS = {  # the jinja, the special tokens, the EOS, what ends a turn
    "smollm2": (
        turns(
            "'<|im_start|>' + message.role + '\n'",
            "'<|im_end|>\n'",
            system="{{- '<|im_start|>system\nBe helpful<|im_end|>\n' -}}",
            prompt="'<|im_start|>assistant\n'",
        ),
        IM,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "qwen3": (  # an empty thought before the answer after the last question, none before earlier ones
        turns(
            "'<|im_start|>' + message.role + '\n'",
            "'<|im_end|>\n'",
            answer=f"('<think>\n\n</think>\n\n' if loop.last and {ASSISTANT} else '') + message.content",
            prompt="'<|im_start|>assistant\n'",
        ),
        [*IM, "<think>", "</think>"],
        "<|im_end|>",
        "<|im_end|>",
    ),
    "phi3": (  # closes the conversation with another token than a turn, and its special tokens take the line break
        turns("'<|' + message.role + '|>\n'", "'<|end|>\n'", prompt="'<|assistant|>\n'").replace(
            "{%- if add", "{%- if not add_generation_prompt -%}{{- eos_token -}}{%- endif -%}{%- if add"
        ),
        ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        "<|endoftext|>",
        "<|end|>",
    ),
    "gemma3": (  # the assistant is called model, answers are trimmed, BOS is written by the format
        "{{- bos_token -}}"
        + turns(
            f"'<start_of_turn>' + ('model' if {ASSISTANT} else message.role) + '\n'",
            "'<end_of_turn>\n'",
            answer="message.content | trim",
            prompt="'<start_of_turn>model\n'",
        ),
        ["<start_of_turn>", "<end_of_turn>"],
        "</s>",
        "<end_of_turn>",
    ),
    "olmo2": (  # roles are no special tokens
        "{{- bos_token -}}"
        + turns(
            "'<|' + message.role + '|>\n'",
            f"((eos_token if {ASSISTANT} else '') + ('' if loop.last and {ASSISTANT} else '\n'))",
            prompt="'<|assistant|>\n'",
        ),
        [],
        "</s>",
        "</s>",
    ),
    "llama2": (  # BOS before every question, no prompt of its own
        EACH
        + f"{{%- if {ASSISTANT} -%}}{{{{- ' ' + message.content + ' ' + eos_token -}}}}"
        + "{%- else -%}{{- bos_token + '[INST] ' + message.content + ' [/INST]' -}}{%- endif -%}"
        + END,
        [],
        "</s>",
        "</s>",
    ),
    "llama3": (
        "{{- bos_token -}}"
        + turns(
            "'<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'",
            "'<|eot_id|>'",
            answer="message.content | trim",
            prompt="'<|start_header_id|>assistant<|end_header_id|>\n\n'",
        ),
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "zephyr": (  # TinyLlama and StableLM-2 Zephyr: the prompt leaves the line break to the answer
        turns("'<|' + message.role + '|>\n'", "eos_token + '\n'", prompt="'<|assistant|>'"),
        [],
        "</s>",
        "</s>",
    ),
}


def tokenizer_of(family: str, *texts: Sample, pieces: bool = False):
    source, specials, eos, _ = FORMATS[family]
    if pieces:
        tokenizer = AutoTokenizer.from_pretrained(SENTENCEPIECE)
    else:
        tokenizer = train_tokenizer(Template.load("llama"), [*corpus(), *texts * 40], 400)
    swallow = family == "phi3"
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False, rstrip=swallow) for s in specials], True)
    tokenizer.eos_token, tokenizer.chat_template = eos, source
    add_image_token(tokenizer)
    return tokenizer


def conversation(*texts: str, system: str = "") -> Sample:
    said = [Message(("user", "assistant")[at % 2], text) for at, text in enumerate(texts)]
    return Sample([Message("system", system), *said] if system else said, ["x"] if "<image>" in texts[0] else [])


TALKS = [
    conversation("<image>\nWhat is in the picture?", "a red cat"),
    conversation("How many are there?", "two", "Sure?", "three or four,\nof them.", "And now?", "two"),
    conversation("<image>\nIs it so?", "It is: ☃ and é.", "Who says?", "USER: nobody [/INST]"),
]


@pytest.mark.parametrize(
    "family,pieces", [*((family, False) for family in FORMATS), ("llama2", True), ("zephyr", True)], ids=str
)
def test_labels_are_what_the_model_must_say_after_each_prompt(family: str, pieces: bool) -> None:
    tokenizer, native, end = tokenizer_of(family, pieces=pieces), Template.load("native"), FORMATS[family][3]
    assert native.get_end_of_turn(tokenizer) == end
    talks = TALKS if family == "llama2" else [*TALKS, conversation("What?", "a cat", system="Be brief.")]
    for talk in talks:
        encoded = native.encode(talk, tokenizer)
        ids, labels = encoded["input_ids"], encoded["labels"]
        served = native.get_chat_template(tokenizer)  # what is saved with it: with BOS, where the tokenizer wants one
        assert ids == tokenizer.apply_chat_template(talk.to_messages(), chat_template=served)["input_ids"]
        learned = [at for at, label in enumerate(labels) if label != -100]
        for at, message in enumerate(talk.messages):
            if message.role != "assistant":
                continue
            prompt = native.encode_prompt(Sample(talk.messages[:at], talk.images), tokenizer)["input_ids"]
            assert ids[: len(prompt)] == prompt
            said = len(prompt)
            while said < len(ids) and labels[said] != -100:
                said += 1
            answer = tokenizer.decode(ids[len(prompt) : said], clean_up_tokenization_spaces=False)
            thought = "<think>\n\n</think>\n\n" * (family == "qwen3" and at == len(talk.messages) - 1)
            assert answer.strip() == f"{thought}{message.text}{' ' * (family == 'llama2')}{end}"
            learned = learned[said - len(prompt) :]
        assert not learned


def test_a_format_that_cannot_be_split_says_what_to_do() -> None:
    """The remedy of each error names our own templates."""
    tokenizer = tokenizer_of("olmo2", conversation("Is it Amber or Cobalt?", "an Amber and a Cobalt one"))
    cases = {
        r"ends a turn with '\\n', which is not a special token": turns(
            "message.role + ': '", "'\n'", prompt="'assistant: '"
        ),
        "makes one token of the prompt's end": turns("message.role + ' '", "eos_token", prompt="'assistant '"),
        "rewrites earlier turns": turns(
            "'<|' + message.role + '|>\n'",
            "eos_token",
            answer=f"(message.content if loop.last or not {ASSISTANT} else '')",
            prompt="'<|assistant|>\n'",
        ),
    }
    for what, source in cases.items():
        tokenizer.chat_template = source
        with pytest.raises(UserError, match=what) as error:
            Template.load("native").encode(TALKS[1], tokenizer)
        assert "gemma, llama" in str(error.value) and len(str(error.value).splitlines()) <= 2
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"needs a tokenizer with a chat template.*gemma, llama"):
        Template.load("native").encode(TALKS[1], tokenizer)


def test_a_template_whose_end_token_the_tokenizer_lacks() -> None:
    """Ours fall back to the tokenizer's EOS; somebody else's format is refused."""
    tokenizer = tokenizer_of("olmo2")
    assert Template.load("qwen2_instruct").get_end_of_turn(tokenizer) == "</s>"
    tokenizer.chat_template = CHATML
    with pytest.raises(
        UserError, match=r"ends a turn with '<\|im_end\|>\\n', which is not a special token here.*gemma"
    ):
        Template.load("native").encode(TALKS[0], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"template 'qwen2_instruct' ends turns with the EOS token, but this tokenizer"):
        Template.load("qwen2_instruct").encode(TALKS[0], tokenizer)
