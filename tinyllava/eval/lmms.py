"""A model class for lmms-eval, for tasks that are not benchmarks of this package. See docs/lmms-eval.md.

    lmms-eval eval --model tinyllava_factory --model_args pretrained=runs/quickstart --tasks mmbench_en_dev

lmms-eval imports this file through the entry point `lmms_eval.models`; no file of this package imports it. The model is
of lmms-eval's "simple" kind: a task gives a text and its images, and the images are placed before the text.
"""

import json
from collections.abc import Iterable
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.errors import UserError
from tinyllava.infer import Session

MODEL = "tinyllava_factory"  # lmms-eval's own `tinyllava` needs the original package
CHUNK = 256  # requests whose images are in memory at the same time


def manifests() -> list[ModelManifest]:
    """List the models for lmms-eval's registry. The entry point names this function."""
    return [ModelManifest(MODEL, simple_class_path=f"{__name__}.TinyLlava")]


class TinyLlava(lmms):
    """Answer lmms-eval's requests with a `Session`."""

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, **load: Any) -> None:
        """Load a model. `pretrained` and the other model_args (dtype, template, ...) are arguments of `tinyllava.load`.

        batch_size: the largest number of rows; 1, which is lmms-eval's default, means as many as memory allows.
        """
        super().__init__()
        load.pop("max_batch_size", None)
        self.session = Session.load(pretrained, None if device == "cuda" else device, **load)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else None

    @property
    def device(self) -> Any:
        """The device of the model."""
        return self.session.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request; returns the texts in order. `until` is not used: the model ends its turn itself."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(translate_generation(request.args[1]), sort_keys=True), []).append(index)
        for options, members in groups.items():
            for start in range(0, len(members), CHUNK):
                chunk = members[start : start + CHUNK]
                samples = [self.build_sample(requests[index].args[0], *requests[index].args[2:]) for index in chunk]
                texts = self.session.generate(samples, self.batch_size, **json.loads(options))
                answers |= dict(zip(chunk, texts, strict=True))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each request, in order: (negative log-likelihood, whether the continuation is the greedy answer).

        The sign is negative, because lmms-eval takes the smallest value as the best. The pair is the text of a
        GenerationResult, because lmms-eval 0.7.3 turns a plain pair into a string.
        """
        groups: dict[tuple, list[int]] = {}
        for index, request in enumerate(requests):
            if len(request.args) < 6:
                raise UserError(
                    "acc_mutual_info requires likelihoods without a prompt. A chat model cannot compute them."
                )
            context, _, _, *place = request.args
            groups.setdefault((context, *place), []).append(index)
        results: dict[int, GenerationResult] = {}
        members = list(groups.values())
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            first = [requests[indices[0]].args for indices in chunk]
            samples = [self.build_sample(args[0], *args[2:]) for args in first]
            options = [[self.get_continuation(requests[index]) for index in indices] for indices in chunk]
            scored = self.session.loglikelihood(samples, options, self.batch_size)
            for indices, likelihoods in zip(chunk, scored, strict=True):
                for index, likelihood in zip(indices, likelihoods, strict=True):
                    results[index] = GenerationResult((-likelihood.total, likelihood.is_greedy))
        return [results[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("tinyllava_factory supports only tasks of one round.")

    def build_sample(self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Sample:
        """Build the sample of a request. Raises UserError for anything that is not an image."""
        images = flatten_images(doc_to_visual(self.task_dict[task][split][doc_id]) or [])
        unsupported = next((type(image).__name__ for image in images if not isinstance(image, Image.Image)), None)
        if unsupported:
            raise UserError(f"{task} gives a {unsupported}: tinyllava_factory supports only images.")
        text = context if IMAGE_TOKEN in context else IMAGE_PART * len(images) + context
        return Sample([Message("user", text)], images, f"{task}-{doc_id}")

    def get_continuation(self, request: Instance) -> str:
        """The answer whose likelihood is requested, without the space before it: the template adds that space."""
        _, target, _, doc_id, task, split = request.args
        return (target(self.task_dict[task][split][doc_id]) if callable(target) else target).strip()


def translate_generation(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Translate a task's generation_kwargs into arguments of `Session.generate`."""
    options = {"max_new_tokens": kwargs.get("max_new_tokens", 1024)}
    if (kwargs.get("num_beams") or 1) > 1:
        options["num_beams"] = kwargs["num_beams"]
    if kwargs.get("do_sample") and kwargs.get("temperature") != 0:
        options |= {name: kwargs[name] for name in ("do_sample", "temperature", "top_p", "top_k") if kwargs.get(name)}
    return options


def flatten_images(images: Iterable[Any]) -> list[Any]:
    """Put the images of nested lists into one list: some tasks give lists of lists."""
    return [
        image for entry in images for image in (flatten_images(entry) if isinstance(entry, list | tuple) else [entry])
    ]
