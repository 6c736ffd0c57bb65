"""Score given answers by their likelihood: multiple choice without parsing generated text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tinyllava.data.labels import IGNORE, mask
from tinyllava.data.sample import Message, Sample
from tinyllava.data.template import BoundTemplate
from tinyllava.errors import UserError
from tinyllava.infer.engine import Engine
from tinyllava.infer.prompts import Prompt


class Likelihood(NamedTuple):
    """The log-likelihood of an answer after its prompt. The end of turn is not counted."""

    total: float  # the sum over its tokens, natural logarithm
    tokens: int
    is_greedy: bool  # whether greedy decoding would produce exactly its tokens

    @property
    def per_token(self) -> float:
        """The mean over the tokens, which does not penalise long answers."""
        return self.total / self.tokens


def tokenize_answer(bound: BoundTemplate, sample: Sample, answer: str) -> tuple[list[int], list[bool]]:
    """Ids of the sample with this answer, without its end of turn, and which of them belong to the answer.

    There is one `<image>` id per image. Prompt and answer are tokenised as one text, as in training, so the answer
    begins with the space that the template gives it. Raises UserError for an empty answer.
    """
    if not answer.strip():
        raise UserError(f"an empty option has no likelihood{f' (question {sample.id})' if sample.id else ''}.")
    asked = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
    template, tokenizer = bound.template, bound.tokenizer
    whole = template.adapt(replace(sample, messages=[*asked, Message("assistant", answer)]))
    text, spans = template.render(whole, tokenizer)
    begin, end = spans[-1]
    end = begin + text[begin:end].rfind(bound.chat_format.end_of_turn)
    ids, offsets = template.tokenize(text[:end], tokenizer)
    return ids, [label != IGNORE for label in mask(ids, offsets, [(begin, end)])]


@torch.inference_mode()
def score_options(engine: Engine, rows: Sequence[tuple[Prompt, list[bool]]]) -> list[Likelihood]:
    """The likelihoods of one batch. rows: prompts that contain their answers, and which ids belong to the answer."""
    counts = [len(marks) - marks.index(True) for _, marks in rows]  # columns from the answer's first to the end
    likelihoods = []
    with engine.busy:
        hidden = engine.compute_hidden([prompt for prompt, _ in rows], max(counts) + 1)
        for states, (prompt, marks), count in zip(hidden, rows, counts, strict=True):
            # A token is predicted by the state before it.
            logits = engine.model.compute_logits(states[-count - 1 : -1]).float()
            ids = torch.tensor(prompt.ids[-count:], device=logits.device)
            is_answer = torch.tensor(marks[-count:], device=logits.device)
            total = logits.log_softmax(-1).gather(-1, ids[:, None])[is_answer].sum().item()
            is_greedy = bool((logits.argmax(-1) == ids)[is_answer].all())
            likelihoods.append(Likelihood(total, int(is_answer.sum()), is_greedy))
    return likelihoods
