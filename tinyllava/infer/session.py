"""Session: a loaded checkpoint that answers questions.

    session = tinyllava.load("runs/quickstart")           # a run, a stage, or one checkpoint
    session.chat("What is in the picture?", "cat.jpg")    # keeps the conversation; stream() yields pieces
    session.generate([Sample(...), ...])                  # a batch without a conversation; answers in input order
    session.loglikelihood([Sample(...)], [["cat", "dog"]])

Greedy answers of a batch are the same as those of its questions one at a time (in fp32; a test checks it). Every
distinct image goes through the vision tower once, for any number of questions. A prefix that prompts share goes through
the LLM once.
"""

import reprlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tinyllava import checkpoint
from tinyllava.data.images import Reference, open_image
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample, SampleError
from tinyllava.errors import UserError
from tinyllava.find import find_checkpoint
from tinyllava.generation import Decoding, check_answers, check_options, parse_decoding
from tinyllava.infer.answer import AnswerReader, StopWhen, stream_ids
from tinyllava.infer.device import find_device, find_dtype
from tinyllava.infer.engine import Engine, make_padding_mask
from tinyllava.infer.image_encoder import ImageEncoder, PromptSlice
from tinyllava.infer.likelihood import Likelihood, score_options, tokenize_answer
from tinyllava.infer.prompts import POSITIONS, Prompt, make_batches, make_image_key, make_pools
from tinyllava.model.vlm import VLM

CACHE_BYTES = 2 * 2**30  # keys and values of a batch

Images = Reference | Sequence[Reference] | None


class Session:
    """A VLM that answers questions: with greedy decoding, unless a temperature is given."""

    def __init__(self, vlm: VLM, path: Path | None = None) -> None:
        self.vlm, self.path = vlm, path
        self.model, self.processor, self.template = vlm.model.eval(), vlm.processor, vlm.template
        self.tokenizer, self.record = vlm.tokenizer, vlm.record
        self.bound = vlm.template.bind(vlm.tokenizer)
        self.conversation = Sample([])
        self.reader = AnswerReader.from_vlm(vlm)
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = min(self.reader.end_ids, default=0) if pad_id is None else pad_id
        suppressed = self.model.generation_config.suppress_tokens
        if suppressed is None:  # a checkpoint of another package: ours list these ids
            suppressed = [self.model.config.image_token_id]
        # The rest of the LLM's own generation config is dropped: Qwen2's asks for sampling and a repetition penalty.
        ids = {"eos_token_id": sorted(self.reader.end_ids) or None, "pad_token_id": self.pad_id}
        self.model.generation_config = GenerationConfig(**ids, suppress_tokens=suppressed)
        # Only one thread computes at a time: streams are threads, and the tower's early stop adds hooks to its modules.
        self.busy = threading.RLock()
        self.images = ImageEncoder(self.model, self.processor)
        self.engine = Engine(self.model, self.images, self.pad_id, self.busy)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        **missing: Any,
    ) -> "Session":
        """Load the checkpoint at `path` (see `find_checkpoint`).

        device: by default the accelerator, if there is one. dtype: float32, bfloat16, float16 or auto (as saved); by
        default auto on an accelerator, and float32 on a CPU, where bfloat16 takes four times as long. missing:
        values that a checkpoint of the original TinyLLaVA Factory does not contain, for example `template` (see
        `tinyllava.checkpoint.legacy`). Raises UserError if there is no complete checkpoint.
        """
        directory, device = find_checkpoint(path), find_device(device)
        dtype = find_dtype(dtype or ("float32" if device.type == "cpu" else "auto"))
        try:
            vlm = checkpoint.load(directory, dtype, attn_implementation, **missing)
        except (ImportError, ValueError, AttributeError) as error:
            if attn_implementation is None:
                raise
            raise UserError(f"cannot use attention '{attn_implementation}': {str(error).splitlines()[0]}") from None
        vlm.model.to(device)
        return cls(vlm, directory)

    # -- a conversation ------------------------------------------------------------------------------------------------

    def chat(self, text: str, images: Images = None, **generation: Any) -> str:
        """Ask a question and return the answer. Both stay in the conversation, which an error does not change.

        images: one or a list, in any form that records have (docs/images.md). They go before the text, unless `<image>`
        in it marks their place.
        generation: the options of `generate`.
        """
        asked = self._add_question(text, images)
        (answer,) = self.generate([asked], **generation)
        self._add_answer(asked, answer)
        return answer

    def stream(self, text: str, images: Images = None, **generation: Any) -> Iterator[str]:
        """Like `chat`, but yield the answer in pieces. If you stop early, the conversation keeps the pieces so far."""
        asked, answer = self._add_question(text, images), ""
        try:
            for piece in self.stream_answer(asked, **generation):
                answer += piece
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if answer:
                self._add_answer(asked, answer)
            raise
        self._add_answer(asked, answer)

    def reset(self, system: str | None = None) -> None:
        """Start a new conversation, with a system message or the template's default."""
        self.conversation = Sample([Message("system", system)] if system is not None else [])

    def _add_question(self, text: str, images: Images) -> Sample:
        """The conversation with one more question.

        The conversation is kept as text, and is tokenised again at every turn. In training, a whole conversation was
        tokenised as one text, and the ids that the model generated can differ from those.
        """
        if not isinstance(text, str):
            raise UserError(f"expected a question as text, found {reprlib.repr(text)}.")
        images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        if IMAGE_TOKEN not in text:
            text = IMAGE_PART * len(images) + text
        opened = [open_image(image) for image in images]  # now, because the file or URL may change before the next turn
        past = self.conversation
        return replace(past, messages=[*past.messages, Message("user", text)], images=[*past.images, *opened])

    def _add_answer(self, asked: Sample, answer: str) -> None:
        text = answer.replace(IMAGE_TOKEN, "image")  # the model can spell it, but only images may have it
        self.conversation = replace(asked, messages=[*asked.messages, Message("assistant", text)])

    # -- answers -------------------------------------------------------------------------------------------------------

    def generate(self, samples: Sequence[Sample], batch_size: int | None = None, **generation: Any) -> list[str]:
        """Answers to the last turns of `samples`, in their order. A sample has one image, several or none.

        batch_size: rows of a batch; by default as many as fit into CACHE_BYTES. generation: max_new_tokens=512,
        temperature=0 (greedy), and the options of transformers' `generate` (see tinyllava/generation.py). Raises
        UserError for an option that a session does not have, and SampleError for a bad sample.
        """
        answers = dict(self.generate_each(samples, batch_size, **generation))
        return [answers[index] for index in range(len(samples))]

    def generate_each(
        self, samples: Sequence[Sample], batch_size: int | None = None, **generation: Any
    ) -> Iterator[tuple[int, str]]:
        """Yield (index, answer) when an answer ends. Questions on the same images come together, long ones first."""
        decoding = parse_decoding(self.model, **generation)
        for pool in self._make_pools(samples):
            prompts = {index: self.make_prompt(samples[index]) for index in pool}
            limits = {index: self.limit_new_tokens(prompts[index], *decoding[:2]) for index in pool}
            for batch in self._make_batches(prompts, limits, batch_size):
                rows = [prompts[index] for index in batch]
                for row, answer in self._answer_batch(rows, limit=limits[batch[0]], decoding=decoding):
                    yield batch[row], answer

    def stream_answer(self, sample: Sample, **generation: Any) -> Iterator[str]:
        """Yield the answer to one sample in pieces: joined, what `generate` returns. Closing it stops the model."""
        decoding = parse_decoding(self.model, **generation)
        if "num_beams" in decoding.options:
            raise UserError("num_beams cannot stream: the best beam is known at the end. Use chat or generate.")
        self._make_pools([sample])
        prompt = self.make_prompt(sample)
        limit = self.limit_new_tokens(prompt, *decoding[:2])
        with closing(stream_ids(partial(self._generate, [prompt], limit, decoding))) as ids:
            yield from self.reader.add_ends(decoding).stream_text(ids)

    def loglikelihood(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]], batch_size: int | None = None
    ) -> list[list[Likelihood]]:
        """The likelihood of each of a sample's `options` as its answer. See `Likelihood` for what is summed."""
        likelihoods = dict(self.loglikelihood_each(samples, options, batch_size))
        return [likelihoods[index] for index in range(len(samples))]

    def loglikelihood_each(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]], batch_size: int | None = None
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        """Yield (index, likelihoods of its options) when all options of a sample are scored."""
        pools = self._make_pools(samples)
        check_answers(options, len(samples))
        for pool in pools:
            yield from ((index, []) for index in pool if not options[index])
            rows = {
                (index, number): self._make_answered_prompt(samples[index], option)
                for index in pool
                for number, option in enumerate(options[index])
            }
            prompts = {key: prompt for key, (prompt, _) in rows.items()}
            limits = {key: self.limit_new_tokens(prompt, 1) for key, prompt in prompts.items()}
            scored: dict[int, dict[int, Likelihood]] = {index: {} for index in pool}
            for batch in self._make_batches(prompts, limits, batch_size):
                likelihoods = score_options(self.engine, [rows[key] for key in batch])
                for (index, number), likelihood in zip(batch, likelihoods, strict=True):
                    scored[index][number] = likelihood
                    if len(scored[index]) == len(options[index]):
                        yield index, [scored[index][number] for number in sorted(scored[index])]

    # -- prompts -------------------------------------------------------------------------------------------------------

    def make_prompt(self, sample: Sample) -> Prompt:
        """The prompt of a sample. Raises SampleError for turns or images that do not fit."""
        return self._expand_images(self.bound.encode_prompt(sample)["input_ids"], sample)

    def _make_answered_prompt(self, sample: Sample, answer: str) -> tuple[Prompt, list[bool]]:
        """A sample with this answer, and which of its ids belong to the answer (counted from the end)."""
        ids, marks = tokenize_answer(self.bound, sample, answer)
        return self._expand_images(ids, sample), marks

    def _expand_images(self, ids: list[int], sample: Sample) -> Prompt:
        """Turn ids into a prompt: repeat every `<image>` id once for each token of its image."""
        image_id = self.model.config.image_token_id
        placeholders, images = ids.count(image_id), len(sample.images)
        if placeholders != images:
            text = f"{placeholders} {IMAGE_TOKEN} in its text, but {images} image(s)"
            raise SampleError("placeholders", text, sample.id)
        counts = map(self.images.count_tokens, sample.images)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * next(counts) if token == image_id else [token]
        return Prompt(expanded, [(make_image_key(image), image) for image in sample.images])

    def limit_new_tokens(self, prompt: Prompt, max_new_tokens: int, max_length: int | None = None) -> int:
        """`max_new_tokens`, or fewer if the LLM has fewer positions left. Raises UserError if it has none left."""
        longest = getattr(self.model.config.text_config, "max_position_embeddings", None) or sys.maxsize
        room = min(longest, max_length or longest) - prompt.length
        if room <= 0:
            limit = f"max_length is {max_length}" if max_length and max_length < longest else f"the LLM has {longest}"
            raise UserError(
                f"the prompt takes {prompt.length} positions with {len(prompt.images)} image(s), and {limit}."
                " Ask a shorter question or show fewer images; in a chat, start again."
            )
        return min(max_new_tokens, room)

    # -- batches -------------------------------------------------------------------------------------------------------

    def _make_pools(self, samples: Sequence[Sample]) -> Iterator[list[int]]:
        if not isinstance(samples, Sequence) or not all(isinstance(sample, Sample) for sample in samples):
            raise UserError(f"expected a list of Sample, found {reprlib.repr(samples)}. `chat` takes a text.")
        self.images.forget_urls()
        keys = [tuple(make_image_key(image) for image in sample.images) for sample in samples]
        return make_pools(keys, self.images.capacity)

    def _make_batches(self, prompts: dict[Any, Prompt], limits: dict[Any, int], size: int | None) -> Iterator[list]:
        check_options(batch_size=size)
        position_bytes = self.engine.position_bytes
        positions = CACHE_BYTES // position_bytes if position_bytes else POSITIONS
        return make_batches(prompts, limits, size, positions)

    def _answer_batch(self, prompts: list[Prompt], limit: int, decoding: Decoding) -> Iterator[tuple[int, str]]:
        """Yield (row, answer) of one batch when an answer ends."""
        if self.engine.position_bytes is None or decoding.options:
            yield from enumerate(self._generate(prompts, limit, decoding))
            return
        reader = self.reader.add_ends(decoding)
        for row, ids in self.engine.generate_greedy(prompts, limit, reader.has_ended):
            yield row, reader.decode(ids)

    @torch.inference_mode()
    def _generate(
        self, prompts: list[Prompt], max_new_tokens: int, decoding: Decoding | None = None, **stream: Any
    ) -> list[str]:
        """Answers of one batch by transformers' `generate`: all its options, for any LLM. stream: of `stream_ids`."""
        decoding = decoding or parse_decoding(self.model)
        reader = self.reader.add_ends(decoding)
        options = {**decoding.options, "eos_token_id": sorted(reader.end_ids) or None, "max_new_tokens": max_new_tokens}
        columns = max(prompt.length for prompt in prompts)
        stops = [StopWhen(lambda ids: reader.has_ended(ids[columns:]))] if reader.end_texts else []
        stops += [*stream.pop("stopping_criteria", ()), *options.pop("stopping_criteria", ())]
        with self.busy:
            slices = [PromptSlice(prompt, 0, prompt.length) for prompt in prompts]
            ids, embeds = self.images.embed(slices, self.pad_id)
            mask = make_padding_mask([prompt.length for prompt in prompts]).to(ids.device)
            # `generate` makes them only for a forward that names them, and learned positions must not count padding.
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
            generated = self.model.generate(**inputs, stopping_criteria=stops, **stream, **options)
        return [reader.decode(row) for row in generated[:, columns:].tolist()]
