"""Chat templates that are changed a little, and our own with conversations that could shift a label."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.data.test_template import CHATML, TOKENIZERS, make
from tests.fuzz.harness import Case
from tests.fuzz.mutate import TEXTS, edit_bytes, edit_texts, split_words
from tinyllava.data.sample import IMAGE_TOKEN, Message, Sample
from tinyllava.data.template import Template, add_image_token
from tinyllava.factory import Factory

SNIPPETS = split_words("""
    {%_generation_%} {%_endgeneration_%} {{_messages[0]_}} {{_messages[99].content_}} {%_break_%} {%_continue_%}
    {%_endfor_%} {%_for_x_in_messages_%} {{_1/0_}} {{_raise_exception('x')_}} {%_set_end_of_turn_=_"</s>"_%}
    {%_if_messages_%} {%_endif_%} {%_else_%} {{_bos_token_}} {{_x.y.z_}} {{_messages|tojson_}}
    {{_strftime_now('%Y')_}} {{_strftime_now(1)_}} {{_'a'|int_}} {{_messages|sum_}} {{_range(5)|list_}}
    {{_messages[0].content_+_1_}} {{_none.x_}} {%_include_'x'_%} {%_extends_'x'_%} {%_import_'x'_as_y_%}
    {%_block_a_%} {%_endblock_%} {{_loop.index_}} {{_loop(1)_}} {{_cycler()_}} {{_joiner_}} {%_do_x_%}
    {{_namespace(a=1).b_}} {{_x()_}} {%_set_ns.x_=_1_%} {{_[][5]_}} {{_{}['a']_}} {{_'x'|nofilter_}}
    {{_'%d'|format('x')_}} {{_messages|map('x')|list_}} {{_-_}} {{_'a'.__class__.__mro___}}
    {{_messages|batch(0)|list_}} {{_messages|slice(0)|list_}} {{_'x'|round_}} {{_[1,'a']|sort_}} {{_'{}'.format()_}}
    {%_raw_%} {#_ #} -%} {%- {{_super()_}} {{_self.a()_}} {%_call_x()_%} {{_messages|first|attr('x')_}}
    {{_1|filesizeformat_}} {{_'a'*'b'_}} {{_dict(1)_}} {{_''.join([1])_}} {{_int('x')_}} {%_trans_%} {{_debug_}}
    {{_messages|groupby('role')|list_}} {{_'a'|indent('x',_'y')_}} {{_'é'.encode('ascii')_}} {{_'x'|wordwrap(0)_}}
    {{_messages|random_}} {{_'a'[::0]_}} {{_messages.pop()_}} {{_'x'|center('y')_}} {{_1|abs('x')_}}
    {{_'a'|truncate(-1)_}} {{_{}|dictsort(by='x')_}} {{_'%c'|format(-1)_}} {{_messages|unique('x')|list_}}
    {{_"a".zfill("b")_}} {{_[]|min|upper_}} {{_messages|xmlattr_}} {{_[[]]|xmlattr_}} {{_1|urlencode_}}
    {{_5|urlize_}} {{_messages|sum('x')_}} {{_10.5|round(999)_}} {{_1e999|int_}} {{_{}|select('x')|list_}}
""")
SNIPPETS = [snippet.replace("_", " ") if snippet.startswith("{") else snippet for snippet in SNIPPETS]
PIECES = [
    "a",
    "Red.",
    " ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "\u0301",
    "日本",
    "🙂",
    "👩‍👧",
    "USER:",
    " ASSISTANT:",
    "ASSISTANT: ",
    "\u00a0",
    "\u2028",
]
PIECES += [
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<eos>",
    "<bos>",
    "{{ x }}",
    "{% endgeneration %}",
    "\r\n",
    "'s",
    "don't",
    "  ",
]
PIECES += split_words("""
    İ ﬁ ½ ß ▁ <0x41> <unk> <pad> 3.14 가 <image image>
""")
PIECES += ["\u200d", "\x00", "\ufeff", "\x1b"]
SURROGATES = ["\ud83d", "\udc80a"]


@st.composite
def make_samples(draw: st.DrawFn, pieces: list[str], mark_all: bool = False) -> Sample:
    """A conversation in the right order; `mark_all`: each question has an image, as the pretrain format asks."""
    texts = st.lists(st.sampled_from(pieces), max_size=4).map("".join)
    messages = [Message("system", draw(texts))] if draw(st.integers(0, 3)) == 0 else []
    images = 0
    for _ in range(draw(st.integers(1, 3))):
        marks = max(int(mark_all), draw(st.sampled_from([0, 0, 1, 2])))
        images += marks
        before, after = draw(texts), draw(texts)
        messages.append(Message("user", before + IMAGE_TOKEN * marks + after))
        messages.append(Message("assistant", draw(texts), draw(st.sampled_from([True, True, True, False]))))
    return Sample(messages, ["a.png"] * images, "x")


def build(folder: Path) -> list[Case]:
    tokenizers = []
    for name in TOKENIZERS:
        (folder / name).mkdir()
        tokenizers.append(make(name, folder / name))
        add_image_token(tokenizers[-1])
    names = [name for name in Factory("templates").list_names() if name != "pretrain"]
    texts = [Factory("templates").get(name).read_text(encoding="utf-8") for name in [*names, "pretrain"]] + [CHATML]
    path = folder / "own.jinja"
    samples = make_samples(PIECES + SURROGATES)
    numbers = st.integers(0, len(tokenizers) - 1)

    def use(template: Template, sample: Sample, tokenizer: Any) -> None:
        template.encode(sample, tokenizer)
        template.encode_prompt(sample, tokenizer)
        template.get_chat_template(tokenizer)
        template.get_end_of_turn(tokenizer)

    def load(write: Callable[[Any], object]) -> Callable[[Any], None]:
        def run(input: tuple[Any, Sample, int]) -> None:
            content, sample, number = input
            write(content)
            use(Template.load(path), sample, tokenizers[number])

        return run

    bound = {}  # what a tokenizer and a template make of each other, or None where they are refused

    def check(input: tuple[int, str, Sample]) -> None:
        number, name, sample = input
        tokenizer = tokenizers[number]
        if (number, name) not in bound:
            bound[number, name] = Template.load(name)
        check_labels(bound[number, name], sample, tokenizer)

    def write_text(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")

    contents = [text.encode() for text in texts]
    return [
        Case("templates: text", st.tuples(edit_texts(texts, SNIPPETS), samples, numbers), load(write_text)),
        Case("templates: bytes", st.tuples(edit_bytes(contents, most=2), samples, numbers), load(path.write_bytes)),
        Case("templates: labels", st.tuples(numbers, st.sampled_from(names), make_samples(PIECES)), check),
        Case("templates: captions", st.tuples(numbers, st.just("pretrain"), make_samples(PIECES, True)), check),
        Case("templates: conversations", st.tuples(numbers, st.sampled_from(names), make_odd_samples()), check),
        Case("templates: names", TEXTS, Template.load),
    ]


def make_odd_samples() -> st.SearchStrategy[Sample]:
    """Conversations in any order, with any text."""
    roles = st.sampled_from(["user", "assistant", "system", "tool", ""])
    return st.builds(Sample, st.lists(st.builds(Message, roles, TEXTS, st.booleans()), max_size=4))


def check_labels(template: Template, sample: Sample, tokenizer: Any) -> None:
    """Ids are those of transformers for the same conversation, and labels are exactly what follows each prompt."""
    bound = template.bind_to_train(tokenizer)
    encoded = bound.encode(sample)
    ids, labels = encoded["input_ids"], encoded["labels"]
    served = tokenizer.apply_chat_template(
        sample.to_messages(), chat_template=template.get_chat_template(tokenizer), tokenize=True, return_dict=False
    )
    assert ids == served, f"served as {served}, trained as {ids}"
    answers = [at for at, message in enumerate(sample.messages) if message.role == "assistant"]
    expected = [-100] * len(ids)
    end = bound.chat_format.end_of_turn
    for at in answers:
        if not sample.messages[at].learned:
            continue
        before = bound.encode_prompt(Sample(sample.messages[:at]))["input_ids"]
        until = bound.encode(Sample(sample.messages[: at + 1]))["input_ids"]
        assert ids[: len(before)] == before, f"the prompt of turn {at} is not what the text begins with"
        expected[len(before) : len(until)] = until[len(before) :]
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert [a != -100 for a in labels] == [a != -100 for a in expected], f"{trained!r} is learned; {end!r} ends a turn"
