"""Gated supervision: the loss from its definition, gradients, priors, ignored targets, parts, rejections."""

import math
from typing import Any

import pytest
import torch
from numerics import assert_no_worse_than
from test_model import READOUTS, K, batch, expected_logits, gradients, model, run
from tiny_decoder import COMPILED, D, assert_same_gradients
from torch import Tensor

import looped.kernels.device
from looped.exit_gate import exit_entropy, mean_exit_loop
from looped.model import LoopedLM
from looped.supervision import Gated, gated, supervision_weights
from train.step import exit_means


def gated_model(*, spread: float = 0.5, **options: Any) -> LoopedLM:
    """A decoder whose gate does not say the same of every token."""
    decoder = model(exit_gate=True, **options)
    with torch.no_grad():
        decoder.exit_gate.weight.normal_(std=spread, generator=torch.Generator().manual_seed(5))
    return decoder


def exits_by_definition(decoder: LoopedLM, read: Any) -> Tensor:
    """p [K, B, T] of what is read, in its dtype: a product of probabilities."""
    left, p = 1.0, []
    for loop, state in enumerate(read):
        x = state
        if decoder.config.readout == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        if decoder.config.readout != "raw":
            weight = decoder.readout_norm.weight.to(x.dtype)
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        if decoder.config.readout == "layernorm":
            x = x + decoder.readout_norm.bias.to(x.dtype)
        gate = decoder.exit_gate
        stop = torch.sigmoid((x * gate.weight.to(x.dtype)).sum(-1) + gate.bias.to(x.dtype))
        last = loop == len(read) - 1
        p.append(left if last else left * stop)
        left = left * (1 - stop)
    return torch.stack(p)


def prior_by_definition(prior: str, n_loops: int) -> list[float]:
    if prior == "uniform":
        return [1.0] * n_loops  # without the constant
    stop = float(prior.removeprefix("geometric:"))
    share = [stop * (1 - stop) ** loop for loop in range(n_loops)]
    return [value / sum(share) for value in share]


def loss_by_definition(
    decoder: LoopedLM, states: Any, targets: Tensor, options: Gated, penalty: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(loss, per_loop [K]), token by token."""
    read, n = [decoder.read(state) for state in states], len(states)
    p = exits_by_definition(decoder, read)
    prior = prior_by_definition(options.prior, n)
    ce = [-expected_logits(decoder, state, loop, n).log_softmax(-1) for loop, state in enumerate(read)]
    losses, per_loop = [], []
    for b, t in (targets != -100).nonzero().tolist():
        of_token = torch.stack([ce[k][b, t, targets[b, t]] for k in range(n)])
        share = p[:, b, t]
        divergence = sum(share[k] * (share[k].log() - math.log(prior[k])) for k in range(n))
        losses.append((share * of_token).sum() + options.beta * divergence)
        per_loop.append(of_token)
    square = torch.stack([state.square().mean() for state in states]).mean()
    return torch.stack(losses).mean() + penalty * square, torch.stack(per_loop).mean(0)


PRIORS = ["uniform", "geometric:0.3"]
SHAPES: list[dict[str, Any]] = [*({"readout": readout} for readout in READOUTS), {"n_coda": 1, "injection": "add"}]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_is_its_definition(shape: dict[str, Any], prior: str, fused: bool) -> None:
    decoder = gated_model(fused=fused, **shape)
    tokens, targets = batch()
    options = Gated(0.2, prior)
    result = decoder(tokens, targets, supervision=options, penalty=0.25)
    exact = gated_model(**shape).double()
    with torch.no_grad():
        loss, per_loop = loss_by_definition(exact, exact(tokens).states, targets, options, 0.25)
    torch.testing.assert_close(result.loss.double(), loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.per_loop.double(), per_loop, atol=1e-5, rtol=1e-5)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.log_exits.exp(), decoder.exit_probabilities(result.states).detach())
    assert not result.log_exits.requires_grad


def test_uniform_is_ouros_equation() -> None:
    """sum_k p_k CE_k - beta H(p), without the constant beta log K."""
    decoder = gated_model()
    tokens, targets = batch(ignored=0)
    states = decoder(tokens).states
    p, ce = decoder.exit_probabilities(states), decoder.evaluation_losses(states, targets)
    entropy = torch.special.entr(p).sum(0)
    expected = ((p * ce).sum(0) - 0.3 * entropy).mean()
    torch.testing.assert_close(decoder(tokens, targets, supervision=Gated(0.3)).loss, expected)
    word = decoder(tokens, targets, supervision="gated").loss
    assert torch.equal(word, decoder(tokens, targets, supervision=Gated(0.1, "uniform")).loss)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_autograd_in_float64(shape: dict[str, Any], prior: str, fused: bool) -> None:
    """Of gate and trunk; no worse than plain PyTorch in float32."""
    options = Gated(0.2, prior)
    tokens, targets = batch()

    def plainly(decoder: LoopedLM) -> dict[str, Tensor]:
        loss_by_definition(decoder, decoder(tokens).states, targets, options, 0.05)[0].backward()
        return gradients(decoder)

    truth = plainly(gated_model(**shape).double())
    plain = plainly(gated_model(**shape))
    _, found = run(gated_model(fused=fused, **shape), supervision=options, penalty=0.05)
    assert found.keys() == truth.keys()
    assert {"exit_gate.weight", "exit_gate.bias"} < found.keys()
    for name, wanted in truth.items():
        assert_no_worse_than(found[name], plain[name], wanted, name=name)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_is_close_and_the_gate_keeps_float32(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looped.kernels.device, "multiplies_faster", lambda dtype: True)
    decoder = gated_model(fused=fused)
    exact, exact_gradients = run(decoder, supervision="gated")
    p = decoder.exit_probabilities(exact.states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_gradients = run(decoder, supervision="gated")
        assert torch.equal(decoder.exit_probabilities(exact.states), p)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, exact.loss, atol=0, rtol=5e-3)
    for name, wanted in exact_gradients.items():
        assert (low_gradients[name] - wanted).norm() < 0.06 * wanted.norm(), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_ignored_tokens_add_nothing(prior: str, fused: bool) -> None:
    """Neither cross-entropy nor divergence: what the gate says there is of no consequence."""
    decoder = gated_model(fused=fused)
    tokens, targets = batch()
    states = [state.detach().requires_grad_() for state in decoder(tokens).states]
    options = Gated(0.7, prior)
    result = decoder.readout_loss(states, targets, supervision=options)
    result.loss.backward()
    ignored = targets == -100
    assert all((state.grad[ignored] == 0).all() for state in states)
    assert all((state.grad[~ignored] != 0).any(-1).all() for state in states[:-1])
    other = [torch.where(ignored.unsqueeze(-1), 7 * state.flip(-1), state) for state in states]
    torch.testing.assert_close(decoder.readout_loss(other, targets, supervision=options).loss, result.loss)
    decoder.zero_grad()
    nothing = decoder(tokens, torch.full_like(targets, -100), supervision=options)
    nothing.loss.backward()
    assert nothing.loss == 0
    assert all((gradient == 0).all() for gradient in gradients(decoder).values())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_parts_add_up_to_the_whole(fused: bool, as_tensor: bool) -> None:
    decoder = gated_model(fused=fused)
    tokens, targets = batch(ignored=7)
    options = Gated(0.4, "geometric:0.6")
    whole, whole_gradients = run_on(decoder, tokens, targets, supervision=options)
    n = (targets != -100).sum()
    decoder.zero_grad()
    parts = []
    for part in (slice(0, 1), slice(1, 2)):
        n_targets = n if as_tensor else int(n)
        loss = decoder(tokens[part], targets[part], supervision=options, n_targets=n_targets).loss
        loss.backward()
        parts.append(loss.detach())
    torch.testing.assert_close(sum(parts), whole)
    assert_same_gradients(gradients(decoder), whole_gradients)


@pytest.mark.parametrize("fused", [False, True])
def test_a_process_may_have_less_than_one_target(fused: bool) -> None:
    """One target for four processes is a quarter of one for each."""
    decoder = gated_model(fused=fused)
    tokens, targets = batch(ignored=0)
    targets.view(-1)[1:] = -100
    losses = [decoder(tokens, targets, supervision=Gated(0.4), n_targets=torch.tensor(n)).loss for n in (1.0, 0.25)]
    torch.testing.assert_close(losses[1], 4 * losses[0])


def run_on(decoder: LoopedLM, tokens: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.zero_grad()
    loss = decoder(tokens, targets, **options).loss
    loss.backward()
    return loss.detach(), gradients(decoder)


@pytest.mark.parametrize("beta", [1e4, 0.0])
def test_a_large_beta_makes_exits_uniform_and_none_follows_the_loss(beta: float) -> None:
    """The gate alone, trained on fixed states, goes to the prior, or to the loops with the smallest loss."""
    decoder = gated_model(spread=1.0)
    tokens, targets = batch(ignored=0)
    states = [state.detach() for state in decoder(tokens).states]

    def measured() -> tuple[float, float]:
        with torch.no_grad():
            p = decoder.exit_probabilities(states)
            ce = decoder.evaluation_losses(states, targets)
            return float(torch.special.entr(p).sum(0).mean()), float((p * ce).sum(0).mean())

    entropy, loss = measured()
    optimizer = torch.optim.Adam(decoder.exit_gate.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        decoder.readout_loss(states, targets, supervision=Gated(beta)).loss.backward()
        optimizer.step()
    after, loss_after = measured()
    if beta:
        assert after > 0.95 * math.log(K)
        assert entropy < 0.5 * math.log(K)
    else:
        assert loss_after < loss - 0.02


@pytest.mark.parametrize("n_loops", [1, 2, 3, 8])
def test_the_geometric_prior_is_a_distribution_and_free_of_charge(n_loops: int) -> None:
    options = Gated(0.5, "geometric:0.25")
    log_q = options.log_prior(n_loops, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(log_q.exp().sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(log_q.diff(), torch.full((n_loops - 1,), math.log(0.75), dtype=torch.float64))
    log_p = log_q.view(-1, 1, 1).expand(n_loops, 2, 3).clone().requires_grad_()
    counted = torch.ones(2, 3, dtype=torch.bool)
    assert options.divergence(log_p, counted, None).abs() < 1e-15
    uneven = (log_p * 1.5).log_softmax(0)
    assert n_loops == 1 or options.divergence(uneven, counted, None) > 1e-3


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("bias", [-1e4, -200.0, 200.0, 1e4])
def test_certain_exits_are_finite(bias: float, prior: str) -> None:
    decoder = gated_model()
    decoder.exit_gate.bias.data.fill_(bias)
    result, found = run(decoder, supervision=Gated(0.3, prior))
    assert result.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.values())
    p = decoder.exit_probabilities(result.states)
    expected = torch.zeros(K)
    expected[0 if bias > 0 else K - 1] = 1
    torch.testing.assert_close(p, expected.view(-1, 1, 1).expand_as(p))


@pytest.mark.parametrize("fused", [False, True])
def test_depths_other_than_the_configurations(fused: bool) -> None:
    decoder = gated_model(fused=fused)
    one, _ = run(decoder, n_loops=1, supervision="gated")
    torch.testing.assert_close(one.loss, run(decoder, n_loops=1)[0].loss)  # p = 1, H = 0
    many, _ = run(decoder, n_loops=7, supervision="gated")
    p = decoder.exit_probabilities(many.states)
    torch.testing.assert_close(p.sum(0), torch.ones(p.shape[1:]))


def test_with_truncated_backpropagation_the_exits_are_among_the_loops_that_learn() -> None:
    decoder = gated_model()
    tokens, targets = batch()
    result = decoder(tokens, targets, n_loops=5, backprop_loops=2, supervision="gated")
    alone = decoder.readout_loss(result.states[3:], targets, supervision="gated")
    assert torch.equal(result.loss, alone.loss)
    assert torch.equal(result.log_exits[3:], alone.log_exits)
    found, expected = (exit_means(log_p, targets, None) for log_p in (result.log_exits, alone.log_exits))
    torch.testing.assert_close(found, expected + torch.tensor([3.0, 0.0]))  # the loops are counted from the first


@pytest.mark.parametrize("fused", [False, True])
def test_the_whole_forward_compiles_into_one_graph(fused: bool) -> None:
    torch._dynamo.reset()
    decoder = gated_model(fused=fused, **COMPILED)
    options = Gated(0.2, "geometric:0.4")
    expected, expected_gradients = run(decoder, supervision=options)
    decoder.zero_grad()
    result = torch.compile(decoder, backend="aot_eager", fullgraph=True)(*batch(), supervision=options)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    assert_same_gradients(gradients(decoder), expected_gradients)


def test_statistics_come_with_the_gate() -> None:
    decoder = gated_model(fused=True)
    tokens, targets = batch()
    result = decoder(tokens, targets, supervision="gated", statistics=True)
    assert result.statistics.loss.shape == (K, *targets.shape)
    assert result.statistics.radial_fraction.isfinite().any()
    found = exit_means(result.log_exits, targets, None)
    p = decoder.exit_probabilities(result.states)[:, targets != -100]
    torch.testing.assert_close(found[0], (p * torch.arange(1, K + 1).view(-1, 1)).sum(0).mean())
    torch.testing.assert_close(found[1], torch.special.entr(p).sum(0).mean())


# Words and rejections -------------------------------------------------------------------------------------------------


def test_which_supervision_is_gated() -> None:
    assert gated("per-loop") is None
    assert gated("terminal") is None
    assert gated("gated") == Gated(0.1, "uniform")
    assert gated(Gated(0.5)) == Gated(0.5)
    assert supervision_weights("per-loop", 4) == [0.25] * 4
    assert supervision_weights("terminal", 3) == [0, 0, 1]


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_rejects_a_beta(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta of the gate must be finite and at least 0\. Got {beta}\."):
        Gated(beta)


@pytest.mark.parametrize(
    "prior", ["", "geometric", "geometric:", "geometric:0", "geometric:1", "geometric:nan", "geometric:x", "poisson:4"]
)
def test_rejects_a_prior(prior: str) -> None:
    with pytest.raises(ValueError, match=rf"must be uniform or geometric:P with 0 < P < 1\. Got '{prior}'"):
        Gated(0.1, prior)


@pytest.mark.parametrize("supervision", ["gated", Gated()])
def test_rejects_a_model_without_a_gate_before_any_work(supervision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model()
    tokens, targets = batch()
    states = decoder(tokens).states
    monkeypatch.setattr(LoopedLM, "embed", None)
    message = r"gated supervision needs a model with exit_gate=True\. Got exit_gate=False\."
    with pytest.raises(ValueError, match=message):
        decoder(tokens, targets, supervision=supervision)
    with pytest.raises(ValueError, match=message):
        decoder.readout_loss(states, targets, supervision=supervision)
    with pytest.raises(ValueError, match=r"exit probabilities .* need exit_gate=True\. Got exit_gate=False\."):
        decoder.exit_probabilities(states)


def test_a_gate_changes_nothing_else() -> None:
    """The other parameters, their order and every random number after them."""
    torch.manual_seed(3)
    without = LoopedLM(model().config)
    after = torch.rand(1)
    torch.manual_seed(3)
    decoder = LoopedLM(model(exit_gate=True).config)
    assert torch.equal(after, torch.rand(1))
    names = [name for name, _ in decoder.named_parameters()]
    assert names == [name for name, _ in without.named_parameters()] + ["exit_gate.weight", "exit_gate.bias"]
    assert all(torch.equal(value, decoder.state_dict()[name]) for name, value in without.state_dict().items())
    assert decoder.parameter_count() == without.parameter_count() + D + 1
    tokens, targets = batch()
    assert torch.equal(decoder(tokens, targets).loss, without(tokens, targets).loss)


def test_nobody_exits_at_a_loop_without_gradient() -> None:
    decoder = model(exit_gate=True, n_loops=4)
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    output = decoder(tokens, tokens, supervision="gated", backprop_loops=2)
    assert output.log_exits is not None
    p = output.log_exits.exp()
    assert p.shape == (4, 2, 9)
    assert not p[:2].any()
    torch.testing.assert_close(p.sum(0), torch.ones(2, 9))
    assert (mean_exit_loop(output.log_exits) >= 3).all()
    assert exit_entropy(output.log_exits).isfinite().all()
