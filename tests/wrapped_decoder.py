"""A decoder behind transformers' calls, and the shapes that it is tried in."""

import pytest
import tiny_decoder

from looped.transformers import LoopedForCausalLM, LoopedPretrainedConfig

SHAPES = [
    {},
    {"positions": "rotary", "tied": False, "inter_loop_norm": True, "block_norm": "sandwich"},
    {"positions": "rotary", "n_prelude": 1, "n_coda": 2, "injection": "concat", "start": "noise"},
    {"readout": "final-only", "loop_embedding": True, "loop_rank": 3},
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def wrapped(*, run=None, supervision="per-loop", penalty=0.0, **changes):
    """A decoder with weights away from their start, and the same behind transformers' calls."""
    decoder = tiny_decoder.model(fused=True, **changes).eval()
    config = LoopedPretrainedConfig.of(decoder.config, supervision=supervision, penalty=penalty, run=run)
    model = LoopedForCausalLM(config).eval()
    model.decoder.load_state_dict(decoder.state_dict())
    return decoder, model
