"""Render a conversation as text, and find the spans of the text that the model must produce.

transformers renders, so the text is the same as that of `apply_chat_template`. The span of an answer starts at the end
of its prompt and includes its end-of-turn. `{% generation %}` marks it. For a template without that mark, the prompt of
each turn is rendered too, and shows where the answer begins.
"""

import re
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from tinyllava.data.labels import Span
from tinyllava.data.sample import Sample, SampleError
from tinyllava.factory import Factory
from tinyllava.sandbox import render_template

# What a template raises: errors of jinja, and of the Python that it is compiled to and calls.
TEMPLATE_FAULTS = (TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, NameError)
TEMPLATE_FAULTS += (RuntimeError, SyntaxError, TypeError, ValueError)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
OURS = ", ".join(Factory("templates").list_names())
REMEDY = f"Mark what the model must produce with {{% generation %}} in a copy of it, or use one of ours: {OURS}."


@dataclass(frozen=True)
class ChatFormat:
    """A chat template as it is used with one tokenizer (`fit.find_format` makes it)."""

    source: str  # its jinja, with BOS where the tokenizer wants one
    end_of_turn: str  # what ends an answer; "" if nothing does
    is_tagged: bool  # it has {% generation %}
    wants_parts: bool  # it reads content only as a list of parts

    def render(self, sample: Sample, tokenizer: Any, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the span of each answer in it. A prompt ends where the answer begins, and has no spans."""
        text, spans = render_jinja(self.source, sample, tokenizer, prompt, self.wants_parts)
        if prompt:
            return text, []
        if not self.is_tagged:
            return text, self._find_spans(text, sample, tokenizer)
        return text, [(begin, self._find_end(text, begin, end)) for begin, end in spans]

    def render_prompts(self, sample: Sample, tokenizer: Any) -> list[str]:
        """The prompt of each answer of the sample, in order."""
        answers = [at for at, message in enumerate(sample.messages) if message.role == "assistant"]
        asked = [replace(sample, messages=sample.messages[:at]) for at in answers]
        return [render_jinja(self.source, part, tokenizer, True, self.wants_parts)[0] for part in asked]

    def _find_end(self, text: str, begin: int, end: int) -> int:
        """Where the answer in a marked span ends: some templates also mark the line break after the end of turn."""
        kept = text[begin:end].rstrip()
        return begin + len(kept) if self.end_of_turn and kept.endswith(self.end_of_turn) else end

    def _find_spans(self, text: str, sample: Sample, tokenizer: Any) -> list[Span]:
        """Spans without `{% generation %}`: from the end of a turn's prompt to the first end-of-turn after its answer.

        Raises SampleError if the text does not start with the prompt of a turn: the template rewrites earlier turns.
        """
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        spans = []
        for answer, prompt in zip(answers, self.render_prompts(sample, tokenizer), strict=True):
            answer = answer.strip()  # many templates strip answers
            begin = text.find(answer, len(prompt)) if text.startswith(prompt) else -1
            end = text.find(self.end_of_turn, begin + len(answer)) if begin >= 0 else -1
            if end < 0:
                reason = f"the template rewrites earlier turns or their answers. {REMEDY}"
                raise SampleError("template", reason, sample.id)
            spans.append((len(prompt), end + len(self.end_of_turn)))
        return spans


def select_learned(sample: Sample, spans: list[Span]) -> list[Span]:
    """The spans of the answers that are learned. Raises SampleError if the template wrote no span for an answer."""
    learned = [message.learned for message in sample.messages if message.role == "assistant"]
    if not all(learned) and len(spans) != len(learned):
        reason = f"it marks {len(spans)} of {len(learned)} answers, so flags of turns cannot be honoured. {REMEDY}"
        raise SampleError("template", reason, sample.id)
    return spans if all(learned) else list(compress(spans, learned))


def render_jinja(
    source: str, sample: Sample, tokenizer: Any, prompt: bool = False, parts: bool = False
) -> tuple[str, list[Span]]:
    """The text that `apply_chat_template` makes of the sample, and its `{% generation %}` spans (if it has the tag).

    parts: give the template the content of messages as lists of parts. Raises SampleError if it refuses the sample.
    """
    try:
        texts, spans = render_template(
            sample.to_messages(parts),
            source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=bool(GENERATION.search(source)),
            **tokenizer.special_tokens_map,
        )
        texts[0].encode()  # no tokenizer takes half an emoji (a lone surrogate)
    except TemplateSyntaxError:
        raise  # the template's fault, not the sample's: `fit.py` reports it
    except TEMPLATE_FAULTS as error:
        text = f"the template cannot render it: {' '.join(str(error).split())[:300]}"
        raise SampleError("template", text, sample.id) from None
    return texts[0], spans[0] if spans else []
