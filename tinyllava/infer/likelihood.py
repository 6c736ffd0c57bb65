"""How likely a model finds given answers: for multiple choice without reading a letter out of free text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tinyllava.data.prompts import Prompt
from tinyllava.data.sample import Message, Sample
from tinyllava.data.spans import mask
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.infer.engine import Engine

IGNORE = -100


class Likelihood(NamedTuple):
    """Log-likelihood of an answer after its prompt, without its end of turn."""

    total: float  # the sum over its tokens, natural logarithm
    tokens: int
    is_greedy: bool  # whether each of its tokens is the likeliest after those before it

    @property
    def per_token(self) -> float:
        """The mean, with which a long answer is not the less likely for its length."""
        return self.total / self.tokens


def answered(template: Template, tokenizer: Any, sample: Sample, answer: str) -> tuple[list[int], list[bool]]:
    """Ids of the sample with this answer up to its end of turn, one `<image>` id a picture, and which the answer's are.

    Tokenised as one text, as training does: the answer has the space before it that the template gives it.
    """
    asked = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
    whole = template.adapt(replace(sample, messages=[*asked, Message("assistant", answer)]))
    text, spans = template.render(whole, tokenizer)
    begin, end = spans[-1]
    end = begin + text[begin:end].rfind(template.end_of_turn(tokenizer))
    if not answer.strip():
        raise UserError(f"an empty option has no likelihood{f' (question {sample.id})' if sample.id else ''}.")
    ids, offsets = template.tokenize(text[:end], tokenizer)
    return ids, [label != IGNORE for label in mask(ids, offsets, [(begin, end)])]


@torch.inference_mode()
def score(engine: Engine, rows: Sequence[tuple[Prompt, list[bool]]]) -> list[Likelihood]:
    """One batch: for each prompt that holds its answer, the likelihood of the ids marked as the answer's."""
    counts = [len(marks) - marks.index(True) for _, marks in rows]  # columns from the answer's first to the end
    found = []
    with engine.busy:
        hidden = engine.states([prompt for prompt, _ in rows], max(counts) + 1)
        for states, (prompt, marks), count in zip(hidden, rows, counts, strict=True):
            logits = engine.model.head(states[-count - 1 : -1]).float()  # what stands before a token foretells it
            wanted = torch.tensor(prompt.ids[-count:], device=logits.device)
            own = torch.tensor(marks[-count:], device=logits.device)
            total = logits.log_softmax(-1).gather(-1, wanted[:, None])[own].sum().item()
            found.append(Likelihood(total, int(own.sum()), bool((logits.argmax(-1) == wanted)[own].all())))
    return found
