"""Session: a loaded checkpoint that answers. Chat, evaluation and serving all go through it.

    session = tinyllava.load("runs/quickstart")           # a run, a stage, or one checkpoint
    session.chat("What is in the picture?", "cat.jpg")    # keeps the conversation; stream() yields pieces
    session.generate([Sample(...), ...])                  # a batch without a conversation; answers in input order

A batch changes nothing: greedy answers are those of one at a time (in fp32; a test holds it). Every distinct picture
goes through the tower once, however many questions are about it.

Shapes: B rows, L positions, T tokens of a picture, D width of the LLM.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tinyllava.data.images import Reference, open_image
from tinyllava.data.prompts import ImageKey, Prompt, batches, image_key, pools
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample, SampleError
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.model import checkpoint
from tinyllava.model.answer import Reader, stream_ids
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.parts import DTYPES
from tinyllava.model.processor import TinyLlavaProcessor

logger = logging.getLogger("tinyllava")
MAX_NEW_TOKENS = 512
IMAGE_CACHE = 512 * 2**20  # bytes of image tokens kept; SigLIP's 729 in Phi-2's width take 3.7 MB a picture in bf16
TOWER_ROWS = 32  # pictures in one run of the tower

Images = Reference | Sequence[Reference] | None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself; a stage's final, else newest one; that of the last stage of a run.

    Half-written ones do not count. Raises UserError, with what was looked for, when there is none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path} is no directory. Give a checkpoint, or a run such as runs/quickstart.")
    if (path / "config.json").is_file():
        return path
    run = path / "run.json"
    stages = json.loads(run.read_text(encoding="utf-8"))["stages"] if run.is_file() else {}
    folders = [path / stage for stage in reversed(list(stages))] or [path]
    for folder in folders:
        numbered = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.split("-")[-1]), reverse=True)
        whole = next((candidate for candidate in [folder / "final", *numbered] if _is_whole(candidate)), None)
        if whole:
            return whole
    looked = ", ".join(f"{folder}/final, {folder}/checkpoint-N" for folder in folders)
    raise UserError(f"there is no whole checkpoint in {path}: looked for {path}/config.json, {looked}.")


def _is_whole(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    try:
        checkpoint.read_record(directory)
    except UserError as error:
        logger.warning("passed over: %s", error)
        return False
    return True


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
        self._features: OrderedDict[ImageKey, Tensor] = OrderedDict()  # [T, D] each, the least recently used first
        self._busy = threading.Lock()  # streams are threads, and the tower's early stop hooks into a shared module

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
        device = _device(device)
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

        batch_size: rows at once, by default what 8192 positions hold. generation: max_new_tokens=512, temperature=0
        (greedy), top_p=1, and whatever transformers' `generate` takes. Raises SampleError for a faulty sample.
        """
        answers = dict(self.generate_each(samples, batch_size, **generation))
        return [answers[index] for index in range(len(samples))]

    def generate_each(
        self, samples: Sequence[Sample], batch_size: int | None = None, **generation: Any
    ) -> Iterator[tuple[int, str]]:
        """(index, answer) as batches get done: questions on the same pictures near each other, long ones first."""
        self._forget_urls()
        keys = [tuple(image_key(image) for image in sample.images) for sample in samples]
        for pool in pools(keys, self._cache_size()):
            prompts = {index: self.prompt(samples[index]) for index in pool}
            limits = {index: self.room(prompts[index], **generation) for index in pool}
            for batch in batches(prompts, limits, batch_size):
                options = {**generation, "max_new_tokens": limits[batch[0]]}
                yield from zip(batch, self._answer([prompts[index] for index in batch], **options), strict=True)

    def stream_answer(self, sample: Sample, **generation: Any) -> Iterator[str]:
        """The answer to one sample in pieces, which joined are what `generate` gives. Closing it stops the model."""
        self._forget_urls()
        prompt = self.prompt(sample)
        options = {**generation, "max_new_tokens": self.room(prompt, **generation)}
        with closing(stream_ids(partial(self._answer, [prompt], **options))) as ids:
            yield from self.reader.pieces(ids)

    def prompt(self, sample: Sample) -> Prompt:
        """A sample's ids up to where the model speaks. Raises SampleError for turns or pictures that do not fit."""
        ids = self.template.prompt(sample, self.tokenizer)["input_ids"]
        marks, images = ids.count(self.model.config.image_token_id), len(sample.images)
        if marks != images:
            raise SampleError("placeholders", f"{marks} {IMAGE_TOKEN} in its text, but {images} image(s)", sample.id)
        length = len(ids) + marks * (self.processor.tokens_per_image - 1)
        return Prompt(ids, [(image_key(image), image) for image in sample.images], length)

    def room(self, prompt: Prompt, max_new_tokens: int = MAX_NEW_TOKENS, **_: Any) -> int:
        """`max_new_tokens`, or what the LLM has left after the prompt. Raises UserError when that is nothing."""
        longest = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if longest is not None and prompt.length >= longest:
            raise UserError(
                f"the prompt takes {prompt.length} positions with {len(prompt.images)} picture(s), and the LLM has"
                f" {longest}. Ask less at once; in a chat, start anew."
            )
        return max_new_tokens if longest is None else min(max_new_tokens, longest - prompt.length)

    @torch.inference_mode()
    def _answer(
        self,
        prompts: list[Prompt],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        **options: Any,
    ) -> list[str]:
        """One batch through the model."""
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        options |= sampling if temperature > 0 else {"do_sample": False}
        if self.reader.end_text:
            options |= {"stop_strings": [self.reader.end_text], "tokenizer": self.tokenizer}
        with self._busy:
            inputs = self._inputs(prompts)
            made = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        return [self.reader.text(row) for row in made[:, inputs["input_ids"].shape[1] :].tolist()]

    def _inputs(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `position_ids` [B, L], padded on the left, and `inputs_embeds` [B, L, D]."""
        image_id, length = self.model.config.image_token_id, max(prompt.length for prompt in prompts)
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            own = torch.tensor(prompt.ids)
            own = own.repeat_interleave(torch.where(own == image_id, self.processor.tokens_per_image, 1))
            ids[row, length - prompt.length :], mask[row, length - prompt.length :] = own, 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        embeds = self.model.get_input_embeddings()(ids)
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            tokens = torch.cat(self._image_tokens(images)).to(embeds)
            embeds = embeds.masked_scatter((ids == image_id)[..., None], tokens)
        # `generate` makes positions only for a model whose forward names them; learned ones would count the padding.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "inputs_embeds": embeds}

    def _image_tokens(self, images: Sequence[tuple[ImageKey, Reference]]) -> list[Tensor]:
        """Tokens [T, D] of each picture: from the cache, or through tower and connector, every distinct one once."""
        references = dict(images)
        made = {key: self._features[key] for key in references if key in self._features}
        missing = [key for key in references if key not in made]
        for start in range(0, len(missing), TOWER_ROWS):
            keys = missing[start : start + TOWER_ROWS]
            pixels = self.processor.pixels([open_image(references[key]) for key in keys]).to(self.model.device)
            tokens = self.model.model.get_image_features(pixels).pooler_output
            made |= {key: own.clone() for key, own in zip(keys, tokens, strict=True)}  # a view keeps all others alive
        for key, tokens in made.items():
            self._features[key] = tokens
            self._features.move_to_end(key)
        while len(self._features) > self._cache_size():
            self._features.popitem(last=False)
        return [made[key] for key, _ in images]

    def _cache_size(self) -> int:
        """How many pictures the cache holds."""
        numbers = self.processor.tokens_per_image * self.model.config.text_config.hidden_size
        return max(1, IMAGE_CACHE // (numbers * self.model.dtype.itemsize))

    def _forget_urls(self) -> None:
        """A URL may show something else in the next call."""
        for key in [key for key in self._features if key[0] == "url"]:
            del self._features[key]


def _device(name: str | torch.device | None) -> torch.device:
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    known = sorted({"cpu", best.type})
    if str(name or best).partition(":")[0] not in known:
        raise UserError(f"no device '{name}' on this machine. It has: {', '.join(known)}.")
    return torch.device(name or best)
