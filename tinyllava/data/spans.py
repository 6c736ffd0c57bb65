"""What a chat template makes of a conversation, and which of its characters the model must produce.

Rendering is transformers' own, so the text is what `apply_chat_template` gives. The span of an answer runs from the
end of its prompt through its end-of-turn. `{% generation %}` marks it; in a template without that mark it is found by
rendering the prompt of each turn. `fit` tries a template with a tokenizer once, and refuses what could not be exact.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample, SampleError
from tinyllava.errors import UserError
from tinyllava.factory import Factory

log = logging.getLogger("tinyllava")

IGNORE = -100  # what torch's cross entropy skips
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
END_OF_TURN = re.compile(r'(?<=set end_of_turn = )"([^"]*)"')  # how our templates state theirs
OURS = ", ".join(Factory("templates").names())
REMEDY = f"Mark what the model must produce with {{% generation %}} in a copy of it, or use one of ours: {OURS}."
Span = tuple[int, int]  # characters [begin, end) of the rendered text
Tokenize = Callable[[str, Any], tuple[list[int], list[Span]]]

PROBE = Sample(
    [
        Message("user", IMAGE_PART + "Which is first?"),
        Message("assistant", "Amber"),
        Message("user", IMAGE_PART + "And then?"),
        Message("assistant", "Cobalt"),
    ],
    id="probe",
)


class Fit(NamedTuple):
    """A template fitted to a tokenizer: its source, with BOS where the tokenizer wants one, and how a turn ends."""

    source: str
    end_of_turn: str
    tagged: bool  # it has {% generation %}


def render(source: str, sample: Sample, tokenizer: Any, prompt: bool = False) -> tuple[str, list[Span]]:
    """The text that `apply_chat_template` makes of the sample, and its `{% generation %}` spans (if it has the tag)."""
    try:
        texts, spans = render_jinja_template(
            [sample.to_messages(parts=wants_parts(source))],
            chat_template=source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=bool(GENERATION.search(source)),
            **tokenizer.special_tokens_map,
        )
    except TemplateSyntaxError:
        raise  # the template's fault, not the sample's: `fit` reports it
    except TemplateError as error:
        raise SampleError("template", f"the template refuses it: {error}", sample.id) from None
    return texts[0], spans[0] if spans else []


@lru_cache(maxsize=16)
def wants_parts(source: str) -> bool:
    """Whether a template reads content only as a list of parts, as llava-hf's do: a plain text leaves no trace."""
    try:
        text, _ = render_jinja_template([[PROBE.to_messages()[0]]], chat_template=source)
    except TemplateError:
        return False
    return PROBE.messages[0].text not in text[0]


def render_fitted(fit: Fit, sample: Sample, tokenizer: Any, prompt: bool = False) -> tuple[str, list[Span]]:
    """The text, and the span of each answer in it (none for a prompt)."""
    text, spans = render(fit.source, sample, tokenizer, prompt)
    if prompt:
        return text, []
    if not fit.tagged:
        return text, _derive(fit, sample, tokenizer, text)
    return text, [(begin, _cut(text, begin, end, fit.end_of_turn)) for begin, end in spans]


def _cut(text: str, begin: int, end: int, end_of_turn: str) -> int:
    """Where a marked span really ends: some templates mark the line break after the end-of-turn token as well."""
    kept = text[begin:end].rstrip()
    return begin + len(kept) if end_of_turn and kept.endswith(end_of_turn) else end


def _derive(fit: Fit, sample: Sample, tokenizer: Any, text: str) -> list[Span]:
    """Spans without `{% generation %}`: from the end of a turn's prompt to the first end-of-turn after its answer.

    Raises SampleError where the prompt of a turn does not begin the whole text: the template then rewrites the past.
    """
    spans = []
    for at, message in enumerate(sample.messages):
        if message.role != "assistant":
            continue
        prompt, _ = render(fit.source, replace(sample, messages=sample.messages[:at]), tokenizer, prompt=True)
        answer = message.text.strip()  # as many templates trim it
        found = text.find(answer, len(prompt)) if text.startswith(prompt) else -1
        end = text.find(fit.end_of_turn, found + len(answer)) if found >= 0 else -1
        if end < 0:
            raise SampleError("template", f"the template rewrites turns that are past or answered. {REMEDY}", sample.id)
        spans.append((len(prompt), end + len(fit.end_of_turn)))
    return spans


def mask(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """Labels: the ids of the tokens that begin inside a span, -100 for the others.

    A token that begins before a span and ends in it holds the end of the prompt, so after that prompt the model never
    has to produce it: it is not supervised. `fit` refuses templates where every answer begins so. It can remain where
    an answer begins with the line break that also ends the prompt (`native` ChatML), which BPE may make one token.
    """
    labels = [IGNORE] * len(ids)
    at = 0
    for begin, end in spans:
        while at < len(ids) and offsets[at][0] < begin:
            at += 1
        while at < len(ids) and offsets[at][0] < end:
            labels[at] = ids[at]
            at += 1
    return labels


def has_token(tokenizer: Any, token: str) -> bool:
    """Whether `token` has an id of its own."""
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id) or token == tokenizer.unk_token


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer begins every text with BOS on its own: by what it does, not by what its config says."""
    bos = [tokenizer.bos_token_id]
    return tokenizer("a")["input_ids"][:1] == bos != tokenizer("a", add_special_tokens=False)["input_ids"][:1]


@lru_cache(maxsize=16)
def fit(name: str, source: str, tokenizer: Any, tokenize: Tokenize | None) -> Fit:
    """Fit a template to a tokenizer. With `tokenize`, try it on two turns: UserError unless its labels are exact.

    A tokenizer that lacks the `end_of_turn` that one of our templates states ends its turns with its own EOS.
    """
    try:
        return _fit(name, source, tokenizer, tokenize)
    except TemplateSyntaxError as error:
        raise UserError(f"template '{name}', line {error.lineno}: {error.message}") from None
    except SampleError as error:
        raise UserError(f"template '{name}', tried on a plain conversation: {error.text}") from None


def _fit(name: str, source: str, tokenizer: Any, tokenize: Tokenize | None) -> Fit:
    stated = END_OF_TURN.search(source)
    if stated and tokenize and not has_token(tokenizer, stated[1]):
        log.info("template '%s': no %s in this tokenizer; turns end with its %s", name, stated[1], tokenizer.eos_token)
        source = END_OF_TURN.sub("eos_token", source)
    if "eos_token" in source and tokenizer.eos_token is None:
        raise UserError(f"template '{name}' ends turns with the EOS token, but this tokenizer has none. Give it one.")
    text, spans = render(source, PROBE, tokenizer)
    if adds_bos(tokenizer) and not text.startswith(tokenizer.bos_token):
        source = "{{ bos_token }}" + source
        text, spans = render(source, PROBE, tokenizer)
    # A turn ends with the special token after its answer or, in a marked span, with whatever follows the answer.
    answer = PROBE.messages[-1].text
    rest = text[text.rfind(answer) + len(answer) : spans[-1][1] if spans else None]
    specials = [token for token in tokenizer.get_added_vocab() if rest.lstrip().startswith(token)]
    tagged = bool(GENERATION.search(source))
    said = rest if tagged and rest.strip(" ") else ""  # a space ends no turn
    fitted = Fit(source, max(specials, key=len) if specials else said, tagged)
    if tokenize and not fitted.end_of_turn and not tagged:
        raise UserError(f"template '{name}' ends a turn with {rest!r}: no special token of this tokenizer. {REMEDY}")
    if tokenize:
        _verify(name, fitted, tokenizer, tokenize)
    return fitted


def _verify(name: str, fit: Fit, tokenizer: Any, tokenize: Tokenize) -> None:
    """On the probe, prompt ids + supervised ids must be the ids of the conversation."""
    end = fit.end_of_turn.strip()
    if re.fullmatch(r"<[^<>\s]+>", end) and not has_token(tokenizer, end):
        own = repr(tokenizer.eos_token) if tokenizer.eos_token else "none"
        raise UserError(
            f"template '{name}' ends turns with {end!r}, no token of this tokenizer (its own EOS: {own})."
            f" Write eos_token in a copy of it, or use one of ours: {OURS}."
        )
    if not fit.end_of_turn:
        log.warning("template '%s' has no end-of-turn inside {%% generation %%}: its models will not stop", name)

    text, spans = render_fitted(fit, PROBE, tokenizer)
    answers = [at for at, message in enumerate(PROBE.messages) if message.role == "assistant"]
    written = [PROBE.messages[at].text in text[slice(*span)] for at, span in zip(answers, spans, strict=False)]
    if len(spans) != len(answers) or not all(written):
        raise UserError(f"template '{name}' does not write each answer inside its own {{% generation %}}. {REMEDY}")
    # Before `<image>` is added to a tokenizer it is a text like others, which must not matter here.
    mark = IMAGE_TOKEN if has_token(tokenizer, IMAGE_TOKEN) else ""
    ids, _ = tokenize(text.replace(IMAGE_TOKEN, mark), tokenizer)
    for at, (begin, _) in zip(answers, spans, strict=True):
        prompt, _ = render(fit.source, replace(PROBE, messages=PROBE.messages[:at]), tokenizer, prompt=True)
        if prompt != text[:begin]:
            raise UserError(
                f"template '{name}' ends its prompt with {prompt[-16:]!r}, but writes {text[:begin][-16:]!r} before an "
                "answer. Make them the same; a space before the answer belongs inside {% generation %}."
            )
        prompt_ids, _ = tokenize(prompt.replace(IMAGE_TOKEN, mark), tokenizer)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"template '{name}': the tokenizer makes one token of the prompt's end {prompt[-16:]!r} and what "
                f"follows. End the prompt with a special token, move its last space inside {{% generation %}}, or use "
                f"one of ours: {OURS}."
            )
