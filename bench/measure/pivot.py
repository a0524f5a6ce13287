"""A record as one short table a subject: a row an implementation, a column a case."""

from itertools import groupby

from bench.measure.markdown import crossed
from bench.measure.place import Record
from bench.measure.records import Results
from looped.peak_flops import peak_tflops


def table(found: Results) -> str:
    """What was measured, the host's times, what became of every part, and what is missing."""
    lines: list[str] = []
    for subject, rows in groupby(found.records, key=lambda record: record["subject"]):
        titled = [(record, record["group"].replace(subject, "").strip()) for record in rows]
        lines += [*crossed(subject, {(r["implementation"], title): _cell(r) for r, title in titled}), ""]
    host = {(f["subject"], f["mode"]): f"{f['microseconds']:.1f}" for f in found.facts if "microseconds" in f}
    if host:
        lines += [*crossed("host, microseconds a call", host), ""]
    alone = {(f["kernel"], f["case"]): _rate(f) for f in found.facts if "kernel" in f}
    if alone:
        lines += [*crossed("kernel alone", alone), ""]
    for fact in found.facts:
        if "passed" in fact:
            counts = f"{fact['passed']} passed, {len(fact['failed'])} failed, {fact['not_run']} not run"
            lines.append(" ".join([f"{fact['name']}: {counts}", *fact["failed"]]))
        elif "outcome" in fact:
            lines.append(f"{fact['name']}: {fact['outcome']}")
    reasons = {(skip["implementation"], skip["reason"]): None for skip in found.skipped}
    return "\n".join([*lines, *(f"missing: {name}: {reason}" for name, reason in reasons)])


def _rate(fact: Record) -> str:
    return "{kernel_microseconds:.1f} us, {terabytes_per_second:.2f} TB/s, {copies:.2f} copies".format_map(fact)


def _cell(record: Record) -> str:
    """Time and memory, or, where bytes are moved, bytes per second; of a step its tokens and its share of the peak."""
    wrong = "" if record["correct"] else ", **wrong**"
    if "gigabytes_per_second" in record:
        return f"{record['gigabytes_per_second']:,.0f} GB/s{wrong}"
    cell = f"{record['milliseconds']:.4g} ms, {record['peak_memory_mib']:,.0f} MiB{wrong}"
    if "tokens_per_second" not in record:
        return cell
    peak = peak_tflops(record["device"])
    share = "" if peak is None else f", MFU {record['gflops_per_second'] / peak / 10:.1f}%"
    return f"{cell}, {record['tokens_per_second']:,.0f} tokens/s{share}"
