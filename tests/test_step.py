import math

import numpy as np
import pytest
import torch

from looped.config import LoopedConfig
from looped.model import LoopedLM
from looped.supervision import Gated
from train.config import complete, model_config, preset_config
from train.step import evaluate, learning_rate, state_norms, training_step
from train.text.batches import Windows, evaluation_windows

V, B, T = 50, 4, 8


def make(*, fused: bool = True, seed: int = 0, **options) -> LoopedLM:
    torch.manual_seed(seed)
    shape = {"d_model": 32, "n_heads": 2, "n_layers": 2, "n_loops": 3, "d_ff": 64, "dropout": 0.0} | options
    return LoopedLM(LoopedConfig(vocab_size=V, max_seq_len=T, **shape), fused=fused)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def take(model, optimizer, data, **options):
    defaults = {"supervision": "per-loop", "penalty": 0.01, "dtype": torch.float32}
    return training_step(model, optimizer, *data, **(defaults | options))


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.1, 0.5, 1, 1, 1, 1]), ("warmup-cosine", [0.1, 0.5, 1, 0.55, 0.1, 0.1])],
)
def test_learning_rate(schedule, expected):
    rates = [
        learning_rate(step, peak=1.0, schedule=schedule, warmup_steps=10, steps=110)
        for step in (1, 5, 10, 60, 110, 200)
    ]
    assert rates == pytest.approx(expected)
    assert learning_rate(1, peak=2.0, schedule=schedule, warmup_steps=0, steps=1000) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("supervision", ["per-loop", "terminal", "gated"])
@pytest.mark.parametrize("readout", ["rmsnorm", "layernorm", "raw", "final-only"])
def test_fused_and_plain_train_alike(readout, supervision):
    losses = []
    for fused in (True, False):
        model = make(fused=fused, readout=readout, dropout=0.1, exit_gate=True)
        optimizer = adamw(model)
        torch.manual_seed(1)
        losses.append([take(model, optimizer, batch(step), supervision=supervision).loss for step in range(20)])
    fused_losses, plain_losses = (torch.stack(values) for values in losses)
    assert ((fused_losses - plain_losses).abs() <= 1e-5 * plain_losses.abs()).all()
    assert len(set(fused_losses.tolist())) == 20


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("supervision", ["per-loop", "terminal", Gated(0.3, "geometric:0.6")])
@pytest.mark.parametrize(("n_rows", "n_parts"), [(4, 2), (4, 3), (4, 4), (5, 2), (5, 3)])
def test_accumulation_with_ignored_targets_and_unequal_parts(fused, supervision, n_parts, n_rows):
    """Loss, what is measured, and gradients are those of the whole batch."""
    tokens = torch.randint(0, V, (n_rows, T + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0] = targets[1, 2:] = targets[-1, 5] = -100
    models = [make(fused=fused, readout="raw", exit_gate=True) for _ in range(2)]
    for model in models:
        model.exit_gate.weight.data.copy_(torch.linspace(-0.3, 0.3, 32))
    results = []
    for model, n in zip(models, (1, n_parts), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        options = {"supervision": supervision, "penalty": 0.5, "measure": True, "grad_accumulation": n}
        results.append(take(model, optimizer, (tokens[:, :-1], targets), **options))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_of_ignored_targets_in_parts():
    model = make(readout="raw")
    inputs, targets = batch(0)
    result = take(model, adamw(model), (inputs, torch.full_like(targets, -100)), penalty=0.0, grad_accumulation=2)
    assert result.loss == result.grad_norm == 0
    assert not result.bad


def copied_state(model, optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in (*model.parameters(), *moments)]


@pytest.mark.parametrize("poison", ["loss", "gradient", "overflow"])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_is_not_taken(poison, first):
    """Weights, moments and step counts stay; the steps that follow are those that would have been taken anyway."""

    def train_with(poisoned: bool) -> list[torch.Tensor]:
        model = make()
        optimizer = adamw(model)
        bad = []
        for step in range(4):
            if poisoned and step == (0 if first else 2):
                weight = model.blocks[1].mlp.w2.weight
                options = {"penalty": torch.tensor(math.inf)} if poison == "loss" else {}
                value = {"loss": 1.0, "gradient": math.nan, "overflow": 1e30}[poison]
                hook = weight.register_hook(lambda gradient, value=value: gradient * value)
                before = copied_state(model, optimizer)
                result = take(model, optimizer, batch(9), **options)
                hook.remove()
                if not first:
                    assert all(torch.equal(a, b) for a, b in zip(before, copied_state(model, optimizer), strict=True))
                bad.append(bool(result.bad))
                assert math.isfinite(result.loss) == (poison != "loss")
                assert not math.isfinite(result.grad_norm)
            assert not take(model, optimizer, batch(step)).bad
        assert bad == [True] * poisoned
        return copied_state(model, optimizer)

    for a, b in zip(train_with(True), train_with(False), strict=True):
        assert torch.equal(a, b)


def test_an_optimiser_that_cannot_leave_out_a_step_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"optimizer must be fused, .* Got AdamW\."):
        take(model, torch.optim.AdamW(model.parameters()), batch(0))


def test_gradient_is_clipped_and_its_norm_is_from_before():
    free, clipped = make(), make()
    before = [value.detach().clone() for value in clipped.parameters()]
    norm = take(free, torch.optim.SGD(free.parameters(), lr=1.0, fused=True), batch(0), grad_clip=1e9).grad_norm
    same = take(
        clipped, torch.optim.SGD(clipped.parameters(), lr=1.0, fused=True), batch(0), grad_clip=0.5 * norm.item()
    ).grad_norm
    assert norm == same
    change = [a.detach() - b for a, b in zip(clipped.parameters(), before, strict=True)]
    assert torch.cat([value.flatten() for value in change]).norm() == pytest.approx(0.5 * norm.item(), rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_what_a_measured_step_reports(fused):
    model = make(fused=fused)
    with torch.no_grad():
        states = model(batch(0)[0]).states
    norms = torch.stack([state.norm(dim=-1).mean() for state in states])
    torch.testing.assert_close(state_norms(states), norms)
    result = take(model, adamw(model), batch(0), measure=True)
    torch.testing.assert_close(result.state_norm, norms)
    penalty = 0.01 * torch.stack(states).square().mean()
    torch.testing.assert_close(result.loss, result.per_loop.mean() + penalty)
    assert result.radial_fraction.shape == (3,)
    assert (result.radial_fraction < 1e-4).all()  # the RMSNorm readout does not see the scale
    assert (result.radial_fraction > 0).all()
    plain = take(model, adamw(model), batch(1))
    assert plain.state_norm is None
    assert plain.radial_fraction is None
    assert plain.exits is result.exits is None


def test_what_a_measured_gated_step_reports():
    model = make(exit_gate=True)
    model.exit_gate.weight.data.copy_(torch.linspace(-0.3, 0.3, 32))
    inputs, targets = batch(0)
    targets[1, 3:] = -100
    with torch.no_grad():
        p = model.exit_probabilities(model(inputs).states)[:, targets != -100]
    result = take(model, adamw(model), (inputs, targets), supervision="gated", measure=True)
    torch.testing.assert_close(result.exits[0], (p[0] + 2 * p[1] + 3 * p[2]).mean())
    torch.testing.assert_close(result.exits[1], torch.special.entr(p).sum(0).mean())
    assert take(model, adamw(model), (inputs, targets), supervision="gated").exits is None


def test_terminal_supervision_reads_the_last_loop_only():
    model = make()
    result = take(model, adamw(model), batch(0), supervision="terminal", penalty=0.0, measure=True)
    assert result.per_loop.isnan().tolist() == [True, True, False]
    assert result.radial_fraction.isnan().tolist() == [True, True, False]
    assert result.loss == pytest.approx(result.per_loop[2].item())


@pytest.mark.parametrize("left_over", [0, 1, T - 1])
@pytest.mark.parametrize("readout", ["rmsnorm", "raw", "final-only"])
@pytest.mark.parametrize("fused", [True, False])
def test_evaluation_at_every_loop(fused, readout, left_over):
    model = make(fused=fused, readout=readout, dropout=0.5)
    tokens = np.random.default_rng(0).integers(0, V, 10 * T + 1 + left_over)
    sizes = np.arange(1, V + 1)
    results = evaluate(
        model,
        *evaluation_windows(tokens, T, None),
        batch_size=4,  # 10 or 11 windows: the last batch is smaller
        device=torch.device("cpu"),
        dtype=torch.float32,
        bytes_per_token=sizes,
    )
    sequence = torch.from_numpy(tokens)[None]
    parts = [sequence[:, start : start + T + 1] for start in range(0, len(tokens) - 1, T)]
    targets = sequence[0, 1:]
    for n_loops, result in enumerate(results, start=1):
        with torch.no_grad():
            state = torch.cat([model(part[:, :-1], n_loops=n_loops).states[-1][0] for part in parts])
            logits = model.readout_logits(state)
        ce = torch.nn.functional.cross_entropy(logits, targets).item()
        assert result.n_loops == n_loops
        assert result.ce == pytest.approx(ce, rel=1e-5)
        assert result.ppl == pytest.approx(math.exp(ce), rel=1e-4)
        bits = ce * len(targets) / math.log(2) / sizes[targets.numpy()].sum()
        assert result.bits_per_byte == pytest.approx(bits, rel=1e-5)
        assert result.state_norm == pytest.approx(state.norm(dim=-1).mean().item(), rel=1e-5)
        assert result.tokens_per_second > 0


def test_evaluation_without_bytes():
    model = make()
    windows = Windows(np.arange(T + 1), T, T)
    (first, *_) = evaluate(
        model,
        windows,
        np.array([0]),
        batch_size=2,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        bytes_per_token=None,
    )
    assert first.bits_per_byte is None
    assert math.isfinite(first.ce)


@pytest.mark.parametrize("preset", ["paper-44m", "paper-129m"])
def test_the_papers_models_take_a_step(preset):
    config = complete(preset_config(preset))
    torch.manual_seed(0)
    model = LoopedLM(model_config(config, config.vocab_size), fused=config.fused)
    # Without decay, so that nothing but a gradient can change a parameter.
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    tokens = torch.randint(0, config.vocab_size, (1, 17))
    result = training_step(
        model,
        optimizer,
        tokens[:, :-1],
        tokens[:, 1:],
        supervision=config.supervision,
        penalty=config.penalty,
        dtype={"bf16": torch.bfloat16}[config.dtype],
    )
    assert math.isfinite(result.loss)
    assert result.per_loop.isfinite().all()
    assert [name for name, value in model.named_parameters() if torch.equal(value, before[name])] == []
    assert all(value.isfinite().all() for value in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_does_not_wait_for_the_device():
    model = make().cuda()
    optimizer = adamw(model)
    data = tuple(tensor.cuda() for tensor in batch(0))
    take(model, optimizer, data, dtype=torch.bfloat16, measure=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for measure in (False, True):
            take(model, optimizer, data, dtype=torch.bfloat16, measure=measure, grad_accumulation=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
