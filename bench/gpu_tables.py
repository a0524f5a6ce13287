"""The page of bench/gpu_static.py: its report as Markdown, and which of the project's targets the predictions meet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
MAIN_GPU = "H100"
READOUT_TARGETS = {"K4-N8192-d768-V20000": 1.30, "K4-N8192-d2048-V128256": 1.12}  # of the GEMM floor
BACKWARD_TARGET = 1.3  # of the byte roof
LAUNCHES_TARGET = 49


class Verdict(NamedTuple):
    """A target, what is predicted, and whether that meets it."""

    target: str
    predicted: str
    met: bool


def _readouts(report: Row, shape: str, **fields: Any) -> list[Row]:
    rows = [row for row in report["readouts"] if row["shape"] == shape and row["gpu"] == MAIN_GPU]
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def verdicts(report: Row) -> list[Verdict]:
    """The targets on the main GPU; the readout's hold for every job that it does at 6 K N d V FLOPs."""
    found = []
    for shape, limit in READOUT_TARGETS.items():
        ours, peers = _readouts(report, shape, ours=True), _readouts(report, shape, ours=False)
        share = max(row["predicted_over_floor"] for row in ours)
        found.append(Verdict(f"readout {shape} within {limit:.2f}x of its GEMM floor", f"{share:.3f}x", share <= limit))
        if peers:
            slowest = max(ours, key=lambda row: row["predicted_ms"])
            fastest = min(peers, key=lambda row: row["predicted_ms"])
            found.append(
                Verdict(
                    f"readout {shape} below every other library",
                    f"{slowest['predicted_ms']:.2f} ms; {fastest['implementation']} {fastest['predicted_ms']:.2f} ms",
                    slowest["predicted_ms"] < fastest["predicted_ms"],
                )
            )
        flops = max(row["flops_over_6KNdV"] for row in ours if row["weighted"])
        found.append(Verdict(f"readout {shape}: weights [K, N] at no extra FLOPs", f"{flops:.3f} x 6KNdV", flops <= 1))
    launches = max(row["launches"] for shape in READOUT_TARGETS for row in _readouts(report, shape, ours=True))
    found.append(Verdict(f"readout in at most {LAUNCHES_TARGET} launches", f"{launches}", launches <= LAUNCHES_TARGET))
    backward = max(
        row["backward_predicted_over_roof"]
        for row in report["norms"]
        if row["gpu"] == MAIN_GPU and row["implementation"] == "rms_norm_penalty"
    )
    target = f"norm + penalty backward within {BACKWARD_TARGET:.1f}x of its byte roof"
    return [*found, Verdict(target, f"{backward:.2f}x", backward <= BACKWARD_TARGET)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown: the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return [*("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)), ""]


def _by_time(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["predicted_ms"])


def _gpus(report: Row) -> list[str]:
    return list(report["gpus"])


def _measured(report: Row, row: Row) -> list[str]:
    return [f"{row['measured_ms']:.2f}"] if report["measured_on"] else []


def readout_section(report: Row) -> list[str]:
    lines = [
        "## The readout, forward and backward",
        "",
        "K = 4 states in bfloat16, RMSNorm, mean cross-entropy, gradients of states, head and norm weight. Launches,",
        "FLOPs and temporaries (beyond inputs and gradients) are counted; GB and ms are predicted. An asterisk marks",
        "bytes that follow from the library's algorithm, not from its tensors: cut-cross-entropy's sweeps of the head.",
        "What its tiles move between caches and its locks cost is not charged.",
        "",
    ]
    measured = [f"measured ms, {report['measured_on']}"] if report["measured_on"] else []
    header = ["launches", "host waits", "FLOPs / 6KNdV", "*predicted* GB", "temporaries, MiB", "*predicted* ms"]
    for shape in READOUT_TARGETS:
        rows = _by_time(_readouts(report, shape))
        if not rows:
            continue
        lines += [f"{shape}, {MAIN_GPU}; GEMM floor {rows[0]['floor_ms']:.2f} ms *predicted*:", ""]
        cells = [
            [
                ("**" + row["implementation"] + "**" if row["ours"] else row["implementation"])
                + ("*" if row["implementation"].startswith("cut-") else ""),
                f"{row['launches']}",
                f"{row['host_waits']}",
                f"{row['flops_over_6KNdV']:.2f}",
                f"{row['gigabytes']:.1f}",
                f"{row['temporary_MiB']:.0f}",
                f"{row['predicted_ms']:.2f}",
                f"{row['predicted_over_floor']:.2f}",
                *_measured(report, row),
            ]
            for row in rows
        ]
        lines += table(["implementation", *header, "*predicted* / floor", *measured], cells)
    return lines + _readouts_elsewhere(report)


def _readouts_elsewhere(report: Row) -> list[str]:
    if len(_gpus(report)) == 1:
        return []
    lines = ["*Predicted* ms, and the quotient with the GEMM floor, on every GPU:", ""]
    names = list(dict.fromkeys((row["shape"], row["implementation"]) for row in report["readouts"]))
    found = {(row["shape"], row["implementation"], row["gpu"]): row for row in report["readouts"]}
    cells = []
    for shape, name in names:
        rows = [found[shape, name, gpu] for gpu in _gpus(report)]
        cells.append(
            [f"{shape}, {name}", *(f"{row['predicted_ms']:.2f} ({row['predicted_over_floor']:.2f})" for row in rows)]
        )
    return lines + table(["readout", *_gpus(report)], cells)


def norm_section(report: Row) -> list[str]:
    lines = [
        "## RMSNorm and penalty",
        "",
        "Rows in bfloat16; the roof of the forward pass is one read and one write of the rows, of the backward pass",
        "two reads and one write. *Predicted* microseconds, and the quotient with the roof:",
        "",
    ]
    cells = [
        [
            f"{row['implementation']}, {row['rows']} x {row['d']}, {row['gpu']}",
            f"{row['forward_launches']}",
            f"{row['forward_predicted_us']:.0f} ({row['forward_predicted_over_roof']:.2f})",
            f"{row['backward_launches']}",
            f"{row['backward_predicted_us']:.0f} ({row['backward_predicted_over_roof']:.2f})",
        ]
        for row in report["norms"]
    ]
    return lines + table(["norm", "launches", "*predicted* forward", "launches", "*predicted* backward"], cells)


def step_section(report: Row) -> list[str]:
    measured = [f"measured ms, {report['measured_on']}"] if report["measured_on"] else []
    lines = [
        "## A training step",
        "",
        f"{report['steps'][0]['step'].rpartition(',')[0]}, bfloat16 autocast, AdamW:",
        "",
    ]
    cells = [
        [
            f"{row['gpu']}, {'fused' if row['fused'] else 'plain'}",
            f"{row['launches']}",
            f"{row['host_waits']}",
            f"{row['peak_MiB']:.0f}",
            f"{row['predicted_ms']:.1f}",
            f"{row['predicted_tokens_per_s'] / 1e3:.0f}k",
            f"{100 * row['predicted_mfu']:.0f}%",
            *_measured(report, row),
        ]
        for row in report["steps"]
    ]
    header = ["launches", "host waits", "peak MiB", "*predicted* ms", "*predicted* tokens/s", "*predicted* MFU"]
    lines += table(["step", *header, *measured], cells)
    lines += ["MFU: the model's FLOPs over time and peak dense bf16 rate. *Predicted* ms by part:", ""]
    parts = list(dict.fromkeys(part for row in report["steps"] for part in row["predicted_ms_by_part"]))
    cells = [
        [
            f"{row['gpu']}, {'fused' if row['fused'] else 'plain'}",
            *(f"{row['predicted_ms_by_part'].get(part, 0):.1f}" for part in parts),
        ]
        for row in report["steps"]
    ]
    return lines + table(["step", *parts], cells)


def _accesses(row: Row) -> str:
    """Widest loads and stores in bytes a thread, with the number of instructions of every width."""
    return ", ".join(f"{access}B x{count}" for access, count in row["accesses"].items())


def kernel_section(report: Row) -> list[str]:
    lines = [
        "## Kernels",
        "",
        "As compiled for each GPU, bfloat16. Spills: bytes of stack and instructions on local memory. Occupancy: the",
        "share of a multiprocessor's warps that resident programs fill, from registers, shared memory and warps.",
        "Accesses: instructions by width a thread. Bytes, FLOPs and time are of one launch.",
        "",
    ]
    header = ["programs", "registers", "spills", "shared KiB", "occupancy", "global accesses", "matrix instructions"]
    for gpu in _gpus(report):
        for shape in READOUT_TARGETS:
            rows = [row for row in report["kernels"] if row["gpu"] == gpu and row["shape"] == shape]
            lines += [f"{gpu}, {shape}:", ""]
            cells = [
                [
                    f"{row['kernel']} ({row['op'].removeprefix('looped::')})",
                    " x ".join(map(str, row["programs"])),
                    f"{row['registers']}",
                    f"{row['spills']}",
                    f"{row['shared_KiB']:.1f}",
                    f"{100 * row['occupancy']:.0f}%",
                    _accesses(row),
                    f"{row['matrix_instructions']}",
                    f"{row['megabytes']:.1f}",
                    f"{row['gigaflops']:.0f}",
                    f"{row['predicted_us']:.1f} ({row['predicted_bound']})",
                ]
                for row in rows
            ]
            lines += table(["kernel (op)", *header, "*predicted* MB", "GFLOP", "*predicted* us (bound)"], cells)
    return lines


def page(report: Row) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in report["versions"].items())
    lines = [
        "# GPUs, predicted",
        "",
        f"Written by `python -m bench.gpu_static` on {report['date']}, commit {report['commit'] or 'unknown'};",
        f"{versions}.",
        "",
        "**Every time on this page is *predicted***, from the calls that the programs make on tensors without memory",
        "and from kernels that were compiled and not run; bench/gpu_roofline.py says how. Assumed rates:",
        f"{report['flops_share']:.2f} of the peak FLOP/s, {report['bytes_share']:.1f} of the peak bandwidth.",
    ]
    if report["measured_on"]:
        lines.append(f"Columns headed *measured* are times on {report['measured_on']}, by CUDA events, caches flushed.")
    lines += [*(f"Left out: {reason}." for reason in dict.fromkeys(report["left_out"])), ""]
    rates = [
        [name, f"{gpu['peak_teraflops']:.0f}", f"{gpu['peak_terabytes_per_s']:.2f}", f"{gpu['multiprocessors']}"]
        for name, gpu in report["gpus"].items()
    ]
    lines += table(["GPU", "peak TFLOP/s, dense bf16", "peak TB/s", "multiprocessors"], rates)
    if MAIN_GPU in report["gpus"]:
        lines += [f"## Targets, on {MAIN_GPU}", ""]
        judged = [[v.target, v.predicted, "met" if v.met else "**missed**"] for v in verdicts(report)]
        lines += table(["target", "*predicted*", ""], judged)
    sections = (readout_section, norm_section, step_section, kernel_section)
    return "\n".join([*lines, *(line for section in sections for line in section(report))]).rstrip() + "\n"
