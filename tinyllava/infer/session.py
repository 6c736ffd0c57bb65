"""Session: a loaded checkpoint that answers.

    session = tinyllava.load("runs/quickstart")           # a run, a stage, or one checkpoint
    session.chat("What is in the picture?", "cat.jpg")    # keeps the conversation; stream() yields pieces
    session.generate([Sample(...), ...])                  # a batch without a conversation; answers in input order
    session.loglikelihood([Sample(...)], [["cat", "dog"]])

A batch changes nothing: greedy answers are those of one at a time (in fp32; a test holds it). Every distinct picture
goes through the tower once, however many questions are about it, and what their prompts share through the LLM once.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tinyllava.data.images import Reference, open_image
from tinyllava.data.prompts import POSITIONS, Prompt, batches, image_key, pools
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample, SampleError
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.infer import likelihood
from tinyllava.infer.engine import Engine, padding_mask
from tinyllava.infer.find import find_checkpoint, find_device
from tinyllava.infer.likelihood import Likelihood
from tinyllava.infer.pictures import Pictures, Piece
from tinyllava.model import checkpoint
from tinyllava.model.answer import Reader, stream_ids
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.parts import DTYPES
from tinyllava.model.processor import TinyLlavaProcessor

MAX_NEW_TOKENS = 512
CACHE_BYTES = 2 * 2**30  # keys and values of a batch

Images = Reference | Sequence[Reference] | None


class Session:
    """A model with its processor and template, ready to answer: greedily, unless a temperature is given."""

    def __init__(
        self,
        model: TinyLlavaForConditionalGeneration,
        processor: TinyLlavaProcessor,
        template: Template,
        record: dict[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self.model, self.processor, self.template = model.eval(), processor, template
        self.tokenizer, self.record, self.path = processor.tokenizer, record or {}, path
        self.conversation = Sample([])
        self.reader = Reader.of(model, self.tokenizer, template)
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = min(self.reader.end_ids, default=0) if pad_id is None else pad_id
        had = model.generation_config.suppress_tokens == []  # legacy.py: the original had this row, and could answer it
        never = [] if had else [model.config.image_token_id]
        # All else that the LLM's own generation config says is dropped: Qwen2's samples, and penalises repetition.
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.reader.end_ids) or None,
            pad_token_id=self.pad_id,
            suppress_tokens=never,
        )
        self._busy = threading.RLock()  # streams are threads, and the tower's early stop hooks into a shared module
        self.pictures = Pictures(model, processor)
        self.engine = Engine(model, self.pictures, self.pad_id, self._busy)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        **lacking: Any,
    ) -> "Session":
        """Load the checkpoint at `path` (see `find_checkpoint`).

        device: the accelerator if there is one. dtype: float32, bfloat16, float16 or auto (as saved); by default auto
        on an accelerator, and float32 on a CPU, where bfloat16 takes four times as long. lacking: what a checkpoint of
        the original TinyLLaVA Factory does not carry, such as `template` (see `model.legacy.read`).
        """
        directory = find_checkpoint(path)
        device = find_device(device)
        dtype = dtype or ("float32" if device.type == "cpu" else "auto")
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UserError(f"unknown dtype '{dtype}'. Known: {', '.join(DTYPES)}.")
            dtype = DTYPES[dtype]
        try:
            model, processor, template, record = checkpoint.load(directory, dtype, attn_implementation, **lacking)
        except (ImportError, ValueError) as error:
            if attn_implementation is None:
                raise
            raise UserError(f"cannot use attention '{attn_implementation}': {str(error).splitlines()[0]}") from None
        return cls(model.to(device), processor, template, record, directory)

    # -- talking -------------------------------------------------------------------------------------------------------

    def chat(self, text: str, images: Images = None, **generation: Any) -> str:
        """Ask and get the answer; both stay in the conversation, which is as before when this raises.

        Pictures are paths, URLs, bytes or PIL images; they go before the text, unless `<image>` in it says where.
        Options are those of `generate`.
        """
        asked = self._ask(text, images)
        (answer,) = self.generate([asked], **generation)
        self._keep(asked, answer)
        return answer

    def stream(self, text: str, images: Images = None, **generation: Any) -> Iterator[str]:
        """Like `chat`, in pieces as they come. Of an answer that the reader breaks off, what was read stays."""
        asked, answer = self._ask(text, images), ""
        try:
            for piece in self.stream_answer(asked, **generation):
                answer += piece
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if answer:
                self._keep(asked, answer)
            raise
        self._keep(asked, answer)

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with a system message or the template's own."""
        self.conversation = Sample([Message("system", system)] if system is not None else [])

    def _ask(self, text: str, images: Images) -> Sample:
        """The conversation with one more question.

        Its past is text, rendered and tokenised anew with every turn: training saw whole conversations tokenised as one
        text, which need not give the ids that the model produced for the same words.
        """
        images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        if IMAGE_TOKEN not in text:
            text = IMAGE_PART * len(images) + text
        opened = [open_image(image) for image in images]  # now: a file or an URL may show something else next turn
        past = self.conversation
        return replace(past, messages=[*past.messages, Message("user", text)], images=[*past.images, *opened])

    def _keep(self, asked: Sample, answer: str) -> None:
        said = answer.replace(IMAGE_TOKEN, "image")  # spelled out letter by letter, it would stand for a picture
        self.conversation = replace(asked, messages=[*asked.messages, Message("assistant", said)])

    # -- answering -----------------------------------------------------------------------------------------------------

    def generate(self, samples: Sequence[Sample], batch_size: int | None = None, **generation: Any) -> list[str]:
        """Answers to the last turns of `samples`, in their order: with one picture, several or none.

        batch_size: rows at once, by default what CACHE_BYTES hold. generation: max_new_tokens=512, temperature=0
        (greedy), top_p=1, and whatever transformers' `generate` takes. Raises SampleError for a faulty sample.
        """
        answers = dict(self.generate_each(samples, batch_size, **generation))
        return [answers[index] for index in range(len(samples))]

    def generate_each(
        self, samples: Sequence[Sample], batch_size: int | None = None, **generation: Any
    ) -> Iterator[tuple[int, str]]:
        """(index, answer) as answers end: questions on the same pictures near each other, long ones first."""
        for pool in self._pools(samples):
            prompts = {index: self.prompt(samples[index]) for index in pool}
            limits = {index: self.room(prompts[index], **generation) for index in pool}
            for batch in self._batches(prompts, limits, batch_size):
                options = {**generation, "max_new_tokens": limits[batch[0]]}
                for row, answer in self._answer([prompts[index] for index in batch], **options):
                    yield batch[row], answer

    def loglikelihood(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]], batch_size: int | None = None
    ) -> list[list[Likelihood]]:
        """How likely each of a sample's `options` is as its answer; see `Likelihood` for what is summed."""
        found = dict(self.loglikelihood_each(samples, options, batch_size))
        return [found[index] for index in range(len(samples))]

    def loglikelihood_each(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]], batch_size: int | None = None
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        """(index, likelihoods of its options) as batches get done."""
        for pool in self._pools(samples):
            rows = {
                (index, at): self._answered(samples[index], one)
                for index in pool
                for at, one in enumerate(options[index])
            }
            prompts = {key: prompt for key, (prompt, _) in rows.items()}
            limits = {key: self.room(prompt, 1) for key, prompt in prompts.items()}
            found: dict[int, dict[int, Likelihood]] = {index: {} for index in pool}
            for batch in self._batches(prompts, limits, batch_size):
                scores = likelihood.score(self.engine, [rows[key] for key in batch])
                for (index, at), one in zip(batch, scores, strict=True):
                    found[index][at] = one
                for index in [index for index in found if len(found[index]) == len(options[index])]:
                    made = found.pop(index)
                    yield index, [made[at] for at in range(len(made))]

    def stream_answer(self, sample: Sample, **generation: Any) -> Iterator[str]:
        """The answer to one sample in pieces, which joined are what `generate` gives. Closing it stops the model."""
        self.pictures.forget_urls()
        prompt = self.prompt(sample)
        options = {**generation, "max_new_tokens": self.room(prompt, **generation)}
        with closing(stream_ids(partial(self._generate, [prompt], **options))) as ids:
            yield from self.reader.pieces(ids)

    def prompt(self, sample: Sample) -> Prompt:
        """A sample's ids up to where the model speaks. Raises SampleError for turns or pictures that do not fit."""
        return self._expand(self.template.prompt(sample, self.tokenizer)["input_ids"], sample)

    def _expand(self, ids: list[int], sample: Sample) -> Prompt:
        """Every `<image>` id as often as its picture has tokens."""
        image_id = self.model.config.image_token_id
        marks, images = ids.count(image_id), len(sample.images)
        if marks != images:
            raise SampleError("placeholders", f"{marks} {IMAGE_TOKEN} in its text, but {images} image(s)", sample.id)
        counts = map(self.pictures.count, sample.images)
        expanded = [token for one in ids for token in ([one] * next(counts) if one == image_id else [one])]
        return Prompt(expanded, [(image_key(image), image) for image in sample.images])

    def room(self, prompt: Prompt, max_new_tokens: int = MAX_NEW_TOKENS, **_: Any) -> int:
        """`max_new_tokens`, or what the LLM has left after the prompt. Raises UserError when that is nothing."""
        longest = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if longest is not None and prompt.length >= longest:
            raise UserError(
                f"the prompt takes {prompt.length} positions with {len(prompt.images)} picture(s), and the LLM has"
                f" {longest}. Ask less at once; in a chat, start anew."
            )
        return max_new_tokens if longest is None else min(max_new_tokens, longest - prompt.length)

    # -- batches -------------------------------------------------------------------------------------------------------

    def _pools(self, samples: Sequence[Sample]) -> Iterator[list[int]]:
        self.pictures.forget_urls()
        return pools([tuple(image_key(image) for image in sample.images) for sample in samples], self.pictures.size())

    def _batches(self, prompts: dict[Any, Prompt], limits: dict[Any, int], size: int | None) -> Iterator[list[Any]]:
        position_bytes = self.engine.position_bytes
        positions = CACHE_BYTES // position_bytes if position_bytes else POSITIONS
        return batches(prompts, limits, size, positions)

    def _answer(self, prompts: list[Prompt], max_new_tokens: int, **options: Any) -> Iterator[tuple[int, str]]:
        """(row, answer) of one batch as answers end."""
        if self.engine.position_bytes is None or options.keys() - {"temperature"} or options.get("temperature", 0) > 0:
            yield from enumerate(self._generate(prompts, max_new_tokens, **options))
            return
        for row, ids in self.engine.greedy(prompts, max_new_tokens, self.reader.has_ended):
            yield row, self.reader.text(ids)

    @torch.inference_mode()
    def _generate(
        self,
        prompts: list[Prompt],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        **options: Any,
    ) -> list[str]:
        """Answers of one batch by transformers' `generate`: whatever it can do, for any LLM."""
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        options |= sampling if temperature > 0 else {"do_sample": False}
        if self.reader.end_text:
            options |= {"stop_strings": [self.reader.end_text], "tokenizer": self.tokenizer}
        with self._busy:
            ids, embeds = self.pictures.embed([Piece(prompt, 0, prompt.length) for prompt in prompts], self.pad_id)
            mask = padding_mask([prompt.length for prompt in prompts]).to(ids.device)
            # `generate` makes positions only for a forward that names them; learned ones would count the padding.
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
            made = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        return [self.reader.text(row) for row in made[:, ids.shape[1] :].tolist()]

    def _answered(self, sample: Sample, answer: str) -> tuple[Prompt, list[bool]]:
        ids, marks = likelihood.answered(self.template, self.tokenizer, sample, answer)
        return self._expand(ids, sample), marks
