"""The engine: batches, orders, shared prefixes and rows that leave change no answer, for every kind of LLM."""

import random
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import LLAMA, SIGLIP
from tests.many_llms import LLMS, OTHERS, grouped
from tests.tiny_session import NEW, PICTURES, WORDS, question, tiny_session
from tinyllava.data.sample import Message, Sample
from tinyllava.infer import Session, prefix
from tinyllava.infer.engine import Engine
from tinyllava.infer.prefix import plan_sharing
from tinyllava.infer.prompts import Prompt


def answer_one_at_a_time(session: Session, samples: list[Sample]) -> list[str]:
    """One at a time by transformers' `generate`, nothing kept."""
    answers = []
    for sample in samples:
        session.images.cache.clear()
        answers += session._generate([session.make_prompt(sample)], **NEW)
    return answers


@pytest.mark.parametrize("name", [*LLMS, *OTHERS])
def test_a_batch_changes_nothing(name: str, monkeypatch) -> None:
    session = tiny_session((LLMS | OTHERS)[name], tower=SIGLIP)
    shared = []
    prefill = Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda self, prompts, how: shared.append(how) or prefill(self, prompts, how))
    samples = grouped(3)
    alone = answer_one_at_a_time(session, samples)
    assert len(set(alone)) >= 12
    for size in (2, 7, None):
        order = list(range(len(samples)))
        random.Random(size).shuffle(order)
        answers = session.generate([samples[at] for at in order], batch_size=size, **NEW)
        assert answers == [alone[at] for at in order], f"batches of {size}"
    blind = [Sample(sample.messages, []) for sample in samples if not sample.images]
    assert session.generate(blind, **NEW) == answer_one_at_a_time(session, blind)
    assert (session.engine.position_bytes is None) == (name in OTHERS)
    assert any(shared) == (name in LLMS)


@pytest.fixture(scope="module")
def session() -> Session:
    """One model for the tests that do not change it."""
    return tiny_session()


def test_answers_come_as_they_end_and_rows_that_ended_leave(session: Session, monkeypatch) -> None:
    samples = [question(seed) for seed in range(16)]
    whole = session.generate(samples, max_new_tokens=24)
    made: list[list[int]] = []
    text = type(session.reader).decode
    monkeypatch.setattr(type(session.reader), "decode", lambda self, ids: made.append(ids) or text(self, ids))
    session.generate(samples, max_new_tokens=24)
    ends = frozenset(ids[5] for ids in made[:10])  # ends many answers early, and others never
    monkeypatch.setattr(session, "reader", session.reader._replace(end_ids=ends))
    alone = {seed: session.generate([sample], max_new_tokens=24)[0] for seed, sample in enumerate(samples)}
    assert list(alone.values()) != whole
    rows: list[int] = []
    run = Engine._run
    monkeypatch.setattr(
        Engine, "_run", lambda self, embeds, *rest: rows.append(len(embeds)) or run(self, embeds, *rest)
    )
    stream = session.generate_each(samples, max_new_tokens=24)
    came = [next(stream)]
    assert len(rows) < 20  # the first answer does not wait for the last
    came += list(stream)
    assert dict(came) == alone and len(came) == 16
    assert 16 in rows and rows[-1] <= 8


def test_two_streams_of_answers_take_turns(session: Session) -> None:
    samples = [question(seed) for seed in range(6)]
    answers = session.generate(samples, **NEW)
    pair: tuple[Iterator, ...] = (session.generate_each(samples, **NEW), session.generate_each(samples[::-1], **NEW))
    first, second = {}, {}
    for (at, answer), (other, same) in zip(*pair, strict=True):
        first[at], second[5 - other] = answer, same
    assert [first[at] for at in range(6)] == answers == [second[at] for at in range(6)]


def make_prompt(ids: list[int], *images: str) -> Prompt:
    return Prompt(ids, [((image,), image) for image in images])


def test_what_is_shared_is_what_rows_have_in_common() -> None:
    picture = list(range(100, 140))
    rows = [make_prompt([1, *picture, 2, *range(n)], "a") for n in (1, 3, 5)]
    plan = plan_sharing(rows)
    assert plan.new == 4 and plan.owner == [0, 0, 0]  # all begin with the picture and what the shortest says
    assert [(piece.start, piece.stop) for piece in plan.prefixes] == [(0, 43)]
    other = make_prompt([1, *picture, 2, 7, 7], "b")  # the same ids, another picture
    plan = plan_sharing([*rows, other])
    assert plan.owner == [0, 0, 0, 1] and plan.prefixes[1].stop == other.length - plan.new
    assert plan_sharing(rows[:1]) is None and plan_sharing([rows[0], other]) is None
    # Nothing in common, and too long to be cut for others.
    long = [make_prompt([5, *range(n, n + 60)]) for n in range(3)]
    assert plan_sharing(long) is None
    mixed = plan_sharing([*rows * 3, *long])
    assert mixed.new == 4 and len(mixed.prefixes) == 4
    assert plan_sharing(rows, least=20).new == 20


def test_memory_does_not_grow_with_the_questions(session: Session, monkeypatch) -> None:
    held = []
    monkeypatch.setattr("tinyllava.infer.session.CACHE_BYTES", session.engine.position_bytes * 400)
    greedy = Engine.generate_greedy
    monkeypatch.setattr(
        Engine,
        "generate_greedy",
        lambda self, rows, *rest: held.append([one.length for one in rows]) or greedy(self, rows, *rest),
    )
    for count in (20, 200):
        held.clear()
        samples = [
            Sample([Message("user", f"<image>\n{WORDS[0]} {at % 9}")], [PICTURES[at % 4]]) for at in range(count)
        ]
        list(session.generate_each(samples, max_new_tokens=2))
        assert max(len(rows) * max(rows) for rows in held) <= 400 and sum(map(len, held)) == count
        assert len(session.images.cache) == 4


def test_keys_and_values_grow_in_blocks(monkeypatch) -> None:
    monkeypatch.setattr(prefix, "BLOCK", 3)
    cache, kept = prefix.make_cache(), []
    for step in range(9):
        states = torch.randn(2, 1, 4 if step == 0 else 1, 5)
        kept.append(states)
        keys, values = cache.update(states, states * 2, 0)
        assert torch.equal(keys, torch.cat(kept, dim=2)) and torch.equal(values, keys * 2)
        if step == 5:
            cache.batch_select_indices(torch.tensor([1]))
            kept = [torch.cat(kept, dim=2)[1:]]
            break
    keys, _ = cache.update(kept[0][:, :, :1], kept[0][:, :, :1], 0)
    assert torch.equal(keys, torch.cat([kept[0], kept[0][:, :, :1]], dim=2))


def test_an_llm_that_keeps_something_else_is_found_out(monkeypatch) -> None:
    session = tiny_session()
    forward = session.engine.llm.forward
    seen = []

    def remembers(*args, inputs_embeds, **kwargs):  # a state beside the cache, as token shifts have
        seen.append(inputs_embeds.mean())
        return forward(*args, inputs_embeds=inputs_embeds + seen[0] * len(seen), **kwargs)

    monkeypatch.setattr(session.engine.llm, "forward", remembers)
    assert session.engine.position_bytes is None
    numbers = 2 * LLAMA["num_hidden_layers"] * LLAMA["num_key_value_heads"] * 8
    assert tiny_session().engine.position_bytes == numbers * 4
