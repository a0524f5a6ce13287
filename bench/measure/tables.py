"""Records as tables: every implementation of every case, and the short tables of bench/README.md.

python -m bench.measure.tables                # writes the newest record's tables into bench/README.md
python -m bench.measure.tables RECORD.jsonl   # prints all of a record
"""

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from bench.measure.accuracy import closest_to_limit
from bench.measure.markdown import line, table
from bench.measure.place import RESULTS, Record, place_of
from bench.measure.records import Results, read

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- written by python -m bench.measure.tables -->"
END = "<!-- end -->"
HEADER = "| case | fused, ms | rate | share of roof | plain ÷ fused | fastest competitor | peak MiB: fused, plain |"
COLUMNS = "| implementation | ms | rate | share of roof | peak MiB | ÷ fused | ÷ fastest competitor | rounds | result |"


# All of a record ------------------------------------------------------------------------------------------------------


def markdown(found: Results) -> str:
    """A table for each group, a row for each implementation, fastest first; what was skipped; where and how long."""
    lines: list[str] = []
    for group, rows in groupby(found.records, key=lambda record: record["group"]):
        members = sorted(rows, key=lambda record: record["ratio_to_fused"])
        lines += [f"## {group}", "", *table(COLUMNS, map(_full_row, members))]
        lines += [f"\nSkipped: {s['implementation']}: {s['reason']}" for s in found.skipped if s["group"] == group]
        lines.append("")
    lines += ["## Measured on", "", *(f"- {place}" for place in dict.fromkeys(map(place_of, found.records)))]
    lines += [f"- {s['finished']}: {s['records']} measurements in {s['wall_seconds']:.0f} s" for s in found.sessions]
    return "\n".join(lines) + "\n"


def _full_row(record: Record) -> str:
    tokens = f", {record['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in record else ""
    fastest = "" if record["ratio_to_fastest"] is None else f"{record['ratio_to_fastest']:.2f}"
    share = "" if record["share_of_roof"] is None else f"{record['share_of_roof']:.0%}"
    name = closest_to_limit(record["errors"], record["allowed"])
    limit = f"{name} {record['errors'][name]:.1e}, allowed {record['allowed'][name]:.1e}"
    verdict = f"{'right' if record['correct'] else '**wrong**'} ({limit})"
    return (
        f"| {record['implementation']} | {record['milliseconds']:.4g} | {_rate(record, 1)}{tokens} | {share} | "
        f"{record['peak_memory_mib']:.1f} | {ratio_of(record)} | {fastest} | {record['rounds']} | {verdict} |"
    )


def _rate(record: Record, flops_digits: int) -> str:
    if "gflops_per_second" in record:
        return f"{record['gflops_per_second']:.{flops_digits}f} GFLOP/s"
    return f"{record['gigabytes_per_second']:.1f} GB/s"


def ratio_of(record: Record) -> str:
    """The ratio to the fused time with its quartiles, which the earliest record does not have."""
    if record["implementation"] == "fused" or record["ratio_quartiles"] is None:
        return f"{record['ratio_to_fused']:.2f}"
    low, high = record["ratio_quartiles"]
    return f"{record['ratio_to_fused']:.2f} ({low:.2f}-{high:.2f})"


# The short tables -----------------------------------------------------------------------------------------------------


def newest(directory: Path = RESULTS) -> Path:
    """The record whose last session finished last; those of before sessions were recorded come first."""

    def finished(path: Path) -> str:
        return max((session["finished"] for session in read(path).sessions), default="")

    paths = sorted(directory.glob("*-threads.jsonl"))
    if not paths:
        raise FileNotFoundError(f"{directory} must hold a record, <date>-<device>.jsonl. Got none.")
    return max(paths, key=finished)


def render(path: Path) -> str:
    """A table for each subject, a row for each case; then what was wrong or skipped, and where it was measured."""
    found = read(path)
    lines = [f"From [{path.stem}](results/{path.name}).", ""]
    for subject, records in groupby(found.records, key=lambda record: record["subject"]):
        groups = groupby(records, key=lambda record: record["group"])
        lines += [f"**{subject[0].upper()}{subject[1:]}**", ""]
        lines += [*table(HEADER, (_short_row(list(rows)) for _, rows in groups)), ""]
    lines += _outcomes("Wrong", [r for r in found.records if not r["correct"]])
    lines += _outcomes("Skipped", found.skipped)
    lines += [f"- Measured {place}." for place in dict.fromkeys(map(place_of, found.records))]
    n_records, seconds = (sum(s[name] for s in found.sessions) for name in ("records", "wall_seconds"))
    return "\n".join([*lines, f"- {n_records} measurements took {seconds / 60:.0f} minutes."])


def _short_row(group: list[Record]) -> str:
    """A dash stands for what the record does not have: it may be of a part of the suite."""
    by_name = {record["implementation"]: record for record in group}
    fused, plain, fastest = (by_name.get(name) for name in ("fused", "plain", group[0]["fastest_competitor"]))
    of_fused = fused and [f"{fused['milliseconds']:.4g}", _rate(fused, 0), f"{fused['share_of_roof']:.0%}"]
    return line(
        group[0]["group"].removeprefix(group[0]["subject"]).strip(),
        *(of_fused or ["-"] * 3),
        ratio_of(plain) if plain else "-",
        f"{ratio_of(fastest)}, {fastest['implementation']}" if fastest else "-",
        ", ".join(f"{record['peak_memory_mib']:.0f}" if record else "-" for record in (fused, plain)),
    )


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
    if arguments:
        print(markdown(read(Path(arguments[0]))))
        return
    path = newest()
    README.write_text(insert(README.read_text(), render(path)))
    print(f"written: the tables of {path} into {README}")


if __name__ == "__main__":
    main(sys.argv[1:])
