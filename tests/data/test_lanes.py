"""Streams in shares: what a step holds does not depend on who reads it, or on where it resumed."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from tinyllava import lanes
from tinyllava.config import DataSpec
from tinyllava.data.sources import Source, open_source
from tinyllava.errors import UserError
from tinyllava.lanes import Dealer, Place

TEXT = datasets.Value("string")
FEATURES = datasets.Features({"id": TEXT, "messages": datasets.List({"role": TEXT, "content": TEXT})})
TURNS = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "it"}]


def write_files(folder: Path, sizes: Sequence[int], row_group: int = 1000) -> Source:
    """A stream of Parquet files with these numbers of records, whose ids are 0, 1, 2, ..."""
    folder.mkdir(exist_ok=True)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        ids = [str(row) for row in range(start, start + size)]
        table = datasets.Dataset.from_dict({"id": ids, "messages": [TURNS] * size}, features=FEATURES)
        table.to_parquet(folder / f"part-{number:05}.parquet", batch_size=row_group)
    return open_source(DataSpec(path=str(folder / "*.parquet"), streaming=True))


def generate_parts(parts: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Columns may change their type from record to record, which Arrow refuses."""
    for start, size in parts:
        for row in range(start, start + size):
            yield {"id": str(row), "messages": TURNS, "images": [] if row % 2 else "a.png"}


def make_source(sizes: Sequence[int]) -> Source:
    """The same records from a generator, as a user's own format has it. Opening its shards is fast."""
    parts = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    stream = datasets.IterableDataset.from_generator(generate_parts, gen_kwargs={"parts": parts})
    return Source("mine", stream, lambda record: record, [], "", "")


class Lanes:
    """The ids that each lane reads, step by step, from where it is."""

    def __init__(self, source: Source, mine: Sequence[int], total: int, places: dict | None = None, bad: Sequence = ()):
        self.dealer, self.mine, self.bad = Dealer(source, (7, 0), mine, total, places or {}), mine, set(bad)

    def take(self, steps: int) -> list[dict[int, str]]:
        def make(record: dict[str, Any]) -> str | None:
            return None if record["id"] in self.bad else record["id"]

        return [{lane: self.dealer.take(lane, make) for lane in self.mine} for _ in range(steps)]


# The numbers of records in the files of a source. There are 8 lanes.
LAYOUTS = {
    "one": [50],
    "two": [40, 3],
    "even": [6] * 8,
    "many": [3] * 130,
    "empty": [0, 9, 0, 0, 5],
    "few": [3],
    "single": [1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_do_not_depend_on_ranks_workers_or_a_resume(layout: str) -> None:
    source, total, steps = make_source(LAYOUTS[layout]), 8, 20
    whole = Lanes(source, range(total), total).take(steps)
    for shares in ([range(0, 8, 2), range(1, 8, 2)], [[lane] for lane in range(8)], [[0, 5, 7], [1, 2, 3, 4, 6]]):
        parts = [Lanes(source, share, total).take(steps) for share in shares]
        assert [{lane: one for part in row for lane, one in part.items()} for row in zip(*parts, strict=True)] == [
            dict(step) for step in whole
        ]
    before = Lanes(source, range(total), total)
    assert before.take(7) == whole[:7]
    places = {lane: Place(*list(place)) for lane, place in before.dealer.places.items()}
    for share in (range(8), range(0, 8, 2), [3]):  # resumed by other processes
        after = Lanes(source, share, total, places).take(steps - 7)
        assert after == [{lane: step[lane] for lane in share} for step in whole[7:]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_record_comes_once_in_a_pass_and_no_tail_is_lost(layout: str) -> None:
    source, total = make_source(LAYOUTS[layout]), 8
    records = sum(LAYOUTS[layout])
    read = Lanes(source, range(total), total)
    seen: Counter[str] = Counter()
    while min(place.turn for place in read.dealer.places.values()) < 16:
        seen.update(read.take(1)[0].values())
    assert len(seen) == records
    # Lanes are in their 17th pass or later. A lane with more records than others is behind by some passes.
    assert max(seen.values()) <= 1.35 * min(seen.values()) + 3


def test_passes_are_shuffled_anew(tmp_path: Path) -> None:
    source = write_files(tmp_path / "data", [10] * 4)
    ids = [step[0] for step in Lanes(source, [0], 1).take(120)]
    passes = [ids[start : start + 40] for start in (0, 40, 80)]
    assert all(sorted(each, key=int) == [str(n) for n in range(40)] for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0] and passes[0] != sorted(passes[0], key=int)


def test_bad_records_are_replaced_within_their_lane(tmp_path: Path) -> None:
    source, total = write_files(tmp_path / "data", [64]), 8
    plain = Lanes(source, range(total), total).take(8)
    bad = [plain[2][5], plain[3][5], plain[0][1]]
    read = Lanes(source, range(total), total, bad=bad)
    rows = read.take(6)
    for lane in set(range(total)) - {1, 5}:
        assert [row[lane] for row in rows] == [row[lane] for row in plain[:6]]
    assert [row[5] for row in rows] == [plain[step][5] for step in (0, 1, 4, 5, 6, 7)]
    assert [row[1] for row in rows] == [plain[step][1] for step in (1, 2, 3, 4, 5, 6)]


def test_a_source_without_a_usable_record_is_an_error_and_no_endless_loop() -> None:
    for sizes in ([0, 0], [5], [400, 400], [0] * 63 + [2]):
        with pytest.raises(UserError, match=r"mine has no usable record: \d+ bad ones in \d+ passes"):
            Lanes(make_source(sizes), range(8), 8, bad=map(str, range(1000))).take(1)
    # One good record of five: each of 8 lanes finds it, in its own pass. So with one full file of 64.
    assert set(Lanes(make_source([5]), range(8), 8, bad="0124").take(1)[0].values()) == {"3"}
    assert set(Lanes(make_source([0] * 63 + [2]), range(64), 64).take(1)[0].values()) == {"0", "1"}


def test_a_lane_that_falls_behind_gets_a_reading_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records that wait for it have a limit, and its order is the same without one."""
    source = write_files(tmp_path / "data", [600])
    wanted = [step[2] for step in Lanes(source, [2], 4).take(100)]
    monkeypatch.setattr(lanes, "QUEUED", 30)
    monkeypatch.setattr(lanes, "SHUFFLED", 40)
    small = [step[2] for step in Lanes(source, [2], 4).take(100)]
    both = Lanes(source, [1, 2], 4)
    for _ in range(100):  # lane 2 waits
        both.dealer.take(1, lambda record: record["id"])
        assert (
            sum(len(queue) for reading in both.dealer.readings.values() for queue in reading.queues.values()) <= 2 * 60
        )
    assert [both.dealer.take(2, lambda record: record["id"]) for _ in range(100)] == small
    assert sorted(small) != sorted(wanted) or small != wanted  # blocks of another size are another order


def test_shards_are_read_by_those_who_own_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups are shards: 16 of them for 8 lanes are 2 each. With fewer than lanes, a group of lanes shares one."""
    counts: Counter[int] = Counter()
    original = Source.iterate_shard

    def count(self: Source, shard: int, start: int = 0):
        counts[shard] += 1
        return original(self, shard, start)

    monkeypatch.setattr(Source, "iterate_shard", count)
    for sizes, group, mine, expected in (([40, 40], 5, [3], 2), ([10] * 4, 10, [0, 4], 1), ([20], 100, range(8), 1)):
        counts.clear()
        source = write_files(tmp_path / str(len(sizes)), sizes, group)
        Lanes(source, mine, 8).take(sum(sizes) // 8)
        assert len(counts) == expected and set(counts.values()) == {1}


def test_json_that_streams_is_dealt_out_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"id": str(row), "messages": TURNS}) for row in range(300)))
    source = open_source(DataSpec(path=str(path), streaming=True))
    assert source.count_shards() == 4
    assert [record["id"] for record in source.iterate()] == [str(row) for row in range(300)]
    assert sorted((step[0] for step in Lanes(source, [0], 1).take(300)), key=int) == [str(row) for row in range(300)]
    one = [row for shard in range(4) for row in source.iterate_shard(shard, 70)]
    assert len(one) == 4 * 5


def test_lanes_get_equal_numbers_of_shards() -> None:
    """130 shards on 8 lanes are 16 or 17 each, which is even enough. 12 are 3 for each of 4 groups of lanes."""
    for shards, groups in ((130, 8), (12, 4), (7, 1), (8, 8), (1, 1)):
        assert Dealer(make_source([2] * shards), (7, 0), range(8), 8, {}).groups == groups


def test_a_file_that_is_damaged_in_its_middle_is_named(tmp_path: Path) -> None:
    source = write_files(tmp_path / "data", [500])
    path = tmp_path / "data" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[40 : len(content) // 2] = b"x" * (len(content) // 2 - 40)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"\*\.parquet cannot be read \(shard 0\): .*Copy it again\."):
        Lanes(source, [0], 1).take(1)
