"""The chunked pass, and a whole training step through it on both backends."""

import pytest
import torch

from kernels.readout import chunks
from looped.config import LoopedConfig
from looped.decoder import LoopedDecoder
from looped.supervision import looped_loss


@pytest.mark.parametrize("active", [[0, 1, 2], [0, 2], [2], []])
@pytest.mark.parametrize(("n_tokens", "chunk_rows"), [(7, 1), (7, 3), (7, 7), (7, 10), (7, 100), (1, 2), (0, 4)])
def test_chunks_cover_every_row_of_the_active_loops_once_and_in_order(active, n_tokens, chunk_rows):
    seen = []
    for pieces in chunks(active, n_tokens, chunk_rows):
        first = 0
        for piece in pieces:
            assert piece.first == first
            assert piece.rows == slice(first, first + piece.stop - piece.start)
            first += piece.stop - piece.start
            seen += [(piece.loop, token) for token in range(piece.start, piece.stop)]
        assert 0 < first <= chunk_rows
    assert seen == [(loop, token) for loop in active for token in range(n_tokens)]


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
    models = [LoopedDecoder(config, fused=fused).to(device) for fused in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            result = looped_loss(model, model(tokens[:, :-1]), tokens[:, 1:].contiguous(), penalty=0.01)
            result.loss.backward()
            optimizer.step()
        losses.append(result)
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[0].per_loop, losses[1].per_loop, rtol=1e-5, atol=1e-5)
    for (name, fused), plain in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4, msg=name)
