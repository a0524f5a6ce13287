"""Diagnose saved runs and write a page that compares them: ``python -m looped.diagnose RUN [RUN ...]``.

Or one model as transformers saves it, an export or one of others that is known:
``python -m looped.diagnose --model NAME_OR_PATH --data FILES --out DIR``.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from looped.command_line import Parser, device_named
from looped.config import at_least
from looped.diagnose.diagnosis import Diagnosis, check_run, diagnose_run
from looped.diagnose.findings import findings
from looped.diagnose.page import write_diagnosis
from looped.diagnose.pretrained import load_pretrained, scale_checks, scale_table
from looped.diagnose.record import record_of_run
from looped.run_directory import check_writable, load_run

# Options of --model, and what they are where they are not given.
OF_A_MODEL = {"data": None, "seq_len": None, "trust_remote_code": False, "scale_loops": 0}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if the input is bad. Then nothing is written but one line on stderr, why."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.runs and options.model is None:
        parser.error("a RUN or --model must be given")
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    try:
        at_least(0, rounds=options.rounds)
        out = _out_directory(options)
        diagnoses = _of_runs(options, out) if options.model is None else _of_a_model(options, out)
        write_diagnosis(diagnoses, out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for diagnosis in diagnoses:
        print(f"\n{diagnosis.name}: {diagnosis.verdict.advice}")
        for finding in findings(diagnosis.measured):
            print(f"  {finding.question:58} {finding.answer}")
    print(f"\npage {out / 'index.html'}")
    return 0


def _of_runs(options: argparse.Namespace, out: Path) -> list[Diagnosis]:
    names = run_names(options.runs)
    device = device_named(options.device)
    runs = dict(zip(names, map(load_run, options.runs), strict=True))
    extent = {"n_tokens": options.tokens, "horizon": options.loops}
    for name, run in runs.items():
        check_run(run, name=name, **extent)
    check_writable(out)
    diagnoses = []
    for name, run in runs.items():
        print(f"diagnosing {name}", flush=True)
        diagnoses.append(diagnose_run(run, name=name, device=device, rounds=options.rounds, **extent))
    return diagnoses


def _of_a_model(options: argparse.Namespace, out: Path) -> list[Diagnosis]:
    """The diagnosis of a model by name; the checks of its scale are printed, and written beside the page."""
    at_least(0, scale_loops=options.scale_loops)
    pretrained = load_pretrained(
        options.model,
        options.data,
        n_tokens=options.tokens,
        seq_len=options.seq_len,
        device=device_named(options.device),
        trust_remote_code=options.trust_remote_code,
    )
    check_writable(out)
    print(f"diagnosing {pretrained.name}", flush=True)
    diagnosis = pretrained.diagnose(options.loops, rounds=options.rounds)
    if options.scale_loops:
        checks = scale_checks(pretrained.model, pretrained.batches, options.scale_loops)
        print(scale_table(checks), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / "scale.json").write_text(json.dumps([*map(asdict, checks)], indent=1) + "\n", encoding="utf-8")
    return [diagnosis]


def run_names(directories: Sequence[Path]) -> list[str]:
    """A short name for each run: the ends of the paths, as long as is needed to tell them apart.

    Raises ValueError if two of them are the same directory.
    """
    paths = [directory.resolve().parts for directory in directories]
    repeated = next((path for path in paths if paths.count(path) > 1), None)
    if repeated is not None:
        raise ValueError(f"every run may be given once. Got {Path(*repeated)} again.")
    length = next(n for n in itertools.count(1) if len({path[-n:] for path in paths}) == len(paths))
    return ["/".join(path[-length:]) for path in paths]


def _out_directory(options: argparse.Namespace) -> Path:
    """Where the page goes. Raises ValueError for a request that is not whole."""
    if options.model is not None:
        if options.runs:
            raise ValueError(f"runs and --model must not be given at once. Got {options.runs[0]} and {options.model}.")
        for name in ("data", "out"):
            if getattr(options, name) is None:
                raise ValueError(f"{name} must be given for --model {options.model}. Got none.")
        return Path(options.out)
    for name, default in OF_A_MODEL.items():
        if getattr(options, name) != default:
            raise ValueError(f"{name} must be given with --model alone. Got {getattr(options, name)} for a RUN.")
    if options.out is None:
        if len(options.runs) > 1:
            raise ValueError(f"out must be given for a page of several runs. Got {len(options.runs)} runs.")
        return record_of_run(options.runs[0]).parent
    return Path(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m looped.diagnose", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="directory of a run that training wrote")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a model of transformers or the hub, instead of runs")
    parser.add_argument("--data", metavar="FILES", help="for --model: text files, or a .safetensors file with tokens")
    parser.set_defaults(**OF_A_MODEL)
    parser.add_argument("--seq-len", type=int, help="for --model: tokens of a window (default: 256 or the longest)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="for --model: run the code that comes with the model"
    )
    parser.add_argument(
        "--scale-loops", type=int, metavar="K",
        help="for --model: also scale H_1..H_K before the readout, with its norm and without (Ouro's checks: 8)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="directory of the page (default, for one run: RUN/diagnosis)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to measure on (default: 8192)")
    parser.add_argument("--loops", type=int, default=30, help="loops over which the state is followed (default: 30)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of the halting policies' speed, 0 for none (default: 5)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure (default: auto)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
