"""What is kept of a session of benchmarks: a dated file of JSON lines under bench/results, one a measurement.

`kind` says what a line is: a `place` (device, versions, commit, date); a `measurement` or a `fact` with the number of
its place; what was `skipped` and why; a `session` and how long it took.  A fact is any other thing found out, by its
name.  What follows from other lines is not written: the fastest competitor of a group and the ratio to it.
"""

import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure.accuracy import Errors
from bench.measure.implementation import is_ours
from bench.measure.place import RESULTS, Record, path_in

DERIVED = ("smoke", "fastest_competitor", "ratio_to_fastest")
OF_A_PLACE = ("device", "instructions", "threads", "memory", "versions", "commit", "date")
DIGITS = 6  # of a number in a file


@dataclass
class Session:
    """What one run has measured and skipped since it started."""

    records: list[Record] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)  # group, implementation, reason
    facts: list[Record] = field(default_factory=list)  # name, its values, and the place
    start: float = field(default_factory=time.time)
    errors_of_plain: dict[str, Errors] = field(default_factory=dict)  # by group

    def plain_errors(self, group: str, measured: Callable[[], Errors]) -> Errors:
        """Those of plain PyTorch, measured once for all implementations of a group."""
        if group not in self.errors_of_plain:
            self.errors_of_plain[group] = measured()
        return self.errors_of_plain[group]

    def reference_seconds(self, group: str) -> float | None:
        """Of a round of the fused implementation, where it has been timed."""
        found = [r for r in self.records if r["group"] == group and r["implementation"] == "fused"]
        return found[-1]["milliseconds"] / 1e3 if found else None

    def line(self, n_records: int) -> Record:
        """Of the file: when it started, how long it has taken, and how much it has measured."""
        now = time.time()
        started, finished = (
            datetime.datetime.fromtimestamp(t).astimezone().isoformat(timespec="microseconds")
            for t in (self.start, now)
        )
        counts = {"records": n_records, "skipped": len(self.skipped)}
        return {"started": started, "finished": finished, "wall_seconds": now - self.start, **counts}


@dataclass
class Results:
    """The content of a file."""

    records: list[Record] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)
    sessions: list[Record] = field(default_factory=list)
    facts: list[Record] = field(default_factory=list)


def complete(records: list[Record]) -> None:
    """Add what follows from other records of a group, as far as it has been measured: roofs, the fastest competitor.

    The fused implementation took turns with the roof, and the others with it: their share of the roof is its share
    over their ratio to it, None in a group without it.
    """
    fused = {record["group"]: record["share_of_roof"] for record in records if record["implementation"] == "fused"}
    for record in records:
        if record["group"] in fused:
            record["share_of_roof"] = fused[record["group"]] / record["ratio_to_fused"]
    compare(records)


def compare(records: list[Record]) -> None:
    """Add `fastest_competitor` and `ratio_to_fastest` to every record; both are None in a group without a competitor.

    The competitors are the implementations other than ours whose results are right.  `ratio_to_fastest` is the
    quotient of two ratios to the fused time, each of them a median of paired quotients; 0.5 means twice as fast as the
    fastest competitor.
    """
    fastest: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: record["ratio_to_fused"]):
        if record["correct"] and not is_ours(record["implementation"]):
            fastest.setdefault(record["group"], record)
    for record in records:
        best = fastest.get(record["group"])
        record["fastest_competitor"] = best and best["implementation"]
        record["ratio_to_fastest"] = best and record["ratio_to_fused"] / best["ratio_to_fused"]


def write(session: Session, directory: Path = RESULTS) -> Path | None:
    """Write `<date>-<device>.jsonl`, as often as one likes.  None if there is nothing to write.

    Where a file of the same day and device exists, what is measured now replaces the same implementation on the same
    case in it and all else stays, each record with its own commit.  Smoke measurements never enter bench/results.
    """
    own_place = directory != RESULTS
    kept = [record for record in session.records if own_place or not record.get("smoke")]
    skipped = [record for record in session.skipped if own_place or not record["group"].startswith("smoke ")]
    if not (kept or session.facts):
        return None
    place = (kept or session.facts)[0]
    path = path_in(directory, place, ".jsonl")
    found = read(path) if path.exists() else Results()
    now = {_key(record) for record in (*kept, *skipped)}
    names = {fact["name"] for fact in session.facts}
    line = session.line(len(kept))
    found.facts = [fact for fact in found.facts if fact["name"] not in names] + session.facts
    found.records = [record for record in found.records if _key(record) not in now] + kept
    found.skipped = [record for record in found.skipped if _key(record) not in now] + skipped
    found.records.sort(key=lambda record: (record["subject"], record["group"]))  # stable within a group
    found.sessions = [each for each in found.sessions if each.get("started") != line["started"]] + [line]
    complete(found.records)
    directory.mkdir(parents=True, exist_ok=True)
    write_lines(path, lines_of(found))
    return path


def write_lines(path: Path, lines: Iterable[Record]) -> None:
    """JSON lines, their numbers rounded."""

    def rounded(line: Record) -> Record:
        return json.loads(json.dumps(line), parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))

    path.write_text("".join(json.dumps(rounded(line)) + "\n" for line in lines))


def lines_of(found: Results) -> Iterator[Record]:
    """The lines of a file; a place comes before the measurements that were made there."""
    places: list[Record] = []
    for kind, records in (("measurement", found.records), ("fact", found.facts)):
        for record in records:
            place = {name: record[name] for name in OF_A_PLACE if name in record}
            if place not in places:
                places.append(place)
                yield {"kind": "place", "place": len(places) - 1, **place}
            own = {name: value for name, value in record.items() if name not in (*OF_A_PLACE, *DERIVED)}
            yield {"kind": kind, "place": places.index(place), **own}
    yield from ({"kind": "skipped", **record} for record in found.skipped)
    yield from ({"kind": "session", **record} for record in found.sessions)


def read(path: Path) -> Results:
    """A file's content, every record with its place and its ratio to the fastest competitor."""
    found, places = Results(), {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        kind = line.pop("kind")
        if kind == "place":
            places[line.pop("place")] = line
        elif kind in ("measurement", "fact"):
            (found.records if kind == "measurement" else found.facts).append(line | places[line.pop("place")])
        else:
            {"skipped": found.skipped, "session": found.sessions}[kind].append(line)
    compare(found.records)
    return found


def _key(record: Record) -> tuple[str, str]:
    return record["group"], record["implementation"]
