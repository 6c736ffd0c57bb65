"""The engine: a batch of prompts through the LLM, and greedy answers out of it, each as soon as it ends.

Why a loop of our own beside transformers' `generate`: prefixes are computed once (prefix.py), rows that ended leave the
batch, and with a small model nine tenths of a step of `generate` is Python around the model. `generate` remains for
everything that is not plain greedy decoding, and for an LLM whose past is not keys and values alone; a test holds the
two equal.

Shapes: B rows, L positions, S new columns, D width of the LLM, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tinyllava.data.prompts import Prompt
from tinyllava.infer.pictures import Pictures, Piece
from tinyllava.infer.prefix import Sharing, new_cache, share, spread_cache
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

SAME = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative difference of hidden states that rounding explains
SAME_16_BIT = 0.1


class Started(NamedTuple):
    """A batch after its prompts."""

    hidden: Tensor  # [B, S, D], of the last columns
    mask: Tensor  # [B, L], 0: padding
    cache: Cache


def padding_mask(lengths: Sequence[int]) -> Tensor:
    """Rows of these lengths, padded on the left: [B, L], 0 where there is padding."""
    columns = torch.arange(max(lengths))
    return (columns >= len(columns) - torch.tensor(lengths)[:, None]).long()


class Engine:
    """Runs the LLM of a model. `busy` is held while the model computes, and not between its steps."""

    def __init__(
        self, model: TinyLlavaForConditionalGeneration, pictures: Pictures, pad_id: int, busy: AbstractContextManager
    ) -> None:
        self.model, self.pictures, self.pad_id, self.busy = model, pictures, pad_id, busy
        self.llm = model.model.language_model

    @cached_property
    def position_bytes(self) -> int | None:
        """Bytes of keys and values that a position takes; None for an LLM that this engine cannot run.

        Decided by what transformers keeps for this config (nothing but keys and values?), and by trying: two rows after
        a shared prefix must give what each gives alone.
        """
        kept = {type(layer) for layer in DynamicCache(config=self.llm.config).layers}
        if not kept <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return None
        ids = [token for token in range(1, 10) if token != self.model.config.image_token_id][:8]
        prompts = [Prompt(ids[:7], []), Prompt([*ids[:4], ids[7]], [])]
        with self.busy, torch.inference_mode():
            cache, alone = new_cache(), [self.prefill([prompt], None).hidden[0, -1] for prompt in prompts]
            self._run(self.llm.get_input_embeddings()(torch.tensor([ids[:3]], device=self.model.device)), cache)
            if not cache.layers or any(layer.get_seq_length() != 3 for layer in cache.layers):
                return None
            together = self.prefill(prompts, Sharing([Piece(prompts[0], 0, 4)], [0, 0], 3)).hidden[:, -1]
        apart = (together - torch.stack(alone)).norm() / torch.stack(alone).norm()
        if not apart < SAME.get(self.model.dtype, SAME_16_BIT):
            return None
        numbers = sum(states[0, :, 0].numel() for layer in cache.layers for states in (layer.keys, layer.values))
        return numbers * self.model.dtype.itemsize

    def prefill(self, prompts: Sequence[Prompt], sharing: Sharing | None) -> Started:
        """The prompts through the LLM, what they share once; `hidden` is of the columns that are not shared."""
        cache, new = new_cache(), max(prompt.length for prompt in prompts)
        device = self.model.device
        if sharing:
            new = sharing.new
            _, embeds = self.pictures.embed(
                sharing.prefixes, self.pad_id, "right"
            )  # causal: what comes after is unseen
            made = new_cache()
            self._run(embeds, made)
            lengths = torch.tensor([max(0, prompt.length - new) for prompt in prompts], device=device)
            cache = spread_cache(made, torch.tensor(sharing.owner, device=device), lengths, new)
        pieces = [Piece(prompt, max(0, prompt.length - new), prompt.length) for prompt in prompts]
        _, embeds = self.pictures.embed(pieces, self.pad_id)
        mask = padding_mask([prompt.length for prompt in prompts]).to(device)
        return Started(self._run(embeds, cache, mask), mask, cache)

    def states(self, prompts: Sequence[Prompt], least: int) -> Tensor:
        """Hidden states [B, S, D] of the last columns of the prompts, at least of `least`."""
        if self.position_bytes:
            return self.prefill(prompts, share(prompts, least)).hidden
        _, embeds = self.pictures.embed([Piece(prompt, 0, prompt.length) for prompt in prompts], self.pad_id)
        return self._run(embeds, None, padding_mask([prompt.length for prompt in prompts]).to(embeds.device))

    def _run(self, embeds: Tensor, cache: Cache | None, mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, D] of new columns, which the cache grows by. mask: [B, L] of all; None: no padding."""
        if mask is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        past = {"past_key_values": cache, "use_cache": cache is not None}
        return self.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **past).last_hidden_state

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """The next id of each row, but for ids that no answer has: [B, S, D] -> [B]."""
        logits = self.model.head(hidden[:, -1])
        logits[:, self.model.generation_config.suppress_tokens] = -torch.inf
        return logits.argmax(-1)

    @torch.inference_mode()
    def greedy(
        self, prompts: Sequence[Prompt], limit: int, has_ended: Callable[[list[int]], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """(row, its new ids, the end included) as rows end: by `has_ended`, or after `limit` ids."""
        rows = list(range(len(prompts)))  # of the batch; one that ended stays in it until half of them have
        made: list[list[int]] = [[] for _ in prompts]
        answering = set(rows)
        with self.busy:
            hidden, mask, cache = self.prefill(prompts, share(prompts))
            chosen = self._likeliest(hidden)
        while True:
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row in answering:
                    made[row].append(token)
                    if len(made[row]) == limit or has_ended(made[row]):
                        answering.remove(row)
                        yield row, made[row]
            if not answering:
                return
            with self.busy:
                if len(answering) <= len(rows) // 2:
                    stay = torch.tensor([at for at, row in enumerate(rows) if row in answering], device=chosen.device)
                    cache.batch_select_indices(stay)
                    rows, mask, chosen = [row for row in rows if row in answering], mask[stay], chosen[stay]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                hidden = self._run(self.model.get_input_embeddings()(chosen[:, None]), cache, mask)
                chosen = self._likeliest(hidden)
