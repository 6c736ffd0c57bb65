"""The planner: every sample once an epoch, steps that do not depend on how they are run, similar lengths together."""

import numpy as np
import pytest

from tinyllava.commands.look import measure_padding
from tinyllava.errors import UserError
from tinyllava.train.plan import Entry, Plan

LENGTHS = np.random.default_rng(0).integers(20, 400, 203)


def list_samples(batches: list[list[Entry]]) -> list[int]:
    return [entry.sample for batch in batches for entry in batch if not entry.is_filler]


def count_steps(plan: Plan) -> int:
    return -(-len(plan.lengths) // plan.global_batch_size)


def get_step(plan: Plan, epoch: int, step: int) -> np.ndarray:
    return plan.shuffle(epoch)[step * plan.global_batch_size : (step + 1) * plan.global_batch_size]


@pytest.mark.parametrize("world,micro", [(1, 32), (1, 4), (2, 8), (4, 2), (8, 4)])
def test_every_sample_once_an_epoch_whatever_runs_it(world: int, micro: int) -> None:
    plan = Plan(LENGTHS, 32, micro, world, seed=1)
    ranks = [list(plan.iterate_epoch(0, rank)) for rank in range(world)]
    assert sorted(index for batches in ranks for index in list_samples(batches)) == list(range(len(LENGTHS)))
    assert {len(batches) for batches in ranks} == {plan.batches_per_epoch}
    assert all(0 < len(batch) <= micro for batches in ranks for batch in batches)


def test_a_step_holds_the_same_samples_whatever_runs_it() -> None:
    one, eight = Plan(LENGTHS, 32, 32, 1, seed=1), Plan(LENGTHS, 32, 2, 8, seed=1)
    for step in range(count_steps(one)):
        np.testing.assert_array_equal(get_step(one, 0, step), get_step(eight, 0, step))
        shares = eight.split_step(get_step(eight, 0, step))
        assert sorted(sample for rank in shares for sample in list_samples(rank)) == sorted(
            get_step(one, 0, step).tolist()
        )


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    plan = Plan(LENGTHS, 32, 8, seed=1)
    assert list(plan.iterate_epoch(0)) != list(plan.iterate_epoch(1))
    assert list(plan.iterate_epoch(1)) == list(Plan(LENGTHS, 32, 8, seed=1).iterate_epoch(1))
    assert list(plan.iterate_epoch(0)) != list(Plan(LENGTHS, 32, 8, seed=2).iterate_epoch(0))


def padding_of_random_batches(size: int) -> float:
    lengths = LENGTHS[np.random.default_rng(0).permutation(len(LENGTHS))]
    chunks = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return 1 - sum(map(np.sum, chunks)) / sum(chunk.max() * len(chunk) for chunk in chunks)


def test_similar_lengths_share_a_micro_batch() -> None:
    plan = Plan(LENGTHS, 64, 8, seed=0)
    assert measure_padding(plan) < padding_of_random_batches(8) / 3


def test_small_steps_trade_samples_of_similar_length() -> None:
    plan = Plan(LENGTHS, 16, 16, seed=0)
    assert sorted(plan.shuffle(0)) == list(range(len(LENGTHS)))
    assert measure_padding(plan) < padding_of_random_batches(16) / 3
    means = [LENGTHS[get_step(plan, 0, step)].mean() for step in range(count_steps(plan))]
    assert means != sorted(means)  # but steps do not come in order of length


def test_ranks_carry_about_the_same_cost() -> None:
    plan = Plan(LENGTHS, 64, 4, 4, seed=0)
    shares = plan.split_step(get_step(plan, 0, 0))
    cost = [sum(len(batch) * LENGTHS[list_samples([batch])].max() for batch in rank) for rank in shares]
    assert max(cost) < 1.1 * min(cost)


def test_a_small_last_step_gives_every_rank_something_to_run() -> None:
    plan = Plan([10] * 33, 32, 4, 4, seed=0)
    shares = plan.split_step(get_step(plan, 0, 1))
    assert [len(rank) for rank in shares] == [1, 1, 1, 1]
    entries = [entry for rank in shares for batch in rank for entry in batch]
    assert sum(not entry.is_filler for entry in entries) == 1
    assert {entry.sample for entry in entries if entry.is_filler} == {int(get_step(plan, 0, 1)[0])}


def test_an_order_that_is_given_is_kept() -> None:
    batches = Plan([5] * 6, 2, 2, order=[3, 1, 5, 0, 2, 4]).iterate_epoch(0)
    assert [list_samples([batch]) for batch in batches] == [[3, 1], [5, 0], [4, 2]]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match=r"global_batch_size 10 is not a multiple of 2 device\(s\) x .* 4"):
        Plan(LENGTHS, 10, 4, 2)
    with pytest.raises(UserError, match="no samples"):
        Plan([], 4, 4)


@pytest.mark.parametrize("size", [4, 32, 100, 200])
@pytest.mark.parametrize("seed", range(4))
def test_the_longest_samples_of_the_first_epoch_come_first(size: int, seed: int) -> None:
    plan, before = Plan(LENGTHS, size, 4, seed=seed, longest_first=True), Plan(LENGTHS, size, 4, seed=seed)
    assert sorted(plan.shuffle(0)) == list(range(len(LENGTHS)))
    steps = [LENGTHS[get_step(plan, 0, step)].max() for step in range(count_steps(plan))]
    assert steps[0] == LENGTHS.max()
    if len(LENGTHS) >= 2 * size:
        assert steps[1] == max(steps[1:])
    # Only whole steps change places, and two samples where the longest ones were in the incomplete last step.
    old = {frozenset(get_step(before, 0, step)) for step in range(count_steps(plan))}
    new = {frozenset(get_step(plan, 0, step)) for step in range(count_steps(plan))}
    assert len(old - new) <= 3
    np.testing.assert_array_equal(plan.shuffle(1), before.shuffle(1))
    longest = [entry.sample for entry in next(plan.iterate_epoch(0))]
    assert LENGTHS[longest].max() == LENGTHS.max()  # also the first micro-batch of the step


def test_the_longest_sample_comes_first_on_some_rank_and_an_order_is_kept() -> None:
    plan = Plan(LENGTHS, 32, 4, 4, seed=1, longest_first=True)
    first = [LENGTHS[list_samples([next(plan.iterate_epoch(0, rank))])].max() for rank in range(4)]
    assert max(first) == LENGTHS.max()
    order = list(range(203))
    assert Plan(LENGTHS, 32, 4, order=order, longest_first=True).shuffle(0).tolist() == order
    assert sorted(Plan(LENGTHS[:20], 32, 4, longest_first=True).shuffle(0)) == list(range(20))  # less than a step
