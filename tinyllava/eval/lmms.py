"""A model of lmms-eval, for the tasks that are no benchmark here. See docs/lmms-eval.md.

    lmms-eval eval --model tinyllava_factory --model_args pretrained=runs/quickstart --tasks mmbench_en_dev

lmms-eval finds this file through the entry point `lmms_eval.models`, and imports it; nothing here does otherwise. The
model is one of its "simple" ones: a task gives a text and its pictures, which go before the text.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.errors import UserError
from tinyllava.infer import Session

MODEL = "tinyllava_factory"  # lmms-eval's own `tinyllava` needs the original package
CHUNK = 256  # requests whose pictures are in memory at once


def manifests() -> list[ModelManifest]:
    """What the entry point registers."""
    return [ModelManifest(MODEL, simple_class_path=f"{__name__}.TinyLlava")]


class TinyLlava(lmms):
    """Answers lmms-eval's requests with a session."""

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, **load: Any) -> None:
        """pretrained: what `tinyllava.load` takes, as do the other model_args (dtype, template, ...).

        batch_size: rows at most; 1, which is what lmms-eval says when nobody does, means as many as memory allows.
        """
        super().__init__()
        load.pop("max_batch_size", None)
        self.session = Session.load(pretrained, None if device == "cuda" else device, **load)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else None

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.session.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer a request, in their order. It ends where the model ends its turn: `until` is not looked at."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(generation(request.args[1]), sort_keys=True), []).append(index)
        for options, members in groups.items():
            for start in range(0, len(members), CHUNK):
                chunk = members[start : start + CHUNK]
                samples = [self.sample(requests[index].args[0], *requests[index].args[2:]) for index in chunk]
                made = self.session.generate(samples, self.batch_size, **json.loads(options))
                answers |= dict(zip(chunk, made, strict=True))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(negative log-likelihood of a continuation, whether it is what the model would say), in their order.

        Negative, because lmms-eval takes the smallest for the best; as the text of a result, because lmms-eval 0.7.3
        makes a string of any pair that comes bare.
        """
        groups: dict[tuple, list[int]] = {}
        for index, request in enumerate(requests):
            if len(request.args) < 6:
                raise UserError("acc_mutual_info asks for answers without a prompt, which a chat model does not give.")
            context, _, _, *place = request.args
            groups.setdefault((context, *place), []).append(index)
        found: dict[int, GenerationResult] = {}
        members = list(groups.values())
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            first = [requests[indices[0]].args for indices in chunk]
            samples = [self.sample(args[0], *args[2:]) for args in first]
            options = [[self.continuation(requests[index]) for index in indices] for indices in chunk]
            for indices, likelihoods in zip(
                chunk, self.session.loglikelihood(samples, options, self.batch_size), strict=True
            ):
                for at, one in zip(indices, likelihoods, strict=True):
                    found[at] = GenerationResult((-one.total, one.is_greedy))
        return [found[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there."""
        raise NotImplementedError("tinyllava_factory answers tasks of one round.")

    def sample(self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Sample:
        """A request as a sample. Raises UserError for what is no picture."""
        shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        images = list(flat(shown))
        other = next((type(image).__name__ for image in images if not isinstance(image, Image.Image)), None)
        if other:
            raise UserError(f"{task} shows a {other}: tinyllava_factory sees pictures alone.")
        text = context if IMAGE_TOKEN in context else IMAGE_PART * len(images) + context
        return Sample([Message("user", text)], images, f"{task}-{doc_id}")

    def continuation(self, request: Instance) -> str:
        """The answer whose likelihood is asked, without the space before it, which the template gives."""
        _, target, _, doc_id, task, split = request.args
        return (target(self.task_dict[task][split][doc_id]) if callable(target) else target).strip()


def generation(given: dict[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs in the words of `Session.generate`."""
    options = {"max_new_tokens": given.get("max_new_tokens", 1024)}
    if (given.get("num_beams") or 1) > 1:
        options["num_beams"] = given["num_beams"]
    if given.get("do_sample") and given.get("temperature"):
        options |= {name: given[name] for name in ("temperature", "top_p", "top_k") if given.get(name)}
    return options


def flat(images: Iterable[Any]) -> Sequence[Any]:
    """Some tasks give lists of lists of pictures."""
    return [one for image in images for one in (flat(image) if isinstance(image, list | tuple) else [image])]
