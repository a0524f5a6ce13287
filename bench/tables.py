"""The current tables of bench/README.md, from a record of bench/results.

    python -m bench.tables [RECORD.json]

Without a record the newest is taken: the one whose last session finished last.
"""

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from bench.records import RESULTS, Record, place_of, ratio_of

README = Path(__file__).parent / "README.md"
BEGIN = "<!-- written by python -m bench.tables -->"
END = "<!-- end -->"
HEADER = "| case | fused, ms | rate | share of roof | plain ÷ fused | fastest competitor | peak MiB: fused, plain |"


def newest(directory: Path = RESULTS) -> Path:
    """The record whose last session finished last; those of before sessions were recorded come first."""

    def finished(path: Path) -> str:
        sessions = json.loads(path.read_text())["sessions"]
        return max((session["finished"] for session in sessions), default="")

    paths = sorted(directory.glob("*-threads.json"))
    if not paths:
        raise FileNotFoundError(f"{directory} must hold a record, <date>-<device>.json. Got none.")
    return max(paths, key=finished)


def render(path: Path) -> str:
    """A table for each subject, a row for each case; then what was wrong or skipped, and where it was measured."""
    found = json.loads(path.read_text())
    lines = [f"From [{path.stem}](results/{path.stem}.md), which has every implementation.", ""]
    for subject, records in groupby(found["records"], key=lambda record: record["subject"]):
        lines += [f"**{subject[0].upper()}{subject[1:]}**", "", HEADER, "|---|---|---|---|---|---|---|"]
        lines += [_row(list(rows)) for _, rows in groupby(records, key=lambda record: record["group"])] + [""]
    lines += _outcomes("Wrong", [r for r in found["records"] if not r["correct"]])
    lines += _outcomes("Skipped", found["skipped"])
    lines += [f"- Measured {place}." for place in dict.fromkeys(map(place_of, found["records"]))]
    lines += [
        f"- {session['records']} measurements took {session['wall_seconds']:.0f} s." for session in found["sessions"]
    ]
    others = [other for kind in ("scaling.png", "frontier.md") for other in sorted(path.parent.glob(f"*-{kind}"))]
    lines += [f"- [{other.name}](results/{other.name})" for other in others]
    return "\n".join(lines)


def _row(group: list[Record]) -> str:
    """A dash stands for what the record does not have: it may be of a part of the suite."""
    by_name = {record["implementation"]: record for record in group}
    fused, plain, fastest = (by_name.get(name) for name in ("fused", "plain", group[0]["fastest_competitor"]))
    cells = [
        group[0]["group"].removeprefix(group[0]["subject"]).strip(),
        *(
            ["-"] * 3
            if fused is None
            else [f"{fused['milliseconds']:.4g}", _rate(fused), f"{fused['share_of_roof']:.0%}"]
        ),
        "-" if plain is None else ratio_of(plain),
        "-" if fastest is None else f"{ratio_of(fastest)}, {fastest['implementation']}",
        ", ".join("-" if record is None else f"{record['peak_memory_mib']:.0f}" for record in (fused, plain)),
    ]
    return f"| {' | '.join(cells)} |"


def _rate(record: Record) -> str:
    giga = record.get("gflops_per_second")
    return f"{giga:.0f} GFLOP/s" if giga is not None else f"{record['gigabytes_per_second']:.1f} GB/s"


def _outcomes(title: str, records: Sequence[Record]) -> list[str]:
    """One line for all implementations with the number of cases each, as `Wrong: torch-chunked (3 cases)`."""
    names = [record["implementation"] + (f": {record['reason']}" if "reason" in record else "") for record in records]
    counted = ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
    return [f"- {title} (cases): {counted}."] if names else []


def insert(page: str, tables: str) -> str:
    """The page with the tables between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must hold the markers {BEGIN} and {END}, in this order. Got {page[:40]!r}...")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    path = Path(arguments[0]) if arguments else newest()
    README.write_text(insert(README.read_text(), render(path)))
    print(f"written: the tables of {path} into {README}")


if __name__ == "__main__":
    main(sys.argv[1:])
