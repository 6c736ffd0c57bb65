"""The engine: run a batch of prompts through the LLM and yield greedy answers, each when it ends.

Why not only transformers' `generate`? The engine computes shared prefixes once (prefix.py) and removes finished rows
from the batch. With a small model, nine tenths of a step of `generate` is Python around the model. `generate` is still
used for sampling and beams, and for LLMs whose cache holds more than keys and values. A test checks that both give the
same answers.

Shapes: B rows, L positions, S new columns, D width of the LLM, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tinyllava.infer.image_encoder import ImageEncoder, PromptSlice
from tinyllava.infer.prefix import Sharing, make_cache, plan_sharing, spread_cache
from tinyllava.infer.prompts import Prompt
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

TOLERANCE, TOLERANCE_16_BIT = 1e-3, 0.1  # the largest relative differences of hidden states that rounding can cause


class PrefilledBatch(NamedTuple):
    """The state of a batch after its prompts."""

    hidden: Tensor  # [B, S, D], of the last columns
    mask: Tensor  # [B, L], 0: padding
    cache: Cache


def make_padding_mask(lengths: Sequence[int]) -> Tensor:
    """The attention mask of rows of these lengths, padded on the left: [B, L], 0 where there is padding."""
    columns = torch.arange(max(lengths))
    return (columns >= len(columns) - torch.tensor(lengths)[:, None]).long()


@dataclass(eq=False)
class Engine:
    """Runs the LLM of a model. It holds the lock `busy` while the model computes, and releases it between steps."""

    model: TinyLlavaForConditionalGeneration
    images: ImageEncoder
    pad_id: int
    busy: AbstractContextManager

    @property
    def llm(self) -> PreTrainedModel:
        """The LLM without its head."""
        return self.model.model.language_model

    @cached_property
    def position_bytes(self) -> int | None:
        """Bytes of keys and values for one position; None for an LLM that this engine cannot run.

        The engine can run an LLM if transformers caches only keys and values for it, and if a trial with two rows after
        a shared prefix gives the same as each row alone.
        """
        cached = {type(layer) for layer in DynamicCache(config=self.llm.config).layers}
        if not cached <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return None
        ids = [token for token in range(1, 10) if token != self.model.config.image_token_id][:8]
        prompts = [Prompt(ids[:7], []), Prompt([*ids[:4], ids[7]], [])]
        with self.busy, torch.inference_mode():
            cache, alone = make_cache(), [self.prefill([prompt], None).hidden[0, -1] for prompt in prompts]
            self._run(self.llm.get_input_embeddings()(torch.tensor([ids[:3]], device=self.model.device)), cache)
            if not cache.layers or any(layer.get_seq_length() != 3 for layer in cache.layers):
                return None
            together = self.prefill(prompts, Sharing([PromptSlice(prompts[0], 0, 4)], [0, 0], 3)).hidden[:, -1]
        # Written with `not` below, because a NaN must also fail.
        difference = (together - torch.stack(alone)).norm() / torch.stack(alone).norm()
        if not difference < (TOLERANCE if self.model.dtype.itemsize > 2 else TOLERANCE_16_BIT):
            return None
        numbers = sum(states[0, :, 0].numel() for layer in cache.layers for states in (layer.keys, layer.values))
        return numbers * self.model.dtype.itemsize

    def prefill(self, prompts: Sequence[Prompt], sharing: Sharing | None) -> PrefilledBatch:
        """Run the prompts through the LLM, and shared prefixes once. `hidden` is of the columns that are not shared."""
        cache, new = make_cache(), max(prompt.length for prompt in prompts)
        device = self.model.device
        if sharing:
            new = sharing.new
            # Padding on the right needs no mask: attention is causal, so no prefix position sees it.
            _, embeds = self.images.embed(sharing.prefixes, self.pad_id, "right")
            prefix_cache = make_cache()
            self._run(embeds, prefix_cache)
            lengths = torch.tensor([max(0, prompt.length - new) for prompt in prompts], device=device)
            cache = spread_cache(prefix_cache, torch.tensor(sharing.owner, device=device), lengths, new)
        slices = [PromptSlice(prompt, max(0, prompt.length - new), prompt.length) for prompt in prompts]
        _, embeds = self.images.embed(slices, self.pad_id)
        mask = make_padding_mask([prompt.length for prompt in prompts]).to(device)
        return PrefilledBatch(self._run(embeds, cache, mask), mask, cache)

    def compute_hidden(self, prompts: Sequence[Prompt], least: int) -> Tensor:
        """Hidden states [B, S, D] of the last columns of the prompts. S is at least `least`."""
        if self.position_bytes:
            return self.prefill(prompts, plan_sharing(prompts, least)).hidden
        _, embeds = self.images.embed([PromptSlice(prompt, 0, prompt.length) for prompt in prompts], self.pad_id)
        return self._run(embeds, None, make_padding_mask([prompt.length for prompt in prompts]).to(embeds.device))

    def _run(self, embeds: Tensor, cache: Cache | None, mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, D] of new columns, which it adds to the cache. mask: [B, L]; None: no padding."""
        if mask is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        past = {"past_key_values": cache, "use_cache": cache is not None}
        return self.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **past).last_hidden_state

    def _choose_tokens(self, hidden: Tensor) -> Tensor:
        """The likeliest next id of each row, except ids that no answer contains: [B, S, D] -> [B]."""
        logits = self.model.compute_logits(hidden[:, -1])
        logits[:, self.model.generation_config.suppress_tokens] = -torch.inf
        return logits.argmax(-1)

    @torch.inference_mode()
    def generate_greedy(
        self, prompts: Sequence[Prompt], limit: int, has_ended: Callable[[list[int]], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (row, its new ids with the end) when a row ends: `has_ended` is true, or it has `limit` ids."""
        rows = list(range(len(prompts)))  # in the batch; finished rows leave it when half of the batch has ended
        ids: list[list[int]] = [[] for _ in prompts]
        answering = set(rows)
        with self.busy:
            hidden, mask, cache = self.prefill(prompts, plan_sharing(prompts))
            chosen = self._choose_tokens(hidden)
        while True:
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row in answering:
                    ids[row].append(token)
                    if len(ids[row]) == limit or has_ended(ids[row]):
                        answering.remove(row)
                        yield row, ids[row]
            if not answering:
                return
            with self.busy:
                if len(answering) <= len(rows) // 2:
                    kept = torch.tensor([at for at, row in enumerate(rows) if row in answering], device=chosen.device)
                    cache.batch_select_indices(kept)
                    rows, mask, chosen = [row for row in rows if row in answering], mask[kept], chosen[kept]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                hidden = self._run(self.model.get_input_embeddings()(chosen[:, None]), cache, mask)
                chosen = self._choose_tokens(hidden)
