"""The page of bench/gpu_static.py: its report as Markdown, and which of the project's targets the predictions meet."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
MAIN_GPU = "H100"
READOUT_TARGETS = {"K4-N8192-d768-V20000": 1.30, "K4-N8192-d2048-V128256": 1.12}  # of the GEMM floor
BACKWARD_TARGET = 1.3  # of the byte roof
LAUNCHES_TARGET = 49
DHEAD_ERROR_LIMIT = 2.0  # times plain PyTorch's, as for every implementation that is timed


class Verdict(NamedTuple):
    """A target, what is predicted, and whether that meets it."""

    target: str
    predicted: str
    met: bool


def _readouts(report: Row, shape: str, gpu: str = MAIN_GPU, **fields: Any) -> list[Row]:
    rows = [row for row in report["readouts"] if row["shape"] == shape and row["gpu"] == gpu]
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _time_of(row: Row) -> str:
    return f"{row['implementation']} {row['predicted_ms']:.2f} ms"


def is_right(row: Row) -> bool:
    """Whether the error of an implementation's dW stays within the limit, as far as it is known."""
    return row["dhead_error"] is None or row["dhead_error"] <= DHEAD_ERROR_LIMIT


def verdicts(report: Row) -> list[Verdict]:
    """The targets on the main GPU; the readout's hold for every job that it does at 6 K N d V FLOPs."""
    found = []
    for shape, limit in READOUT_TARGETS.items():
        ours, others = _readouts(report, shape, ours=True), _readouts(report, shape, ours=False)
        peers = [row for row in others if is_right(row)]
        share = max(row["predicted_over_floor"] for row in ours)
        found.append(Verdict(f"readout {shape} within {limit:.2f}x of its GEMM floor", f"{share:.3f}x", share <= limit))
        if peers:
            slowest = max(ours, key=lambda row: row["predicted_ms"])
            fastest = min(peers, key=lambda row: row["predicted_ms"])
            words = f"{slowest['predicted_ms']:.2f} ms; {_time_of(fastest)}"
            if wrong := [row for row in others if row not in peers and row["predicted_ms"] < fastest["predicted_ms"]]:
                words += f" (not counted, for the error of dW: {'; '.join(map(_time_of, _by_time(wrong)))})"
            target = f"readout {shape} below every other library that is right"
            found.append(Verdict(target, words, slowest["predicted_ms"] < fastest["predicted_ms"]))
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


def elsewhere(report: Row) -> list[str]:
    """Where no target is set: the slowest of ours and the fastest library that is right, on every other GPU."""
    cells = []
    for gpu, shape in itertools.product((name for name in _gpus(report) if name != MAIN_GPU), READOUT_TARGETS):
        ours = max(_readouts(report, shape, gpu, ours=True), key=lambda row: row["predicted_ms"])
        peers = [row for row in _readouts(report, shape, gpu, ours=False) if is_right(row)]
        if peers:
            fastest = min(peers, key=lambda row: row["predicted_ms"])
            quotient = ours["predicted_ms"] / fastest["predicted_ms"]
            words = f"{quotient:.2f}" if quotient < 1 else f"**{quotient:.2f}**"
            cells.append([f"{gpu}, {shape}", f"{ours['launches']}", _time_of(ours), _time_of(fastest), words])
    if not cells:
        return []
    header = ["readout", "launches of ours", "slowest of ours, *predicted*", "fastest other, *predicted*", "quotient"]
    return ["Where no target is set:", "", *table(header, cells)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown: the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return [*("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)), ""]


def _by_time(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["predicted_ms"])


def _gpus(report: Row) -> list[str]:
    return list(report["gpus"])


def _shown(report: Row) -> list[str]:
    """The GPUs whose readouts are shown in full: the main one, or else the first, and the one that is present."""
    main = MAIN_GPU if MAIN_GPU in report["gpus"] else _gpus(report)[0]
    return list(dict.fromkeys([main, *([report["measured_gpu"]] if report["measured_gpu"] else [])]))


def _measured_heading(report: Row, gpu: str | None = None) -> list[str]:
    """The heading of measured times, in the tables where there are any: of all GPUs, or of one."""
    measured = report["measured_gpu"] is not None and gpu in (None, report["measured_gpu"])
    return [f"measured on {report['measured_on']}"] if measured else []


def _measured(report: Row, row: Row, *names: str) -> list[str]:
    """The cell under that heading: empty for the GPUs that are not there, or the error of what failed."""
    if report["measured_gpu"] is None:
        return []
    times = ", ".join(f"{row[name]:.2f}" for name in names if name in row)
    return [times or row.get("measured_error", "").replace("|", "/")]


def readout_section(report: Row) -> list[str]:
    lines = [
        "## The readout, forward and backward",
        "",
        "K = 4 states in bfloat16, RMSNorm, mean cross-entropy, gradients of states, head and norm weight. Launches,",
        "FLOPs and temporaries (beyond inputs and gradients) are counted; GB and ms are predicted. An asterisk marks",
        "bytes that follow from the library's algorithm, not from its tensors: cut-cross-entropy's sweeps of the head.",
        "What its tiles move between caches and its locks cost is not charged. Nor is a host wait, which leaves the",
        "device idle until the host has launched again: in favour of the libraries that have them; ours has none.",
        "Liger scales its gradients in one more pass where the upstream gradient is not 1; ours always does.",
        "*dW's error*, of a dW that is rounded to bfloat16 after every chunk, over plain PyTorch's, is measured,",
        f"on a CPU. As in the other benches, more than {DHEAD_ERROR_LIMIT:g} times is **wrong** and no competitor.",
        "",
    ]
    header = ["launches", "host waits", "FLOPs / 6KNdV", "*predicted* GB", "temporaries, MiB", "dW's error"]
    for gpu, shape in itertools.product(_shown(report), READOUT_TARGETS):
        rows = _by_time(_readouts(report, shape, gpu))
        if not rows:
            continue
        measured = [f"{heading}, ms" for heading in _measured_heading(report, gpu)]
        lines += [f"{shape}, {gpu}; GEMM floor {rows[0]['predicted_floor_ms']:.2f} ms *predicted*:", ""]
        cells = [
            [
                ("**" + row["implementation"] + "**" if row["ours"] else row["implementation"])
                + ("*" if row["implementation"].startswith("cut-") else ""),
                f"{row['launches']}",
                f"{row['host_waits']}",
                f"{row['flops_over_6KNdV']:.2f}",
                f"{row['predicted_gigabytes']:.1f}",
                f"{row['temporary_MiB']:.0f}",
                _dhead_error(row),
                f"{row['predicted_ms']:.2f}",
                f"{row['predicted_over_floor']:.2f}",
                *(_measured(report, row, "measured_ms") if measured else []),
            ]
            for row in rows
        ]
        lines += table(["implementation", *header, "*predicted* ms", "*predicted* / floor", *measured], cells)
    return lines + _readouts_elsewhere(report)


def _dhead_error(row: Row) -> str:
    if row["dhead_error"] is None:
        return ""
    return f"{row['dhead_error']:.2f}" + ("" if is_right(row) else " **wrong**")


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
    return lines + table(["readout", *(f"{gpu}, *predicted*" for gpu in _gpus(report))], cells)


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
            *_measured(report, row, "forward_measured_us", "backward_measured_us"),
        ]
        for row in report["norms"]
    ]
    measured = [f"{heading}: forward, backward, us" for heading in _measured_heading(report)]
    header = ["norm", "launches", "*predicted* forward", "launches", "*predicted* backward", *measured]
    return lines + table(header, cells)


def step_section(report: Row) -> list[str]:
    measured = [f"{heading}, ms" for heading in _measured_heading(report)]
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
            *_measured(report, row, "measured_ms"),
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
    return lines + table(["step", *(f"{part}, *predicted* ms" for part in parts)], cells)


def _accesses(row: Row) -> str:
    """Widest loads and stores in bytes a thread, with the number of instructions of every width."""
    return ", ".join(f"{access}B x{count}" for access, count in row["accesses"].items())


def kernel_section(report: Row) -> list[str]:
    lines = [
        "## Kernels",
        "",
        "As compiled for each GPU, bfloat16. Spills: bytes of stack and instructions on local memory. Occupancy: the",
        "share of a multiprocessor's warps that resident programs fill, from registers, shared memory and warps.",
        "Accesses: instructions by width a thread. Bytes, FLOPs and time are of one launch. What the tiles of",
        "stream_kernel read from the last cache level is not charged: 2 (1/128 + 1/64) bytes a multiply-add on NVIDIA,",
        "which is more than such caches are known to give at the charged rate, so that its time is a lower bound.",
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
                    f"{row['predicted_megabytes']:.1f}",
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
    if report["measured_gpu"]:
        lines.append(
            f"All but the columns headed measured: times on {report['measured_on']}, by CUDA events, caches flushed."
        )
    lines += [*(f"Left out: {reason}." for reason in dict.fromkeys(report["left_out"])), ""]
    rates = [
        [name, f"{gpu['peak_teraflops']:.0f}", f"{gpu['peak_terabytes_per_s']:.2f}", f"{gpu['multiprocessors']}"]
        for name, gpu in report["gpus"].items()
    ]
    lines += table(["GPU", "peak TFLOP/s, dense bf16", "peak TB/s", "multiprocessors"], rates)
    if MAIN_GPU in report["gpus"]:
        lines += [f"## Targets, on {MAIN_GPU}", ""]
        judged = [[v.target, v.predicted, "met" if v.met else "**missed**"] for v in verdicts(report)]
        lines += table(["target", "*predicted*", ""], judged) + elsewhere(report)
    sections = (readout_section, norm_section, step_section, kernel_section)
    return "\n".join([*lines, *(line for section in sections for line in section(report))]).rstrip() + "\n"
