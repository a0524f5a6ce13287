"""The chunked pass, and a whole training step through it on both backends."""

import pytest
import torch

from looped.config import LoopedConfig
from looped.model import LoopedLM


@pytest.mark.parametrize("readout", ["rmsnorm", "final-only"])
def test_training_step_of_a_decoder(backend, device, readout):
    """Forward, loss, backward and AdamW through the fused path, against plain PyTorch."""
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=67,
        d_model=16,
        n_heads=2,
        n_layers=2,
        n_loops=3,
        d_ff=24,
        max_seq_len=8,
        dropout=0.0,
        readout=readout,
    )
    tokens = torch.randint(67, (2, 9)).to(device)
    models = [LoopedLM(config, fused=fused).to(device) for fused in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            result = model(tokens[:, :-1], tokens[:, 1:].contiguous(), penalty=0.01)
            result.loss.backward()
            optimizer.step()
        losses.append(result)
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[0].per_loop, losses[1].per_loop, rtol=1e-5, atol=1e-5)
    for (name, fused), plain in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4, msg=name)
