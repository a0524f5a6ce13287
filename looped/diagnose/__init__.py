"""What does the loss of a looped model control? Measurements of any recurrent-depth model, a verdict, and a page.

`python -m looped.diagnose RUN` for a run of this project; for another model, describe it as a LoopedModel and call
`diagnose` and `write_diagnosis`. `read_record` reads the numbers of a page back.

Definitions: Sharma & Vu, arXiv 2606.24898.
"""

from looped.diagnose.adapted import from_model
from looped.diagnose.diagnosis import Diagnosis, diagnose, diagnose_run, validation_batches
from looped.diagnose.model import Batch, LoopedModel, from_decoder
from looped.diagnose.page import write_diagnosis
from looped.diagnose.record import read_diagnosis_of_run, read_record, write_record

__all__ = [
    "Batch",
    "Diagnosis",
    "LoopedModel",
    "diagnose",
    "diagnose_run",
    "from_decoder",
    "from_model",
    "read_diagnosis_of_run",
    "read_record",
    "validation_batches",
    "write_diagnosis",
    "write_record",
]
