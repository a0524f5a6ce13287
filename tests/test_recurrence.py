"""The states against an independent reference, fused against plain, and what the model promises of its parts."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from tiny_decoder import (
    FF,
    LAYERS,
    LENGTH,
    D,
    V,
    assert_same_gradients,
    config,
    gradients,
    model,
    reference_read,
    reference_states,
    tokens,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from looped.config import PRESETS
from looped.model import LoopedLM

VARIANTS: list[dict[str, Any]] = [
    {},
    {"positions": "rotary", "rope_theta": 100.0},
    {"inter_loop_norm": True},
    {"positions": "rotary", "inter_loop_norm": True, "tied": False},
    {"readout": "raw", "tied": False, "embedding_std": 0.02},
    {"n_prelude": 1, "n_coda": 2},
    {"injection": "add", "start": "zero", "block_norm": "sandwich", "inter_loop_norm": True},
    {"injection": "concat", "n_prelude": 1, "start": "noise", "block_norm": "sandwich-sum", "positions": "rotary"},
    {"injection": "diagonal", "n_coda": 1, "loop_embedding": True},
    {"loop_embedding": True, "loop_rank": 2},
    {"injection": "add", "loop_rank": 3, "inter_loop_norm": True},
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_states_are_those_of_the_equations(changes: dict[str, Any], fused: bool) -> None:
    decoder = model(fused=fused, **changes).eval()
    states = decoder(tokens(), n_loops=4).states  # one more than the config's
    expected = reference_states(decoder, tokens(), 4)
    assert len(states) == 4
    for state, wanted in zip(states, expected, strict=True):
        torch.testing.assert_close(state, wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(decoder.read(state), reference_read(decoder, wanted), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_has_a_gradient(changes: dict[str, Any]) -> None:
    decoder = model(fused=True, **changes)
    decoder(tokens(), tokens()).loss.backward()
    without = [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert without == []
    assert not [name for name, parameter in decoder.named_parameters() if not parameter.grad.any()]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_fused_and_plain_agree(changes: dict[str, Any]) -> None:
    plain, fused = model(fused=False, **changes), model(fused=True, **changes)
    fused.load_state_dict(plain.state_dict())
    torch.manual_seed(3)  # of the noise
    plain_states = plain(tokens()).states
    torch.manual_seed(3)
    fused_states = fused(tokens()).states
    for a, b in zip(fused_states, plain_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(fused, fused_states), gradients(plain, plain_states))


def test_training_starts_from_noise_and_evaluation_from_its_mean() -> None:
    decoder = model(injection="add", start="noise")
    embedded = torch.zeros(4, 500, D)
    noise = decoder.start(embedded)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(math.sqrt(2 / 5), rel=0.02)
    assert not torch.equal(decoder.start(embedded), noise)
    assert not decoder.eval().start(embedded).any()


def test_a_decay_is_between_zero_and_one_whatever_is_learned() -> None:
    decoder = model(injection="diagonal")
    with torch.no_grad():
        decoder.injection.decay.copy_(torch.linspace(-20, 20, D))
    decay = decoder.injection.state_decay()
    assert (decay > 0).all()
    assert (decay <= 1).all()
    assert decay[D // 2 :].max() < 0.5
    fresh = LoopedLM(config(injection="diagonal")).injection
    torch.testing.assert_close(fresh.state_decay(), torch.full((D,), 0.5))


@pytest.mark.parametrize("injection", ["add", "concat", "diagonal"])
def test_an_injection_needs_what_is_injected(injection: Any) -> None:
    decoder = model(injection=injection)
    with pytest.raises(ValueError, match=f"embedded must be given with injection={injection}. Got embedded=None"):
        decoder.apply_loop(torch.zeros(1, 2, D), 0)


def test_fused_and_plain_draw_the_same_dropout() -> None:
    results = []
    for fused in (False, True):
        decoder = model(fused=fused, dropout=0.3)
        torch.manual_seed(7)
        states = decoder(tokens()).states
        results.append((states[-1], gradients(decoder, states)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


def test_fused_may_change_at_any_time() -> None:
    decoder = model(fused=True)
    fused = decoder(tokens()).states[-1]
    decoder.fused = False
    torch.testing.assert_close(decoder(tokens()).states[-1], fused, atol=1e-5, rtol=1e-5)


# Parameters and operations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "readout", "count"),
    [
        ("paper-44m", "rmsnorm", 43_934_208),
        ("paper-44m", "final-only", 43_934_208),
        ("paper-44m", "raw", 43_933_696),
        ("paper-129m", "rmsnorm", 128_822_016),
        ("paper-129m", "raw", 128_821_248),
        ("paper-129m", "layernorm", 128_822_016 + 768),
    ],
)
def test_parameter_counts_of_the_paper(preset: str, readout: Any, count: int) -> None:
    with torch.device("meta"):
        decoder = LoopedLM(dataclasses.replace(PRESETS[preset], readout=readout))
    assert decoder.parameter_count() == count


def test_sizes_of_the_other_presets() -> None:
    with torch.device("meta"):
        assert 1_500_000 < LoopedLM(PRESETS["demo"]).parameter_count() < 4_000_000
        assert 1_350_000_000 < LoopedLM(PRESETS["ouro-1.4b"]).parameter_count() < 1_450_000_000
        assert 150_000_000 < LoopedLM(PRESETS["huginn-small"]).parameter_count() < 250_000_000
        assert 65_000_000 < LoopedLM(PRESETS["parcae-140m"]).parameter_count() < 70_000_000  # 6 blocks and the head


@pytest.mark.parametrize("changes", [{}, {"n_prelude": 1, "n_coda": 2, "injection": "concat", "loop_rank": 2}], ids=str)
def test_flops_are_those_of_the_matrix_multiplications(changes: dict[str, Any]) -> None:
    decoder = model(fused=False, **changes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(tokens(length=LENGTH), n_loops=3, logits=True)
    blocks = 3 * LAYERS + decoder.config.n_prelude + decoder.config.n_coda
    triangle = blocks * 2 * LENGTH * D  # the masked half of attention, which PyTorch multiplies and counts too
    counted = counter.get_total_flops() / (2 * LENGTH)
    assert decoder.flops_per_token(3, n_readouts=1, training=False) == counted - triangle


def test_flops_formula() -> None:
    decoder = model()
    stack = LAYERS * (2 * (4 * D * D + 3 * D * FF) + 2 * 10 * D)
    assert decoder.flops_per_token(seq_len=10, training=False) == 3 * (stack + 2 * V * D)
    assert decoder.flops_per_token(5, n_readouts=1, seq_len=10) == 3 * (5 * stack + 2 * V * D)
    assert decoder.flops_per_token(5, seq_len=10, training=False) == 5 * (stack + 2 * V * D)
    assert decoder.flops_per_token() == decoder.flops_per_token(3, n_readouts=3, seq_len=LENGTH)


def test_initialisation() -> None:
    torch.manual_seed(0)
    demo = LoopedLM(PRESETS["demo"])
    assert demo.embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert demo.positions is not None
    assert demo.positions.weight.std().item() == pytest.approx(0.02, rel=0.03)
    paper = LoopedLM(dataclasses.replace(PRESETS["paper-44m"], n_layers=1))
    assert paper.embedding.weight.std().item() == pytest.approx(1.0, rel=0.01)
    first = paper.eval()(torch.randint(20_000, (1, 64)), n_loops=1).states[0]
    logits = first @ paper.head_weight.T
    assert logits.std().item() == pytest.approx((2 * 512) ** 0.5, rel=0.15)  # embedding + position: sqrt(2 d)


# State dict -----------------------------------------------------------------------------------------------------------


def test_state_dict_names() -> None:
    block = [
        "attention_norm.weight",
        "attention.qkv.weight",
        "attention.output.weight",
        "mlp_norm.weight",
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
    ]
    names = {f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in block} | {"embedding.weight"}
    assert set(model().state_dict()) == names | {"positions.weight", "readout_norm.weight"}
    assert set(model(readout="raw", positions="rotary").state_dict()) == names
    full = model(readout="layernorm", inter_loop_norm=True, tied=False)
    extra = {"positions.weight", "readout_norm.weight", "readout_norm.bias", "loop_norm.weight", "head.weight"}
    assert set(full.state_dict()) == names | extra


def test_fused_and_plain_start_equal_and_exchange_checkpoints() -> None:
    for changes in VARIANTS:
        torch.manual_seed(3)
        fused = LoopedLM(config(**changes), fused=True, checkpoint_loops=True)
        torch.manual_seed(3)
        plain = LoopedLM(config(**changes), fused=False)
        assert fused.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), plain.parameters(), strict=True))
        plain.load_state_dict(model(seed=9, **changes).state_dict())
        fused.load_state_dict(plain.state_dict())
        fused_states, plain_states = fused.eval()(tokens()).states, plain.eval()(tokens()).states
        torch.testing.assert_close(fused_states[-1], plain_states[-1], atol=1e-5, rtol=1e-5)


def test_head_is_the_embedding_when_tied() -> None:
    tied, untied = model(tied=True), model(tied=False)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight.shape == (V, D)
    assert untied.head_weight is not untied.embedding.weight
    assert untied.parameter_count() == tied.parameter_count() + V * D


# Loops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inter_loop_norm", [False, True])
def test_any_number_of_loops(inter_loop_norm: bool) -> None:
    decoder = model(inter_loop_norm=inter_loop_norm).eval()
    many = decoder(tokens(), n_loops=9).states
    assert [len(decoder(tokens(), n_loops=k).states) for k in (1, 2)] == [1, 2]
    assert len(decoder(tokens()).states) == 3
    for state, wanted in zip(many, reference_states(decoder, tokens(), 9), strict=True):
        torch.testing.assert_close(state, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(decoder(tokens(), n_loops=2).states[1], many[1])


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("fused", [False, True])
def test_causality(positions: Any, fused: bool) -> None:
    decoder = model(fused=fused, positions=positions).eval()
    before = decoder(tokens()).states
    changed = tokens()
    changed[:, 6] = (changed[:, 6] + 1) % V
    after = decoder(changed).states
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :6], b[:, :6])
        assert (a[:, 6:] != b[:, 6:]).any(-1).all()


def test_rotary_positions_may_exceed_max_seq_len() -> None:
    decoder = model(positions="rotary").eval()
    expected = reference_states(decoder, tokens(length=3 * LENGTH), 3)
    torch.testing.assert_close(decoder(tokens(length=3 * LENGTH)).states[-1], expected[-1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoint_loops_gives_equal_gradients(fused: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looped.dropout.SCORES_PER_BLOCK", 2 * 11 * 11)  # several blocks
    results = []
    for checkpoint_loops in (False, True):
        decoder = model(fused=fused, dropout=dropout, positions="rotary", inter_loop_norm=True, n_prelude=1)
        decoder.checkpoint_loops = checkpoint_loops
        torch.manual_seed(5)
        states = decoder(tokens()).states
        torch.rand(5)
        results.append((states, gradients(decoder, states)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert_same_gradients(results[1][1], results[0][1], tolerance=1e-6)


@pytest.mark.parametrize("changes", [{}, {"injection": "concat", "loop_rank": 2, "inter_loop_norm": True}], ids=str)
def test_checkpoint_loops_keeps_only_the_states(changes: dict[str, Any]) -> None:
    def saved_elements(checkpoint_loops: bool) -> int:
        decoder = model(**changes)
        decoder.checkpoint_loops = checkpoint_loops
        parameters = {parameter.data_ptr() for parameter in decoder.parameters()}
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.data_ptr() not in parameters:
                saved[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            states = decoder(tokens(), n_loops=6).states
        del states
        return sum(saved.values())

    assert saved_elements(True) < saved_elements(False) / 10
    assert saved_elements(True) <= 7 * 2 * 11 * D + 2 * 11  # H_0..H_5, E, and the tokens


# Rejections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [V, V + 5, -1])
def test_rejects_tokens_out_of_range(token: int) -> None:
    inputs = tokens()
    inputs[1, 3] = token
    with pytest.raises(ValueError, match=rf"tokens must be in \[0, vocab_size={V}\)\. Got {token}\."):
        model()(inputs)


def test_rejects_a_sequence_longer_than_the_learned_positions() -> None:
    with pytest.raises(ValueError, match=rf"longer than max_seq_len .* Got T={LENGTH + 1}, max_seq_len={LENGTH}"):
        model()(tokens(length=LENGTH + 1))
    model()(tokens(length=LENGTH))


@pytest.mark.parametrize("n_loops", [0, -1])
def test_rejects_n_loops(n_loops: int) -> None:
    with pytest.raises(ValueError, match=rf"n_loops must be at least 1\. Got n_loops={n_loops}"):
        model()(tokens(), n_loops=n_loops)


def test_rejects_rank_and_dtype() -> None:
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, T\]\. Got \[11\]"):
        model()(tokens()[0])
    for shape in ((2, 0), (0, 5)):
        with pytest.raises(ValueError, match=r"tokens must hold at least one token\. Got shape \[[025], [025]\]"):
            model()(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"tokens must be int64\. Got torch\.int32"):
        model()(tokens().int())


def test_positions_of_a_prelude_need_no_context() -> None:
    decoder = model(n_prelude=1, positions="rotary").eval()
    moved = torch.arange(11).flip(0)
    context = decoder.context(tokens(), positions=moved)
    assert torch.equal(
        decoder.embed(tokens(), positions=moved), decoder.embed(tokens(), positions=moved, context=context)
    )
    assert not torch.allclose(decoder.embed(tokens(), positions=moved), decoder.embed(tokens()))


def test_the_penalty_before_a_coda_has_the_models_precision() -> None:
    decoder = model(n_coda=1).double()
    text = tokens()
    targets = text.roll(-1, 1)
    states = decoder(text).states
    added = decoder(text, targets, penalty=1.0).loss - decoder(text, targets).loss
    assert added.dtype == torch.float64
    torch.testing.assert_close(added, torch.stack(states).square().mean(), atol=0, rtol=1e-12)
