"""Count the records that cannot be used as they are: for training, and for `tinyllava data check`."""

from typing import Any

from tinyllava.data.sample import SampleError
from tinyllava.errors import UserError

FIRST_IDS = 10  # ids that are kept of each kind
SHORTENED = "shortened"  # a record of this kind is still used, without its last rounds


class BadRecords:
    """Bad records by kind: their number, the first ids, and what is wrong with the first."""

    def __init__(self) -> None:
        self._kinds: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return sum(entry["count"] for entry in self._kinds.values())

    def add(self, kind: str, identity: str, text: str) -> None:
        """Count one record."""
        entry = self._kinds.setdefault(kind, {"count": 0, "ids": [], "first": text})
        entry["count"] += 1
        if len(entry["ids"]) < FIRST_IDS:
            entry["ids"].append(f"{identity:.80}")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{kind: {"count", "ids": the first ten, "first": what is wrong with the first}}, as in run.json.

        It is not a copy: the counts of a stream grow while it is read, and the record of the run must show the latest.
        """
        return self._kinds

    def count_kinds(self) -> dict[str, int]:
        """Records of each kind, most frequent first."""
        return dict(sorted(((kind, entry["count"]) for kind, entry in self._kinds.items()), key=lambda item: -item[1]))

    def refuse(self, records: int, source: str) -> None:
        """Raise UserError if any of the `records` records is bad. Shortened records are not bad.

        source: what the message tells the user to give to `tinyllava data check`.
        """
        counts = {kind: count for kind, count in self.count_kinds().items() if kind != SHORTENED}
        if not counts:
            return
        kinds = "; ".join(f"{count} {kind} ({self._format_ids(kind)})" for kind, count in counts.items())
        worst = self._kinds[next(iter(counts))]
        raise UserError(
            f"{sum(counts.values())} of {records} records cannot be used: {kinds}. "
            f"{worst['ids'][0]}: {worst['first']}.\n"
            f"Run `tinyllava data check {source}` to see all, or set `on_bad_sample: skip`."
        )

    def _format_ids(self, kind: str, number: int = 3) -> str:
        entry = self._kinds[kind]
        return ", ".join(entry["ids"][:number]) + (", ..." if entry["count"] > number else "")


def describe_bad_record(identity: str, error: SampleError) -> str:
    """The message for one record that is found to be bad while it is loaded."""
    return f"record {identity:.80}: {error.text}. Repair it, or set `on_bad_sample: skip`."
