"""Fit a chat template to a tokenizer, and test the two on a short conversation before any training.

    chat_format = find_format("phi", source, tokenizer)     # BOS or not, what ends a turn
    probe = write_probe("phi", chat_format, tokenizer)      # the conversation as text, and the prompt of each answer
    compare_ids("phi", probe, ids, prompt_ids)              # ids of these texts: the text must start with every prompt

Each step refuses, with the reason, a template whose labels could not be exact. `Template.bind` runs them.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError

from tinyllava.data.labels import Span
from tinyllava.data.rendering import GENERATION, OURS, REMEDY, TEMPLATE_FAULTS, ChatFormat, render_jinja
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample, SampleError
from tinyllava.data.special_tokens import adds_bos, has_token
from tinyllava.errors import UserError
from tinyllava.sandbox import render_template

logger = logging.getLogger("tinyllava")
END_OF_TURN = re.compile(r'(?<=set end_of_turn = )"([^"]*)"')  # where our templates name it
PROBE = Sample(
    [
        Message("user", IMAGE_PART + "Which is first?"),
        Message("assistant", "Amber"),
        Message("user", IMAGE_PART + "And then?"),
        Message("assistant", "Cobalt"),
    ],
    id="probe",
)
ANSWERS = [message.text for message in PROBE.messages if message.role == "assistant"]


class Probe(NamedTuple):
    """The probe conversation as a template writes it: the whole text, and the prompt of each answer."""

    text: str
    prompts: list[str]


def use_known_end(name: str, source: str, tokenizer: Any) -> str:
    """`source`, with EOS in place of an end-of-turn token that the tokenizer does not know."""
    match = END_OF_TURN.search(source)
    if not match or has_token(tokenizer, match[1]):
        return source
    logger.info("template '%s': no %s in this tokenizer; turns end with its %s", name, match[1], tokenizer.eos_token)
    return END_OF_TURN.sub("eos_token", source)


def find_format(name: str, source: str, tokenizer: Any) -> ChatFormat:
    """The chat format of `source` for this tokenizer: add BOS if it is missing, and find what ends a turn.

    Raises UserError if the template does not work with the tokenizer.
    """
    if "eos_token" in source and tokenizer.eos_token is None:
        raise UserError(f"template '{name}' ends turns with the EOS token, but this tokenizer has none. Give it one.")
    with _blame_template(name):
        parts = _wants_parts(source)
        text, spans = render_jinja(source, PROBE, tokenizer, parts=parts)
        if adds_bos(tokenizer) and not text.startswith(tokenizer.bos_token):
            source = "{{ bos_token }}" + source
            text, spans = render_jinja(source, PROBE, tokenizer, parts=parts)
    # A turn ends with the special token after its answer. Without one, it ends with all that follows the answer in a
    # marked span.
    rest = _cut_after_answer(text, spans)
    specials = [token for token in tokenizer.get_added_vocab() if rest.lstrip().startswith(token)]
    is_tagged = bool(GENERATION.search(source))
    end_of_turn = rest if is_tagged and rest.strip(" ") else ""  # spaces alone do not end a turn
    return ChatFormat(source, max(specials, key=len) if specials else end_of_turn, is_tagged, parts)


def write_probe(name: str, chat_format: ChatFormat, tokenizer: Any) -> Probe:
    """Write the probe as text.

    Raises UserError unless each answer has a span, and its prompt is exactly the text before the span.
    """
    with _blame_template(name):
        _check_end_of_turn(name, chat_format, tokenizer)
        text, spans = chat_format.render(PROBE, tokenizer)
        prompts = chat_format.render_prompts(PROBE, tokenizer)
    written = [answer in text[slice(*span)] for answer, span in zip(ANSWERS, spans, strict=False)]
    if len(spans) != len(ANSWERS) or not all(written):
        raise UserError(f"template '{name}' does not write each answer inside its own {{% generation %}}. {REMEDY}")
    for prompt, (begin, _) in zip(prompts, spans, strict=True):
        if prompt != text[:begin]:
            raise UserError(
                f"template '{name}' ends its prompt with {prompt[-16:]!r}, but writes {text[:begin][-16:]!r} before an "
                "answer. Make them the same; a space before the answer belongs inside {% generation %}."
            )
    # If `<image>` is not yet a token of the tokenizer, it would be split like any text: leave it out of the probe.
    mark = IMAGE_TOKEN if has_token(tokenizer, IMAGE_TOKEN) else ""
    return Probe(text.replace(IMAGE_TOKEN, mark), [prompt.replace(IMAGE_TOKEN, mark) for prompt in prompts])


def compare_ids(name: str, probe: Probe, ids: Sequence[int], prompt_ids: Sequence[Sequence[int]]) -> None:
    """Raise UserError unless the ids of the whole text start with the ids of each prompt: labels are then exact."""
    for prompt, begin in zip(probe.prompts, prompt_ids, strict=True):
        if ids[: len(begin)] != begin:
            raise UserError(
                f"template '{name}': the tokenizer makes one token of the prompt's end {prompt[-16:]!r} and what "
                f"follows. End the prompt with a special token, move its last space inside {{% generation %}}, or use "
                f"one of ours: {OURS}."
            )


def _check_end_of_turn(name: str, chat_format: ChatFormat, tokenizer: Any) -> None:
    if not chat_format.end_of_turn:
        if not chat_format.is_tagged:
            text, spans = render_jinja(chat_format.source, PROBE, tokenizer, parts=chat_format.wants_parts)
            rest = _cut_after_answer(text, spans)
            raise UserError(f"template '{name}' ends a turn with {rest!r}, which is not a special token here. {REMEDY}")
        logger.warning("template '%s' has no end-of-turn inside {%% generation %%}: its models will not stop", name)
    end = chat_format.end_of_turn.strip()
    if re.fullmatch(r"<[^<>\s]+>", end) and not has_token(tokenizer, end):
        eos = repr(tokenizer.eos_token) if tokenizer.eos_token else "none"
        raise UserError(
            f"template '{name}' ends turns with {end!r}, which is not a token of this tokenizer (its EOS: {eos})."
            f" Write eos_token in a copy of it, or use one of ours: {OURS}."
        )


def _cut_after_answer(text: str, spans: list[Span]) -> str:
    """The text after the last answer of the probe: up to the end of its span, or of the text if there are no spans."""
    answer = ANSWERS[-1]
    return text[text.rfind(answer) + len(answer) : spans[-1][1] if spans else None]


def _wants_parts(source: str) -> bool:
    """Whether a template reads content only as a list of parts, as llava-hf's do. It then leaves out a plain text."""
    try:
        text, _ = render_template([PROBE.to_messages()[0]], source)
    except TEMPLATE_FAULTS:
        return False
    return PROBE.messages[0].text not in text[0]


@contextmanager
def _blame_template(name: str) -> Iterator[None]:
    """Turn an error while the probe is rendered into a UserError about the template."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise UserError(f"template '{name}', line {error.lineno}: {error.message}") from None
    except SampleError as error:
        raise UserError(f"template '{name}', tried on a plain conversation: {error.text}") from None
