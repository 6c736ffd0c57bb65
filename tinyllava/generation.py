"""The options of `Session.generate`: each is honoured, or refused in one line before any work.

They are those of transformers' `generate`, which ignores many wrong values in silence, such as top_p=2. There are three
differences. A temperature above 0 turns sampling on, as `do_sample` does. Sampling draws from all tokens unless top_k
or top_p is given. An answer always ends with the turn: `eos_token_id` and `stop_strings` add further ends. The table in
tests/test_generation.py has a place for every option.
"""

import inspect
import reprlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, create_model
from transformers import GenerationConfig, GenerationMixin

from tinyllava.console import silence_transformers
from tinyllava.errors import UserError
from tinyllava.factory import suggest_nearest

MAX_NEW_TOKENS = 512
DEFAULTS = {**dict.fromkeys(vars(GenerationConfig()), False), **GenerationConfig._get_default_generation_params()}
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(lambda value: int(value) if isinstance(value, np.integer) else value)]
Listed = BeforeValidator(lambda value: list(value) if isinstance(value, list | tuple | set) else [value])
IDS = "eos_token_id forced_eos_token_id pad_token_id bos_token_id suppress_tokens begin_suppress_tokens"
HONOURED = {  # {names: type}. transformers ignores many wrong values in silence
    "max_new_tokens max_length num_beams batch_size": Annotated[Whole, Field(ge=1)],
    "min_new_tokens top_k no_repeat_ngram_size": Annotated[Whole, Field(ge=0)],
    "temperature repetition_penalty max_time": Annotated[Number, Field(ge=0)],
    "top_p min_p typical_p top_h epsilon_cutoff eta_cutoff": Annotated[Number, Field(ge=0, le=1)],
    "length_penalty guidance_scale": Number,
    "do_sample remove_invalid_values renormalize_logits": bool,
    IDS: Annotated[list[Annotated[Whole, Field(ge=0)]], Listed],
    "stop_strings": Annotated[list[Annotated[str, Field(min_length=1)]], Listed],
    "logits_processor stopping_criteria": list[Callable[..., Any]] | tuple[Callable[..., Any], ...],
    "prefix_allowed_tokens_fn": Callable[..., Any],
    "early_stopping bad_words_ids sequence_bias exponential_decay_length_penalty watermarking_config": Any,
}
Options = create_model(
    "Options",
    __config__=ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True),
    **{name: (kind | None, None) for names, kind in HONOURED.items() for name in names.split()},
)
INSTEAD = {  # of options that a session refuses
    "num_return_sequences": "repeat the sample: generate([sample] * 3, temperature=1)",
    "streamer": "`stream` and `stream_answer` yield an answer in pieces",
    "min_length": "min_new_tokens does not count the prompt",
    "seed": "call torch.manual_seed before",
    "tokenizer": "it has its own",
    "stop": "use stop_strings",
}


class Decoding(NamedTuple):
    """How the answers of one call are decoded. Without `options`, decoding is greedy."""

    max_new_tokens: int
    max_length: int | None  # of prompt and answer
    end_ids: frozenset[int]  # they end an answer, beside the end of turn
    stop_texts: tuple[str, ...]  # they do too, and are not part of it
    options: dict[str, Any]  # the others, for transformers' `generate`


def parse_decoding(model: Any, generation_config: GenerationConfig | None = None, **options: Any) -> Decoding:
    """Check the options of one call, before any work. generation_config: more of them.

    Raises UserError for an option that is unknown, has a wrong value, or would have no effect.
    """
    if not isinstance(generation_config, GenerationConfig | None):
        raise UserError(f"generation_config must be a GenerationConfig, found {reprlib.repr(generation_config)}.")
    fields = {} if generation_config is None else generation_config.to_diff_dict()
    options = check_options(**{name: fields[name] for name in fields if name != "transformers_version"} | options)
    if "batch_size" in options:
        raise UserError("batch_size has no effect here: one answer is streamed.")
    ids, rows = {name: options.get(name, []) for name in IDS.split()}, model.config.text_config.vocab_size
    if wrong := [f"{name}={values}" for name, values in ids.items() if max(values, default=0) >= rows]:
        raise UserError(f"{wrong[0]}: the LLM has the token ids 0 to {rows - 1}.")
    ends, texts = frozenset(options.pop("eos_token_id", ())), tuple(options.pop("stop_strings", ()))
    length = options.pop("max_length", None)
    limit = options.pop("max_new_tokens", length or MAX_NEW_TOKENS)
    if options.get("min_new_tokens", 0) > limit:
        raise UserError(f"min_new_tokens={options['min_new_tokens']} is above the maximum of {limit} new tokens.")
    for name in ("pad_token_id", "bos_token_id"):  # no answer depends on them
        options.pop(name, None)
    _set_sampling(options)
    if options:
        _try_options(model, options)
    if "suppress_tokens" in options:
        options["suppress_tokens"] += model.generation_config.suppress_tokens
    return Decoding(limit, length, ends, texts, options)


def check_options(**options: Any) -> dict[str, Any]:
    """The options that are set. Raises UserError for a wrong value, and for a name that a session does not honour."""
    fields = Options.model_fields
    refused = {*DEFAULTS, *INSTEAD, *inspect.signature(GenerationMixin.generate).parameters}.difference(fields)
    # A refused option with its default value asks for nothing.
    given = {name: options[name] for name in refused.intersection(options)}
    neutral = [name for name, value in given.items() if value is None or value == DEFAULTS.get(name, ...)]
    try:
        checked = Options.model_validate({name: options[name] for name in options if name not in neutral})
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        given = f"{name}={' '.join(reprlib.repr(options[name]).split())}"
        if name in fields:
            expected = dict.fromkeys(fault["msg"] for fault in error.errors() if fault["loc"][0] == name)
            raise UserError(f"{given}: {', or: '.join(expected).lower()}.") from None
        if name in refused:
            remedy = INSTEAD.get(name, "session.model.generate takes it")
            raise UserError(f"{given} is not an option of a session: {remedy}.") from None
        raise UserError(f"generate has no option '{name}'{suggest_nearest(name, fields)}") from None
    return {name: value for name in checked.model_fields_set if (value := getattr(checked, name)) is not None}


def _set_sampling(options: dict[str, Any]) -> None:
    """Turn sampling on if do_sample or a temperature asks for it. Otherwise remove options with their default value."""
    temperature, do_sample = options.pop("temperature", None), options.pop("do_sample", None)
    if None not in (temperature, do_sample) and do_sample != (temperature > 0):
        raise UserError(f"do_sample={do_sample} contradicts temperature={temperature}. Remove one of them.")
    if do_sample or temperature:
        options |= {"top_k": 0, "top_p": 1.0, **options, "do_sample": True, "temperature": temperature or 1.0}
    else:
        for name in [name for name in options if options[name] == DEFAULTS.get(name, ...)]:
            options.pop(name)


def _try_options(model: Any, options: dict[str, Any]) -> None:
    """Run transformers' `generate` with these options, without the model. Raises UserError for what it refuses."""

    def process_scores(model: Any, input_ids: torch.Tensor, logits_processor: Any, **_: Any) -> torch.Tensor:
        return logits_processor(input_ids, torch.zeros(1, model.config.text_config.vocab_size, device=model.device))

    own = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")  # the user's functions are not called
    options = {name: value for name, value in options.items() if name not in own}
    try:
        with silence_transformers():
            GenerationConfig(**options).validate(strict=True)
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            model.generate(ids, custom_generate=process_scores, max_new_tokens=MAX_NEW_TOKENS, **options)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = (str(error).removeprefix("GenerationConfig is invalid: \n- ") or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot generate with {', '.join(options)}: {reason[:300]}") from None


def check_answers(options: Sequence[Sequence[str]], samples: int) -> None:
    """Raise UserError unless `options` has a list of texts for each of so many samples."""
    is_list = isinstance(options, Sequence) and all(isinstance(texts, list | tuple) for texts in options)
    if not is_list or len(options) != samples or not all(isinstance(text, str) for text in chain(*options)):
        raise UserError(
            f"options: expected a list of texts for each of {samples} samples, found {reprlib.repr(options)}."
        )
