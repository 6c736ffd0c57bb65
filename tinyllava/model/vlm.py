"""VLM: a vision-language model together with everything that is needed to train it, ask it and save it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from tinyllava.data.template import Template
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processor import TinyLlavaProcessor


@dataclass
class VLM:
    """The object that `build` makes, `checkpoint.load` reads, `checkpoint.save` writes, and a `Session` answers with.

    model: vision tower, connector and LLM. processor: makes model inputs of images and text; it holds the tokenizer.
    template: the chat format of prompts. record: what made the weights (recipe, stage, step, versions, data; see
    `tinyllava.record`); empty for a model that was just built.
    """

    model: TinyLlavaForConditionalGeneration
    processor: TinyLlavaProcessor
    template: Template
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The LLM's tokenizer, with `<image>` as one token."""
        return self.processor.tokenizer
