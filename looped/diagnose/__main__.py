"""``python -m looped.diagnose RUN [RUN ...]``: diagnose saved runs and write a page that compares them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from looped.diagnose.diagnosis import check_run, diagnose_run
from looped.diagnose.findings import findings
from looped.diagnose.halting import check_rounds
from looped.diagnose.page import write_diagnosis
from looped.diagnose.record import record_of_run
from looped.run_directory import check_writable, load_run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if the input is bad. Then nothing is written but one line on stderr, why."""
    options = _parser().parse_args(argv)
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    try:
        check_rounds(options.rounds)
        out = _out_directory(options.runs, options.out)
        names = run_names(options.runs)
        device = _device(options.device)
        runs = [load_run(directory) for directory in options.runs]
        for name, run in zip(names, runs, strict=True):
            check_run(run, name=name, n_tokens=options.tokens, horizon=options.loops)
        check_writable(out)
        diagnoses = []
        for name, run in zip(names, runs, strict=True):
            print(f"diagnosing {name}", flush=True)
            diagnoses.append(
                diagnose_run(
                    run,
                    name=name,
                    n_tokens=options.tokens,
                    horizon=options.loops,
                    device=device,
                    rounds=options.rounds,
                )
            )
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


def run_names(directories: Sequence[Path]) -> list[str]:
    """A short name for each run: the ends of the paths, as long as is needed to tell them apart.

    Raises ValueError if two of them are the same directory.
    """
    paths = [directory.resolve().parts for directory in directories]
    repeated = next((path for path in paths if paths.count(path) > 1), None)
    if repeated is not None:
        raise ValueError(f"every run may be given once. Got {Path(*repeated)} again.")
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(Path(*path)) for path in paths]


def _out_directory(runs: Sequence[Path], out: Path | None) -> Path:
    if out is None:
        if len(runs) > 1:
            raise ValueError(f"out must be given for a page of several runs. Got {len(runs)} runs.")
        return record_of_run(runs[0]).parent
    return out


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that PyTorch finds here. Got device=cuda.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m looped.diagnose", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run that training wrote")
    parser.add_argument("--out", type=Path, help="directory of the page (default, for one run: RUN/diagnosis)")
    parser.add_argument("--tokens", type=int, default=8192, help="validation tokens to measure on (default: 8192)")
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
