"""Decoding steps on fake CUDA tensors: nothing in them makes the host wait, so that a CUDA graph can hold them.

The values that the host reads between steps are answered.
"""

import json

import pytest
from test_fake_gpu import FAKE_GPU
from uninterpreted import run

PROGRAM = """
import itertools, json
from looped.config import LoopedConfig
from looped.generate import Exit, Options, stream
from looped.graph import CudaGraphs
from looped.halting import MARGIN, STATE_CHANGE
from looped.model import LoopedLM

def answer(x):
    return next(booleans) if x.dtype == torch.bool else 1

config = LoopedConfig(vocab_size=512, d_model=128, n_heads=2, n_layers=2, d_ff=256, max_seq_len=64, n_loops=3,
                      dropout=0.0, n_coda=1, positions="rotary")
found = {}
with fake_gpu(TARGETS["sm_90"], {torch.ops.aten._local_scalar_dense.default: answer}) as record:
    model = LoopedLM(config).to("cuda").eval()
    device = torch.device("cuda", 0)
    for name, changes in {
        "fixed": {}, "margin": {"exit": Exit(MARGIN, 1.0)}, "state": {"exit": Exit(STATE_CHANGE, -1.0)},
        "speculation": {"draft_loops": 1},
    }.items():
        launch = CudaGraphs(device)
        booleans = itertools.chain([True], itertools.repeat(False))  # logits are finite; nobody leaves
        steps = stream(model, [[1, 2, 3], [4]], Options(max_new_tokens=24, **changes), launch=launch)
        for number, step in enumerate(steps):
            waits = [wait.partition(", ")[2].partition(" (")[0] for wait in record.host_copies]
            launches = len(record.calls)
            record.clear()
            if number == 8:
                break
        found[name] = {"refusal": launch.refusal, "waits": waits, "launches": launches,
                       "graphs": len(launch._captured)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return json.loads(run(FAKE_GPU + PROGRAM).splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "n_graphs"),
    [("fixed", 1), ("margin", 1 + 3 + 1), ("state", 1 + 3 + 1), ("speculation", 2)],
)
def test_steps_are_graphs(found: dict[str, dict], name: str, n_graphs: int) -> None:
    """With early exit: what comes before the loops, each loop, and the readout of the last."""
    assert found[name]["refusal"] is None
    assert found[name]["graphs"] == n_graphs


def test_a_step_of_fixed_depth_waits_for_its_tokens_alone(found: dict[str, dict]) -> None:
    """For the random numbers that are sent, and the two rows' tokens that are fetched."""
    assert found["fixed"]["waits"] == ["uniforms", "take", "take"]
