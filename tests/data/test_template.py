"""Promises 1 and 2: labels are exact, training and serving see the same ids. Six formats, six kinds of tokenizer."""

import json
import pickle
import re
from functools import cache
from itertools import groupby
from pathlib import Path

import jinja2
import pytest
import sentencepiece
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils.chat_template_utils import _compile_jinja_template

import tinyllava.templates
from tinyllava.data.labels import mask
from tinyllava.data.sample import Message, Sample, SampleError
from tinyllava.data.special_tokens import adds_bos
from tinyllava.data.template import Template, add_image_token, image_token_id
from tinyllava.errors import UserError
from tinyllava.factory import Factory

FOLDER = Path(tinyllava.templates.__file__).parent
CHATS = ["phi", "llama", "gemma", "qwen2_base", "qwen2_instruct"]
ENDS = {"phi": "<|endoftext|>", "llama": "</s>", "gemma": "<eos>", "qwen2_base": "<|endoftext|>"}
ENDS |= {"qwen2_instruct": "<|im_end|>", "pretrain": "\n"}

# --- tokenizers: how text becomes ids differs in the prefix space, what joins a line break, BOS, and trimmed offsets

CORPUS = [
    "A chat between a curious user and an assistant. USER: What is this? ASSISTANT: A small red frog, and a kite.",
    "The answer to how many is forty two apples:\n\n- one\n- two\n\nUSER: is it so? ASSISTANT: It is, it's so.",
] * 20
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
QWEN = r"""'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CHATML = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


def byte_level(pre_tokenizer, post_processor, normalizer=None, **tokens) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder, bpe.post_processor = pre_tokenizer, decoders.ByteLevel(), post_processor
    if normalizer:
        bpe.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "special_tokens": SPECIALS, "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(**options))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens)


def sentence_piece(folder: Path, config: dict, **options) -> PreTrainedTokenizerFast:
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        **{"input": str(folder / "corpus.txt"), "model_prefix": str(folder / "tokenizer"), "model_type": "bpe"},
        **{"vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2},
        **{"remove_extra_whitespaces": False, "num_threads": 1, **options},
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def make(name: str, folder: Path):
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "phi":  # trims spaces from its offsets
        return byte_level(plain, processors.ByteLevel(trim_offsets=True), eos_token=SPECIALS[0], bos_token=SPECIALS[0])
    if name == "qwen":  # punctuation and line breaks after it are one piece; its vocabulary has a token of two breaks
        split = pre_tokenizers.Split(Regex(QWEN), "isolated")
        pieces = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        offsets = processors.ByteLevel(trim_offsets=False)
        tokenizer = byte_level(pieces, offsets, normalizers.NFC(), eos_token="<|im_end|>")
        tokenizer.chat_template = CHATML
        return tokenizer
    if name == "bos":  # byte-level with BOS and a prefix space
        bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))])
        spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return byte_level(spaced, processors.Sequence([processors.ByteLevel(), bos]), eos_token="</s>", bos_token="<s>")
    if name == "gemma":  # no prefix space, line breaks and runs of spaces are symbols of their own
        ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
        pieces = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
        symbols = {"user_defined_symbols": ["\n", "\n\n", "▁▁"], "add_dummy_prefix": False}
        names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}
        return sentence_piece(folder, {"tokenizer_class": "GemmaTokenizer", **names}, **ids, **pieces, **symbols)
    legacy = name == "llama_legacy"  # a `▁` after every special token, or only at the beginning
    return sentence_piece(folder, {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True})


TOKENIZERS = ["phi", "qwen", "bos", "gemma", "llama", "llama_legacy"]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(name) -> one of TOKENIZERS, with `<image>`."""

    @cache
    def load(name: str):
        tokenizer = make(name, tmp_path_factory.mktemp(name))
        add_image_token(tokenizer)
        return tokenizer

    return load


# --- conversations: what could shift a label


def conversation(*turns: str, system: str | None = None) -> Sample:
    messages = [Message(("user", "assistant")[at % 2], text) for at, text in enumerate(turns)]
    return Sample([Message("system", system), *messages] if system is not None else messages)


HARD = {
    "picture": conversation("<image>\nWhat is this?", "A small red frog."),
    "text only": conversation("Name a colour.", "Red."),
    "many turns": conversation("<image>\nHow many?", "42 apples.", "As list?", "\n- one\n- two\n", "Sure?", "It is."),
    "pictures anywhere": conversation("<image><image> Compare <image>", "One.", "And\n<image>", "Two.", "<image>", "3"),
    "empty answer": conversation("<image>\nAnything?", "", "Really?", ""),
    "empty question": conversation("", "A bell.", "<image>", "Another."),
    "spaces": conversation("  <image>  ", "  A leaf.  ", " ", " ", "\t", "\n\n", "\n", "\n A \n"),
    "unicode": conversation("<image>\n这是什么? 🎉", "这是一只猫 🐈。 Ça s'appelle — قطة 👩‍👧", "e?", "\u0301e\u0301"),
    "separators": conversation("<image> ASSISTANT: USER: ", "USER: hi ASSISTANT: hello", " ASSISTANT:", " ASSISTANT: "),
    "end tokens": conversation(
        "</s><image><|endoftext|>", "</s>, <eos>, <|im_end|> <|endoftext|>", "<s><bos>", "<s></s>"
    ),
    "system": conversation("<image>\nWhat?", "A kite.", system="Be brief."),
    "empty system": conversation("<image>\nWhat?", "A kite.", system=""),
    "jinja": conversation("{{ messages }} {% if %}<image>", "{% endgeneration %}{{ x }}"),
}


def captions(sample: Sample) -> Sample:
    """The same with a picture in every question, as the pretrain format asks."""
    mark = {True: "", False: "<image>"}
    return Sample([Message(m.role, m.text + mark[m.role != "user" or "<image>" in m.text]) for m in sample.messages])


def answers(sample: Sample) -> list[int]:
    return [at for at, message in enumerate(sample.messages) if message.role == "assistant"]


def bare(text: str) -> str:
    """Without white space, which decoders of SentencePiece and byte-level BPE treat differently."""
    return re.sub(r"[\s▁]", "", text)


@pytest.mark.parametrize("compat", [False, True], ids=["new", "compat"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["pretrain", *CHATS])
def test_supervised_is_what_follows_the_prompt(name, kind, compat, load):
    tokenizer, template = load(kind), Template.load(name, compat=compat)
    end = template.get_end_of_turn(tokenizer)
    for case, sample in HARD.items():
        sample = template.adapt(captions(sample) if name == "pretrain" else sample)
        encoded = template.encode(sample, tokenizer)
        ids, labels, at = encoded["input_ids"], encoded["labels"], 0
        assert len(ids) == len(labels) and all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        for turn in answers(sample):
            prompt = template.encode_prompt(Sample(sample.messages[:turn]), tokenizer)
            before = prompt["input_ids"]
            if compat and name == "pretrain":  # the original's prompt has a slot in the answer's place
                before = template.tokenize(prompt["text"].removesuffix(template.PRETRAIN_PROMPT), tokenizer)[0]
            assert ids[: len(before)] == before, case
            assert set(labels[at : len(before)]) <= {-100}, case
            at = next((later for later in range(len(before), len(ids)) if labels[later] == -100), len(ids))
            produced = tokenizer.decode(ids[len(before) : at], clean_up_tokenization_spaces=False)
            assert bare(produced) == bare(normalizers.NFC().normalize_str(sample.messages[turn].text + end)) or (
                bare(produced) == bare(sample.messages[turn].text + end)
            ), case
        assert set(labels[at:]) <= {-100}, case
        assert ids.count(image_token_id(tokenizer)) == sum(m.text.count("<image>") for m in sample.messages), case


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["pretrain", *CHATS])
def test_ids_are_those_of_apply_chat_template(name, kind, load, tmp_path):
    tokenizer, template = load(kind), Template.load(name)
    jinja = template.get_chat_template(tokenizer)
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    for sample in HARD.values():
        sample = captions(sample) if name == "pretrain" else sample
        ids = template.encode(sample, tokenizer)["input_ids"]
        assert ids == tokenizer.apply_chat_template(sample.to_messages(), chat_template=jinja)["input_ids"]
        assert (ids[0] == bos) == (bos is not None)
        question = sample.messages[: answers(sample)[-1]]
        prompt = template.encode_prompt(sample, tokenizer)
        rendered = {"chat_template": jinja, "add_generation_prompt": True}
        served = tokenizer.apply_chat_template(Sample(question).to_messages(), **rendered)
        assert prompt["input_ids"] == served["input_ids"] == tokenizer.encode(prompt["text"], add_special_tokens=False)
    # Saved and loaded again, it is the same template: BOS is not written twice.
    (tmp_path / "saved.jinja").write_text(jinja)
    assert Template.load(tmp_path / "saved.jinja").encode(sample, tokenizer)["input_ids"] == ids


def test_bos_once_exactly_where_the_tokenizer_adds_it(load):
    expected = {"phi": False, "qwen": False, "bos": True, "gemma": True, "llama": True, "llama_legacy": True}
    assert {kind: adds_bos(load(kind)) for kind in TOKENIZERS} == expected
    for kind, adds in expected.items():
        source = Template.load("phi").get_chat_template(load(kind))
        assert source.startswith("{{ bos_token }}") == adds
        ids = Template.load("phi").encode(HARD["picture"], load(kind))["input_ids"]
        assert ids.count(load(kind).bos_token_id) == adds or kind == "phi"  # whose BOS also ends turns


PARTS = {
    "picture first": ([{"type": "image"}, {"type": "text", "text": "What is this?"}], 1),
    "picture last": ([{"type": "text", "text": "What is this?"}, {"type": "image"}], 1),
    "between": ([{"type": "text", "text": "Look at "}, {"type": "image"}, {"type": "text", "text": " and tell"}], 1),
    "two": ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare <image>"}], 3),
    "text": ([{"type": "text", "text": "Hi, "}, {"type": "text", "text": "there"}], 0),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("name", ["pretrain", *CHATS])
def test_parts_and_text_give_the_same_ids(name, case, load):
    parts, images = PARTS[case]
    if name == "pretrain" and not images:
        parts, images = [*parts, {"type": "image"}], 1
    answer = [{"type": "text", "text": "A small "}, {"type": "text", "text": "frog."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    sample = Sample.from_messages({"messages": messages, "images": ["a.jpg"] * images})
    sample.check()
    for kind in ("llama", "qwen"):
        tokenizer, template = load(kind), Template.load(name)
        jinja = template.get_chat_template(tokenizer)
        ids = template.encode(sample, tokenizer)["input_ids"]
        assert ids == tokenizer.apply_chat_template(messages, chat_template=jinja)["input_ids"]
        assert ids.count(image_token_id(tokenizer)) == images


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in ["pretrain", *CHATS] for kind in TOKENIZERS), ("native", "qwen")]
)
def test_a_llava_processor_makes_the_same_ids(name, kind, load):
    tokenizer, template = load(kind), Template.load(name)
    square = {"height": 28, "width": 28}
    images = LlavaImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    processor = LlavaProcessor(images, tokenizer, patch_size=14, chat_template=template.get_chat_template(tokenizer))
    picture = Image.new("RGB", (40, 30), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is\nthis?"}]
    if name == "native":  # a text template knows no parts, so it gets the text and the picture apart
        content = "<image>\nWhat is\nthis?"
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A small red frog."}]
    if name == "native":
        text = processor.apply_chat_template(messages, tokenize=False)
        served = processor(images=picture, text=text, add_special_tokens=False)["input_ids"]
    else:
        served = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    served = served[0] if isinstance(served[0], list) else served
    mark = image_token_id(tokenizer)
    assert served.count(mark) == 4  # a picture of 28 x 28 in patches of 14
    collapsed = [token for token, run in groupby(served) for token in ([token] if token == mark else run)]
    sample = Sample.from_messages({"messages": messages, "images": [picture]})
    assert collapsed == template.encode(sample, tokenizer)["input_ids"]


def test_a_token_is_learned_where_it_begins():
    offsets = [(0, 3), (3, 5), (5, 5), (5, 8), (8, 9)]
    assert mask([1, 2, 3, 4, 5], offsets, [(2, 7)]) == [-100, 2, 3, 4, -100]
    assert mask([1, 2, 3, 4, 5], offsets, [(0, 3), (8, 9)]) == [1, -100, -100, -100, 5]


# --- the formats themselves


def test_the_text_of_each_format(load):
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    two = conversation("<image>\nOne?", "1.", "Two?", "2.")
    for name in CHATS:
        end, tokenizer = ENDS[name], load({"gemma": "gemma", "llama": "bos"}.get(name, "qwen"))
        text, spans = Template.load(name).render(two, tokenizer)
        bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
        assert text == f"{bos}{system} USER: <image>\nOne? ASSISTANT: 1.{end}USER: Two? ASSISTANT: 2.{end}"
        assert [text[begin:stop] for begin, stop in spans] == [f" 1.{end}", f" 2.{end}"]
        own = conversation("One?", "1.", system="Be brief.")
        assert Template.load(name).encode_prompt(own, tokenizer)["text"] == f"{bos}Be brief. USER: One? ASSISTANT:"
    text, spans = Template.load("pretrain").render(conversation("a <image> b <image>", "Frogs."), load("qwen"))
    assert (text, spans) == ("<image><image>Frogs.\n", [(14, 21)])


def test_the_five_chat_formats_differ_in_their_end_of_turn_only():
    files = {name: (FOLDER / f"{name}.jinja").read_text() for name in CHATS}
    bodies = {re.sub(r"(?m)\A.*\n", "", text).replace(f'"{ENDS[name]}"', "END", 1) for name, text in files.items()}
    assert len(bodies) == 1
    assert all(f'set end_of_turn = "{ENDS[name]}"' in text for name, text in files.items())


def test_vllm_will_hand_over_parts():
    """vLLM gives a template parts only where it sees a loop over `message.content`, `message` looping over messages."""
    for path in FOLDER.glob("*.jinja"):
        source = path.read_text()
        loops = list(_compile_jinja_template(source).environment.parse(source).find_all(jinja2.nodes.For))
        names = [loop.target.name for loop in loops if getattr(loop.iter, "name", None) == "messages"]
        iterated = [loop.iter for loop in loops if isinstance(loop.iter, jinja2.nodes.Getattr)]
        assert [(content.node.name, content.attr) for content in iterated] == [(names[0], "content")], path.name


def test_a_tokenizer_without_the_formats_end_of_turn_ends_turns_with_its_own(load):
    template = Template.load("llama")
    assert template.get_end_of_turn(load("llama")) == "</s>"
    assert template.get_end_of_turn(load("gemma")) == "<eos>"
    encoded = template.encode(HARD["many turns"], load("gemma"))
    assert encoded["labels"].count(load("gemma").eos_token_id) == 3
    assert "set end_of_turn = eos_token" in template.get_chat_template(load("gemma"))
    assert Template.load("llama", compat=True).get_end_of_turn(load("gemma")) == "</s>"  # as the original wrote it


def test_pretrain_wants_a_picture(load):
    with pytest.raises(SampleError, match="every user turn must hold an <image>"):
        Template.load("pretrain").encode(conversation("<image>", "A.", "And?", "B."), load("llama"))
    compat = Template.load("pretrain", compat=True).encode(conversation("Hi", "A.", "And?", "B."), load("llama"))
    assert compat["input_ids"].count(image_token_id(load("llama"))) == 2  # the original put one into every round


def test_compat_reads_a_conversation_as_the_original_did():
    template = Template.load("phi", compat=True)
    turns = ["  Look at <image> and <image> tell. ", "A.", "  Plain. ", "B."]
    adapted = template.adapt(conversation(*turns, system="Skipped."))
    assert [m.text for m in adapted.messages] == ["<image>\nLook at  and  tell.", "A.", "  Plain. ", "B."]
    assert template.compat and not Template.load("phi").compat
    with pytest.raises(UserError, match="not for 'native'"):
        Template.load("native", compat=True)


# --- native and other people's templates


def with_template(tokenizer, source: str):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.chat_template = source
    return tokenizer


def supervised(template: Template, sample: Sample, tokenizer) -> list[str]:
    labels = template.encode(sample, tokenizer)["labels"]
    runs = [list(run) for learned, run in groupby(labels, lambda label: label != -100) if learned]
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def test_native_finds_its_answers(load):
    tokenizer, native = load("qwen"), Template.load("native")
    assert native.get_chat_template(tokenizer) == CHATML
    assert native.get_end_of_turn(tokenizer) == "<|im_end|>"
    for sample in HARD.values():
        assert (
            native.encode(sample, tokenizer)["input_ids"]
            == tokenizer.apply_chat_template(sample.to_messages())["input_ids"]
        )
    assert supervised(native, HARD["picture"], tokenizer) == ["A small red frog.<|im_end|>"]
    assert supervised(native, HARD["empty answer"], tokenizer) == ["<|im_end|>"] * 2
    assert supervised(native, conversation("?", "A <|im_end|> b"), tokenizer) == ["A <|im_end|> b<|im_end|>"]
    # The line break that ends the prompt and the one that begins this answer are one token, which cannot be learned.
    assert len(tokenizer.encode("\n\n")) == 1
    assert supervised(native, conversation("?", "\n- one"), tokenizer) == ["- one<|im_end|>"]


THINKING = "{%- set thought = '<think>\n\n</think>\n\n' -%}" + CHATML.replace(
    "message.role + '\n' + message.content",
    "message.role + '\n' + (thought if loop.last and message.role == 'assistant' else '') + message.content",
)
REWRITING = CHATML.replace("message.content", "(message.content if loop.last else message.content[:2])")
TAGGED = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}
{%- else -%}{{ message.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
CLOSING = CHATML.replace(
    "{%- if add_generation_prompt",
    "{%- if not add_generation_prompt -%}<|endoftext|>{%- endif -%}\n{%- if add_generation_prompt",
)


def test_native_templates_with_ways_of_their_own(load):
    two = conversation("One?", "First.", "Two?", "Second.")
    native, plain = Template.load("native"), ["First.<|im_end|>", "Second.<|im_end|>"]
    # A thought before the last answer (Qwen3), the line break inside the mark (SmolLM3), a closing token (Phi-3).
    thinking = supervised(native, two, with_template(load("qwen"), THINKING))
    assert thinking == [plain[0], "<think>\n\n</think>\n\n" + plain[1]]
    assert supervised(native, two, with_template(load("qwen"), TAGGED)) == plain
    assert supervised(native, two, with_template(load("qwen"), CLOSING)) == plain
    with pytest.raises(UserError, match="rewrites earlier turns"):
        native.encode(two, with_template(load("qwen"), REWRITING))


REFUSED = {
    "has a syntax error": ("{% for message in messages %}\n{{ message }}\n{% endif %}", "line 3"),
    "misplaces a space": (TAGGED.replace("assistant\n' }}{%- endif", "assistant: ' }}{%- endif"), "Make them the same"),
    "ends its prompt with a space": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' A: ' }}{% else %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}",
        "makes one token of the prompt's end",
    ),
    "marks the last answer only": (
        TAGGED.replace("== 'assistant'", "== 'assistant' and loop.last"),
        "own {% generation %}",
    ),
    "reads another key": (TAGGED.replace("message.content +", "message.text | default('') +"), "own {% generation %}"),
    "ends with an unknown token": (TAGGED.replace("im_end", "eot"), "not a token of this tokenizer"),
    "ends with no token": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '. ' }}{% endfor %}",
        "not a special token",
    ),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "breaks out of no loop": ("{% break %}", "outside loop"),
    "includes another": ("{% include 'x' %}", "no loader"),
    "adds a number to a text": ("{{ messages[0].content + 1 }}", "cannot render it"),
    "encodes": ("{{ '\u00e9'.encode('ascii') }}", "can't encode"),
    "writes half an emoji": ("{{ '\\ud83d' }}", "surrogates not allowed"),
    "refuses": ("{{ raise_exception('no pictures please') }}", "no pictures please"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_template_that_could_not_be_exact_is_refused(fault, load, tmp_path):
    source, text = REFUSED[fault]
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        Template.load(path).encode(HARD["many turns"], load("qwen"))
    assert "mine.jinja" in str(caught.value)


def test_half_an_emoji_is_refused(load):
    for text in ("\ud83d", "a \udc80 b"):
        with pytest.raises(SampleError, match="the template cannot render it"):
            Template.load("phi").encode(conversation(text, "A."), load("phi"))
    with pytest.raises(SampleError, match="surrogates not allowed"):
        Template.load("llama", compat=True).encode_prompt(conversation("\ud83d"), load("llama"))


def test_a_space_that_is_trimmed_to_nothing_hides_no_label(load):
    """A byte-level tokenizer with a prefix space writes that space's offset behind the line break that follows it."""
    encoded = Template.load("pretrain").encode(conversation("<image>", ""), load("bos"))
    assert [label for label in encoded["labels"] if label != -100] == encoded["input_ids"][-2:]
    assert mask([7, 8, 9], [(0, 5), (6, 6), (5, 6)], [(5, 6)]) == [-100, 8, 9]


def test_paths_that_no_file_can_have_are_refused():
    for name in (
        "x" * 300,
        "x" * 300 + ".jinja",
        "a\0.jinja",
        "~nobody/a.jinja",
        ":",
        ".a:b",
        "a:",
        ":b",
        "a b:c",
        "..",
    ):
        with pytest.raises(UserError):
            Template.load(name)


def test_a_template_that_reads_content_as_parts_gives_the_same_ids_and_labels(load, tmp_path):
    image, text = "selectattr('type', 'eq', 'image')", "selectattr('type', 'eq', 'text')"
    written = f"(message.content | {image} | list | length) * '<image>\\n' + "
    written += f"(message.content | {text} | map(attribute='text') | join) +"
    path = tmp_path / "parts.jinja"
    path.write_text(TAGGED.replace("message.content +", written))
    as_parts = Template.load(path).encode(HARD["picture"], load("qwen"))
    path = tmp_path / "text.jinja"
    path.write_text(TAGGED)
    assert as_parts == Template.load(path).encode(HARD["picture"], load("qwen"))


def test_a_template_without_end_of_turn_is_warned_of(load, tmp_path, caplog):
    path = tmp_path / "endless.jinja"
    path.write_text(TAGGED.replace(" + '<|im_end|>\n' }}{% endg", " }}{% endg"))
    Template.load(path).encode(HARD["picture"], load("qwen"))
    assert "will not stop" in caplog.text


# --- what a user may get wrong


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown template 'phy'; did you mean 'phi'\? Known: gemma, llama, phi"):
        Template.load("phy")
    with pytest.raises(UserError, match=r"cannot read the template .*nowhere\.jinja"):
        Template.load("nowhere.jinja")


def test_tokenizers_that_cannot_do(load, tmp_path):
    phi = Template.load("phi")
    fresh = make("phi", tmp_path)
    assert phi.encode(HARD["text only"], fresh)["input_ids"]  # no picture, no need of the token
    with pytest.raises(UserError, match="no <image> token"):
        phi.encode(HARD["picture"], fresh)
    with pytest.raises(UserError, match="no <image> token"):
        Template.load("phi", compat=True).encode(HARD["picture"], fresh)
    fresh.add_tokens(["<im", "age>"])
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        Template.load("native").encode(HARD["text only"], fresh)
    fresh.eos_token = None
    with pytest.raises(UserError, match="this tokenizer has none"):
        Template.load("gemma").encode(HARD["text only"], fresh)

    for compat in (False, True):
        with pytest.raises(UserError, match="ByT5Tokenizer is a slow one"):
            Template.load("phi", compat=compat).encode(HARD["text only"], ByT5Tokenizer())


@pytest.mark.parametrize(("messages", "kind"), [([Message("user", "Hi")], "turn_order"), ([], "no_conversation")])
def test_unanswered_samples_are_for_prompts(messages, kind, load):
    with pytest.raises(SampleError) as caught:
        Template.load("phi").encode(Sample(messages, id="x"), load("phi"))
    assert (caught.value.kind, caught.value.sample_id) == (kind, "x")


def test_prompt_leaves_the_last_answer_out(load):
    asked = Sample(HARD["many turns"].messages[:-1])
    for compat in (False, True):
        template = Template.load("phi", compat=compat)
        assert template.encode_prompt(HARD["many turns"], load("phi")) == template.encode_prompt(asked, load("phi"))


def test_a_registered_subclass(load, monkeypatch):
    class Shouting(Template):
        def adapt(self, sample: Sample) -> Sample:
            return Sample([Message(m.role, m.text.upper()) for m in sample.messages], sample.images, sample.id)

    factory = Factory("templates")
    monkeypatch.setattr(factory, "registered", {})
    factory.register("shouting", Shouting("shouting", Template.load("phi").source))
    assert supervised(Template.load("shouting"), conversation("Hi", "bye"), load("phi")) == [" BYE<|endoftext|>"]


def test_a_subclass_is_tried_with_its_own_tokenize(load):
    """A prompt's last space is one token with what follows, but not for a template that tokenises them apart."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' A: ' }}{% else %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
    )

    class Apart(Template):
        def tokenize(self, text: str, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
            ids, offsets, at = [], [], 0
            for piece in re.split(r"(?<= A: )", text):
                more, places = super().tokenize(piece, tokenizer)
                ids, offsets = ids + more, offsets + [(begin + at, end + at) for begin, end in places]
                at += len(piece)
            return ids, offsets

    with pytest.raises(UserError, match="makes one token of the prompt's end"):
        Template("plain", source).encode(HARD["text only"], load("qwen"))
    assert supervised(Apart("apart", source), HARD["text only"], load("qwen")) == ["Red.<|im_end|>"]


def test_templates_travel_between_processes(load):
    for template in (Template.load("phi"), Template.load("llama", compat=True), Template.load("native")):
        template.get_end_of_turn(load("qwen"))  # what was found out about a tokenizer stays here
        copy = pickle.loads(pickle.dumps(template))
        assert (copy, copy.compat, copy.bound) == (template, template.compat, {})
        assert copy.encode(HARD["picture"], load("qwen")) == template.encode(HARD["picture"], load("qwen"))
