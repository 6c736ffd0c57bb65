"""Every option of `generate` is honoured as transformers honours it, or refused in one line before any work."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, TextStreamer

from tests.tiny_session import NEW, WORDS, question, tiny_session
from tinyllava.data.sample import Message, Sample
from tinyllava.errors import UserError
from tinyllava.generation import Options
from tinyllava.infer import Session

SAMPLE = question(1, images=1)
SAMPLED = {"do_sample": True}

# Every field of GenerationConfig is in one of these three tables. A field that a newer transformers adds fails a test.
HONOURED = {  # options of which transformers' `generate` makes the same answer
    "max_new_tokens": {"max_new_tokens": 3},
    "max_length": {"max_length": 70},
    "min_new_tokens": {"min_new_tokens": 9},
    "max_time": {"max_time": 60.0},
    "do_sample": SAMPLED,
    "temperature": {"temperature": 1.7},
    "top_k": {**SAMPLED, "top_k": 3},
    "top_p": {**SAMPLED, "top_p": 0.3},
    "min_p": {**SAMPLED, "min_p": 0.2},
    "top_h": {**SAMPLED, "top_h": 0.3},
    "typical_p": {**SAMPLED, "typical_p": 0.3},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.01},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.05},
    "num_beams": {"num_beams": 3},
    "early_stopping": {"num_beams": 3, "early_stopping": True},
    "length_penalty": {"num_beams": 3, "length_penalty": -2},
    "repetition_penalty": {"repetition_penalty": 3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[7], [60]]},
    "suppress_tokens": {"suppress_tokens": list(range(100, 300))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(100, 400))},
    "sequence_bias": {"sequence_bias": [[[9], 20.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0)},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "renormalize_logits": {"renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": {"bias": 3.0}},
}
OURS = {  # honoured in our way; tests below show how
    "eos_token_id",  # ends an answer beside the end of turn
    "stop_strings",  # needs no tokenizer, and is not part of the answer
    "pad_token_id",  # no answer depends on it
    "bos_token_id",  # the template writes it
}
REFUSED = {
    "use `stream`, or repeat the sample": ["num_return_sequences"],
    "counts the prompt": ["min_length"],
    "an answer is a text": [
        *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    ],
    "a session has its own cache and does not compile": [
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "low_memory"),
    ],
    "assisted generation takes one prompt": [
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "use_mtp", "speculation_type"),
    ],
    "is for encoder-decoder models": [
        *("decoder_start_token_id", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
        "forced_bos_token_id",
    ],
    "transformers runs it only as code from the Hub": [
        *("penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids"),
    ],
    "changes the prompt": ["token_healing"],
}
METADATA = {"transformers_version", "_from_model_config"}
NOT_FIELDS = ["streamer", "assistant_model", "negative_prompt_ids", "custom_generate", "synced_gpus", "seed", "stop"]


@pytest.fixture(scope="module")
def session() -> Session:
    return tiny_session()


@pytest.fixture(autouse=True)
def idle(session: Session) -> Iterator[list[int]]:
    """Grows at every run of the head or of the vision tower."""
    runs: list[int] = []
    modules = (session.model.lm_head, session.model.model.vision_tower)
    hooks = [module.register_forward_hook(lambda *_: runs.append(1)) for module in modules]
    session.images.cache.clear()
    yield runs
    for hook in hooks:
        hook.remove()


def test_every_field_of_transformers_has_a_place() -> None:
    refused = [name for names in REFUSED.values() for name in names]
    listed = [*HONOURED, *OURS, *refused]
    assert len(set(listed)) == len(listed)
    assert set(listed) == set(vars(GenerationConfig())) - METADATA
    functions = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}
    assert set(Options.model_fields) == {*HONOURED, *OURS, *functions, "batch_size"}


def answer_with_transformers(session: Session, **options: object) -> str:
    text = session.template.encode_prompt(SAMPLE, session.tokenizer)["text"]
    inputs = session.processor(images=SAMPLE.images, text=text, return_tensors="pt", add_special_tokens=False)
    if "suppress_tokens" in options:
        options["suppress_tokens"] = options["suppress_tokens"] + session.model.generation_config.suppress_tokens
    ids = session.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return session.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("name", HONOURED)
def test_an_option_does_what_it_does_in_transformers(session: Session, name: str) -> None:
    options = {**({} if name == "max_length" else NEW), **HONOURED[name]}
    torch.manual_seed(3)
    (answer,) = session.generate([SAMPLE], **options)
    torch.manual_seed(3)
    is_sampled = "temperature" in options or "do_sample" in options
    theirs = {"do_sample": True, "top_k": 0} if is_sampled else {}
    floats = {key: float(value) for key, value in options.items() if key in ("repetition_penalty", "length_penalty")}
    assert answer == answer_with_transformers(session, **{**theirs, **options, **floats})
    # One in a GenerationConfig does the same.
    torch.manual_seed(3)
    assert session.generate([SAMPLE], generation_config=GenerationConfig(**{**options, **floats})) == [answer]


def test_options_change_answers(session: Session) -> None:
    """Half of the options, in a session that ignored them, would answer as without them."""
    torch.manual_seed(3)
    (plain,) = session.generate([SAMPLE], **NEW)
    same = {"min_new_tokens", "max_time", "renormalize_logits", "remove_invalid_values", "forced_eos_token_id"}
    same |= {"num_beams", "early_stopping", "bad_words_ids", "length_penalty"}  # of this model on this question
    for name in sorted(HONOURED.keys() - same - {"max_length"}):
        torch.manual_seed(3)
        assert session.generate([SAMPLE], **{**NEW, **HONOURED[name]}) != [plain], name


def test_ends_are_added_to_the_end_of_turn(session: Session) -> None:
    samples = [question(seed) for seed in range(5)]
    whole = session.generate(samples, **NEW)
    stop = next(text[3:5] for text in whole if len(text) > 6)
    cut = [text.partition(stop)[0].strip() for text in whole]
    assert cut != whole
    for options in ({"stop_strings": stop}, {"stop_strings": ["never", stop]}, {"stop_strings": [stop], **SAMPLED}):
        sampled = {"top_k": 1} if "do_sample" in options else {}
        assert session.generate(samples, **options, **sampled, **NEW) == cut
        assert ["".join(session.stream_answer(one, **options, **sampled, **NEW)) for one in samples] == cut
    steps: list[int] = []
    hook = session.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    session.generate([samples[0]], stop_strings=whole[0][0], max_new_tokens=40)
    hook.remove()
    assert len(steps) < 10  # it stops there

    (prompt,) = [session.make_prompt(SAMPLE)]
    ids = next(ids for _, ids in session.engine.generate_greedy([prompt], 10, session.reader.has_ended))
    wanted = session.reader.decode(ids[:4])
    assert session.generate([SAMPLE], eos_token_id=ids[4], **NEW) == [wanted]
    assert session.generate([SAMPLE], eos_token_id=[1, ids[4]], num_beams=1, **NEW) == [wanted]
    assert session.generate([SAMPLE], **NEW) != [wanted]  # only for one call
    assert session.generate([SAMPLE], pad_token_id=5, bos_token_id=5, **NEW) == session.generate([SAMPLE], **NEW)


def test_numbers_and_lists_of_other_kinds_are_the_same(session: Session) -> None:
    plain = session.generate([SAMPLE], stop_strings=["a", "b"], suppress_tokens=[0, 9], max_new_tokens=4)
    kinds = {"stop_strings": ("a", "b"), "suppress_tokens": {9, 0}, "max_new_tokens": np.int64(4), "eos_token_id": 0}
    assert session.generate([SAMPLE], **kinds, pad_token_id=None, stopping_criteria=()) == plain
    own = [5]
    session.generate([SAMPLE], suppress_tokens=own, **NEW)
    assert own == [5]
    with pytest.raises(UserError, match="batch_size has no effect here"):
        next(session.stream("hello", batch_size=2))


def test_functions_of_the_users_own_are_used(session: Session) -> None:
    def only_a(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([70]), 0.0)

    ((letter, *rest),) = {text for text in session.generate([SAMPLE], logits_processor=[only_a], **NEW)}
    assert set(rest) == {letter} and len(rest) == 9
    fixed = {"prefix_allowed_tokens_fn": lambda _row, _ids: [70]}
    assert session.generate([SAMPLE], **fixed, **NEW) == [letter * 10]
    stopped = {"stopping_criteria": [lambda ids, _scores: torch.ones(len(ids), dtype=torch.bool)]}
    assert session.generate([SAMPLE], **fixed, **stopped, **NEW) == [letter]
    assert list(session.stream_answer(SAMPLE, **fixed, **stopped, **NEW)) == [letter]
    with pytest.raises(ZeroDivisionError):  # an error in it stays its own
        session.generate([SAMPLE], logits_processor=LogitsProcessorList([lambda *_: 1 / 0]))


@pytest.mark.parametrize("name", [name for names in REFUSED.values() for name in names] + NOT_FIELDS)
def test_a_refused_option_is_refused_in_a_line(session: Session, idle: list[int], name: str) -> None:
    value = {"streamer": TextStreamer(session.tokenizer), "assistant_model": session.model, "use_cache": False}
    with pytest.raises(UserError, match=rf"^{name}=.* is not an option of a session: ") as caught:
        session.generate([SAMPLE], **{name: value.get(name, 7)})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200 and not idle


def test_a_refused_option_with_its_default_asks_for_nothing(session: Session) -> None:
    neutral = {"num_return_sequences": 1, "return_dict_in_generate": False, "use_cache": True, "num_beams": 1}
    neutral |= {"repetition_penalty": 1, "top_p": 1.0, "streamer": None, "temperature": None, "max_new_tokens": None}
    assert session.generate([SAMPLE], **{**neutral, **NEW}) == session.generate([SAMPLE], **NEW)
    own = session.model.generation_config  # has the session's eos, pad and suppressed tokens
    assert session.generate([SAMPLE], generation_config=own, **NEW) == session.generate([SAMPLE], **NEW)


WRONG = [
    *({"max_new_tokens": value} for value in (0, -1, 1.5, "5", True, [3])),
    *({"temperature": value} for value in (-1, "hot", math.nan, math.inf, True)),
    *({"temperature": 1, "top_p": value} for value in (2, -1, "a", math.nan)),
    *({"do_sample": True, "top_k": value} for value in (-1, 1.5, "5")),
    *({"do_sample": value} for value in ("yes", 1)),
    *({"batch_size": value} for value in (0, -1, 1.5, "4", True)),
    *({"stop_strings": value} for value in ("", [""], 5, [3])),
    *({"eos_token_id": value} for value in ("a", -1, 400, [1, 400])),
    *({"suppress_tokens": value} for value in ("a", [-1], [10**6])),
    *({"repetition_penalty": value} for value in (0, -1, "a")),
    *({"num_beams": value} for value in (0, True, 1.5)),
    *({"bad_words_ids": value} for value in ([3], "a", [], [[400]])),
    *({"logits_processor": value} for value in (print, [1], "a")),
    *({"generation_config": value} for value in ({}, "greedy", GenerationConfig(foo=1))),
    {"min_new_tokens": -1},
    {"min_new_tokens": 20, "max_new_tokens": 5},
    {"max_length": 5},
    {"max_time": -1},
    {"typical_p": 2, "do_sample": True},
    {"do_sample": False, "temperature": 0.7},
    {"do_sample": True, "temperature": 0},
    {"top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.1},
    {"early_stopping": True},
    {"length_penalty": 0.5},
    {"early_stopping": "maybe", "num_beams": 2},
    {"sequence_bias": 3},
    {"exponential_decay_length_penalty": 4},
    {"exponential_decay_length_penalty": {}},
    {"watermarking_config": "a"},
    {"stopping_criteria": max},
    {"prefix_allowed_tokens_fn": 3},
    {"renormalize_logits": 1},
    {"input_ids": torch.ones(1, 2)},
]


@pytest.mark.parametrize("options", WRONG, ids=lambda options: str(options)[:50].replace("\n", " "))
def test_a_wrong_value_is_refused_before_any_work(session: Session, idle: list[int], options: dict) -> None:
    with pytest.raises(UserError) as caught:
        session.generate([SAMPLE], **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    named = [name for name in options if name != "generation_config"] or ["generat"]
    assert any(name in str(caught.value) for name in named) and not idle


@pytest.mark.parametrize(
    "name, nearest", [("max_tokens", "max_new_tokens"), ("temprature", "temperature"), ("num_beam", "num_beams")]
)
def test_an_unknown_option_names_the_nearest(session: Session, name: str, nearest: str) -> None:
    for ask in (session.chat, lambda *rest, **more: list(session.stream(*rest, **more))):
        with pytest.raises(UserError, match=f"generate has no option '{name}'; did you mean '{nearest}'"):
            ask("hello", **{name: 3})
    assert not session.conversation.messages


def test_beams_do_not_stream(session: Session) -> None:
    with pytest.raises(UserError, match="num_beams cannot stream"):
        next(session.stream("hello", num_beams=2))


def test_an_answer_has_as_many_tokens_as_there_is_room_for(session: Session) -> None:
    short = Sample([Message("user", WORDS[0])])
    length = session.make_prompt(short).length
    assert session.generate([short], max_length=length + 3) == session.generate([short], max_new_tokens=3)
    assert session.generate([short], max_length=length + 3, max_new_tokens=99) == session.generate(
        [short], max_new_tokens=3
    )
    longest = session.model.config.text_config.max_position_embeddings
    assert session.limit_new_tokens(session.make_prompt(short), 10**9) == longest - length


@pytest.mark.parametrize(
    "wrong", ["What?", SAMPLE, ["What?"], None, 5, [SAMPLE, None]], ids=lambda one: type(one).__name__
)
def test_samples_are_a_list_of_samples(session: Session, wrong: object) -> None:
    with pytest.raises(UserError, match=r"^expected a list of Sample, found .*\. `chat` takes a text"):
        session.generate(wrong)
    with pytest.raises(UserError, match="expected a list of Sample"):
        session.loglikelihood(wrong, [["a"]])
    for text in (None, 5, ["a"]):
        with pytest.raises(UserError, match="expected a question as text"):
            session.chat(text)
