"""Speed of the frontier: whose turn it is, what is timed against what."""

import dataclasses

import torch

from looped.config import LoopedConfig
from looped.model import LoopedLM
from train import step
from train.paper.frontier_speed import DEVICE, architecture, competitors, throughput


def test_conditions_and_depths_take_turns(monkeypatch):
    turns: list[tuple[str, int]] = []
    seconds = {("a", 1): 1.0, ("b", 1): 2.0, ("a", 2): 4.0, ("b", 2): 8.0}

    def timed(call, device):
        assert call() is None
        return seconds[turns[-1]] if len(turns) > 4 else 1e9  # the first round warms up

    class Turn(LoopedLM):
        def forward(self, tokens, *, n_loops=None, logits=False):
            turns.append((self.name, n_loops))
            output = super().forward(tokens, n_loops=n_loops, logits=logits)
            assert len(output.states) == n_loops
            assert output.logits.shape == (2, 4, 11)
            return output

    config = LoopedConfig(vocab_size=11, d_model=8, n_heads=2, n_layers=1, n_loops=2, d_ff=8, max_seq_len=4)
    models = {name: Turn(config).to(DEVICE).eval() for name in "ab"}
    for name, model in models.items():
        model.name = name
    monkeypatch.setattr(step, "seconds_of", timed)
    inputs = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    rates = throughput(models, inputs, torch.float32, 3)
    assert turns == list(seconds) * 4
    for (name, depth), duration in seconds.items():
        assert rates[name][depth - 1] == (8 / duration,) * 3


def test_architecture_and_competitors():
    config = LoopedConfig(vocab_size=11, d_model=8, n_heads=2, n_layers=1, n_loops=2, d_ff=8, max_seq_len=4)
    shapes = {
        readout: architecture(dataclasses.replace(config, readout=readout))
        for readout in ("rmsnorm", "final-only", "raw", "layernorm")
    }
    assert shapes["rmsnorm"] == shapes["final-only"]
    assert len(set(shapes.values())) == 3
    assert architecture(dataclasses.replace(config, inter_loop_norm=True)) != shapes["rmsnorm"]
    model = LoopedLM(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    for other in competitors(model).values():
        assert not other.fused
        torch.testing.assert_close(other(tokens).states, model(tokens).states)
    assert model.fused
