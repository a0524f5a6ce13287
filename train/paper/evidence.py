"""What is known of a complete run: the evaluation that training left, and a diagnosis, which is made once."""

from dataclasses import dataclass
from pathlib import Path

from looped.diagnose import Diagnosis, diagnose_run
from looped.diagnose.record import record_of_run, write_record
from looped.diagnose.verdict import Measurements
from looped.run_directory import load_run
from train.paper.runs import RunResult

HORIZON = 30  # loops over which the paper follows the state


@dataclass(frozen=True)
class Evidence:
    """A complete run of one condition and seed. diagnosis.name: the condition."""

    result: RunResult
    diagnosis: Diagnosis

    @property
    def measured(self) -> Measurements:
        """Of the diagnosis."""
        return self.diagnosis.measured


def make_diagnosis(run: Path, n_tokens: int, device: str = "cpu") -> Diagnosis:
    """Diagnose a run on about ``n_tokens`` validation tokens and keep the record with it. Raises as diagnose_run."""
    diagnosis = diagnose_run(load_run(run), n_tokens=n_tokens, horizon=HORIZON, device=device)
    write_record([diagnosis], record_of_run(run))
    return diagnosis
