"""How the decoder is carried out: dropout, autocast, dtypes, devices, compilation."""

from typing import Any

import pytest
import torch
from tiny_decoder import COMPILED, LAYERS, LENGTH, assert_same_gradients, gradients, model, reference_states, tokens
from torch import Tensor

import looped.kernels.device
from looped import attention
from looped.block import normalised_stream
from looped.dropout import dropout
from looped.model import LoopedLM


def test_dropout_acts_on_embeddings_attention_and_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model(dropout=0.25)
    drawn: list[float] = []
    original = attention.causal_attention

    def record(x: Tensor, p: float) -> Tensor:
        drawn.append(p)
        return dropout(x, p)

    def record_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float) -> Tensor:
        drawn.append(dropout_p)
        return original(q, k, v, dropout_p=dropout_p)

    for module in ("looped.recurrence", "looped.block"):
        monkeypatch.setattr(f"{module}.dropout", record)
    monkeypatch.setattr(attention, "causal_attention", record_attention)
    decoder(tokens(), n_loops=2)
    assert drawn == [0.25] * (1 + 2 * 2 * LAYERS)
    state = decoder.embed(tokens())
    assert 0.1 < (state == 0).float().mean() < 0.4
    evaluated = decoder.eval()(tokens()).states[-1]
    torch.testing.assert_close(evaluated, reference_states(decoder, tokens(), 3)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rotary", "inter_loop_norm": True},
        {"block_norm": "sandwich", "injection": "add", "loop_rank": 2},
        {"block_norm": "sandwich-sum", "injection": "diagonal", "n_coda": 1},
    ],
    ids=str,
)
def test_autocast_keeps_the_residual_stream_in_fp32(
    fused: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looped.kernels.device, "multiplies_faster", lambda dtype: True)
    decoder = model(fused=fused, **changes)
    inputs = tokens(8, LENGTH)
    exact = decoder(inputs).states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = decoder(inputs).states
    for state, wanted in zip(states, exact, strict=True):
        assert state.dtype == torch.float32
        assert not torch.equal(state, wanted)
        assert (state - wanted).norm() < 0.03 * wanted.norm()
    assert all(torch.isfinite(g).all() for g in gradients(decoder, states).values())


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_forms_fused_products_in_fp32_where_that_is_faster(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looped.kernels.device, "multiplies_faster", lambda dtype: False)
    decoder = model(fused=fused)
    exact = decoder(tokens()).states[-1]
    exact_logits = decoder.readout_logits(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = decoder(tokens()).states[-1]
        logits = decoder.readout_logits(state)
    assert torch.equal(state, exact) == torch.equal(logits, exact_logits) == fused


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_parameters(fused: bool) -> None:
    decoder = model(fused=fused, inter_loop_norm=True, positions="rotary")
    exact = decoder(tokens()).states[-1]
    low = decoder.bfloat16()(tokens()).states
    assert all(state.dtype == torch.bfloat16 for state in low)
    torch.testing.assert_close(low[-1].float(), exact, atol=0.3, rtol=0.1)


def test_builds_on_the_meta_device_and_loads_later() -> None:
    source = model(positions="rotary", inter_loop_norm=True)
    with torch.device("meta"):
        decoder = LoopedLM(source.config, fused=False)
    decoder.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(decoder(tokens()).states[-1], source(tokens()).states[-1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph(fused: bool, autocast: bool) -> None:
    torch._dynamo.reset()
    changes: dict[str, Any] = {"positions": "rotary", "inter_loop_norm": True} if fused == autocast else {}
    decoder = model(fused=fused, **changes, **COMPILED)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = decoder(tokens()).states
        states = compiled(tokens()).states
    for a, b in zip(states, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(decoder, states), gradients(decoder, expected), 1e-2 if autocast else 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_compiles_with_checkpointed_loops_and_dropout(fused: bool) -> None:
    torch._dynamo.reset()
    decoder = model(fused=fused, dropout=0.2, **COMPILED)
    decoder.checkpoint_loops = True
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    found = gradients(decoder, compiled(tokens()).states)
    assert found.keys() == {name for name, _ in decoder.named_parameters()} - {"readout_norm.weight"}
    assert all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_does_not_round_what_is_fed_back(fused: bool) -> None:
    decoder = model(fused=fused, inter_loop_norm=True)
    assert decoder.loop_norm is not None
    state = decoder(tokens()).states[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fed_back = normalised_stream(state, None, decoder.loop_norm, decoder.implementation)
    assert fed_back.dtype == torch.float32
    torch.testing.assert_close(fed_back, normalised_stream(state, None, decoder.loop_norm, decoder.implementation))
