"""The loss from its definition, fused against plain, what terminal supervision spares, logits, evaluation."""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import tiny_decoder
import torch
import torch.nn.functional as F
from tiny_decoder import COMPILED, D, V, assert_same_gradients, reference_read
from torch import Tensor

import looped.kernels.device
from looped.model import LoopedLM, LoopedOutput

K, BATCH, LENGTH = 3, 2, 11
READOUTS = ["rmsnorm", "layernorm", "raw", "final-only"]
model = functools.partial(tiny_decoder.model, embedding_std=0.3)


def batch(ignored: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (BATCH, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets.view(-1)[torch.randperm(targets.numel(), generator=generator)[:ignored]] = -100
    return tokens[:, :-1], targets


def gradients(decoder: LoopedLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def run(decoder: LoopedLM, **options: Any) -> tuple[LoopedOutput, dict[str, Tensor]]:
    decoder.zero_grad()
    result = decoder(*batch(), **options)
    result.loss.backward()
    return result, gradients(decoder)


def expected_logits(decoder: LoopedLM, state: Tensor, loop: int, n_loops: int) -> Tensor:
    """The readouts from their equations, in the state's dtype."""
    readout = decoder.config.readout
    norm = {name: p.to(state.dtype) for name, p in decoder.named_parameters() if name.startswith("readout_norm")}
    if readout == "layernorm":
        state = state - state.mean(-1, keepdim=True)
    if readout in ("rmsnorm", "layernorm") or (readout == "final-only" and loop == n_loops - 1):
        state = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm["readout_norm.weight"]
    if readout == "layernorm":
        state = state + norm["readout_norm.bias"]
    head = decoder.embedding.weight if decoder.head is None else decoder.head.weight
    return state @ head.to(state.dtype).T


def expected_losses(decoder: LoopedLM, states: Any, targets: Tensor) -> Tensor:
    """[K] mean cross-entropies in float64."""
    rows = []
    for loop, state in enumerate(states):
        log_p = expected_logits(decoder, state.detach().double(), loop, len(states)).log_softmax(-1)
        kept = [(b, t) for b, t in itertools.product(range(BATCH), range(LENGTH)) if targets[b, t] != -100]
        rows.append(torch.stack([-log_p[b, t, targets[b, t]] for b, t in kept]).mean())
    return torch.stack(rows)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_loss_is_its_definition(readout: Any, tied: bool, fused: bool) -> None:
    decoder = model(fused=fused, readout=readout, tied=tied)
    tokens, targets = batch()
    states = decoder(tokens).states
    ce = expected_losses(decoder, states, targets)
    square = torch.stack([state.detach().double().square().mean() for state in states]).mean()

    per_loop = decoder(tokens, targets, penalty=0.25)
    torch.testing.assert_close(per_loop.loss.double(), ce.mean() + 0.25 * square, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(per_loop.per_loop.double(), ce, atol=1e-5, rtol=1e-5)
    terminal = decoder(tokens, targets, supervision="terminal", penalty=0.25)
    torch.testing.assert_close(terminal.loss.double(), ce[-1] + 0.25 * square, atol=1e-5, rtol=1e-5)
    for result in (per_loop, terminal):
        assert result.loss.shape == ()
        assert result.loss.dtype == torch.float32
        assert result.per_loop.dtype == torch.float32
        assert not result.per_loop.requires_grad
        assert result.statistics is None
        assert result.logits is None
        assert all(torch.equal(a, b) for a, b in zip(result.states, states, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_coda_is_read_and_the_state_before_it_penalised(readout: Any, fused: bool) -> None:
    decoder = model(fused=fused, readout=readout, n_coda=1, injection="add")
    tokens, targets = batch()
    states = decoder(tokens).states
    ce = expected_losses(decoder, [reference_read(decoder, state) for state in states], targets)
    square = torch.stack([state.detach().double().square().mean() for state in states]).mean()

    per_loop = decoder(tokens, targets, penalty=0.25)
    torch.testing.assert_close(per_loop.loss.double(), ce.mean() + 0.25 * square, atol=1e-5, rtol=1e-5)
    terminal = decoder(tokens, targets, supervision="terminal", penalty=0.25, logits=True)
    torch.testing.assert_close(terminal.loss.double(), ce[-1] + 0.25 * square, atol=1e-5, rtol=1e-5)
    log_p = expected_logits(decoder, reference_read(decoder, states[-1]), 2, 3)
    torch.testing.assert_close(terminal.logits, log_p, atol=1e-4, rtol=1e-4)
    if readout != "final-only":
        losses = decoder.evaluation_losses(states, targets).flatten(1).sum(1) / (targets != -100).sum()
        torch.testing.assert_close(losses.double(), ce, atol=1e-5, rtol=1e-5)


def test_terminal_supervision_runs_the_coda_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model(n_coda=1)
    read: list[Tensor] = []
    forward = decoder.coda[0].forward
    monkeypatch.setattr(decoder.coda[0], "forward", lambda x, *rest: (read.append(x), forward(x, *rest))[1])
    output = decoder(*batch(), supervision="terminal")
    assert len(read) == 1
    assert torch.equal(read[0], output.states[-1])


# Every readout with every supervision, with and without a penalty; the rest of the options in turn.
COMBINATIONS = [
    {"readout": readout, "supervision": supervision, "penalty": penalty, **rest}
    for (readout, supervision, penalty), rest in zip(
        itertools.product(READOUTS, ["per-loop", "terminal"], [0.0, 0.05]),
        itertools.cycle(
            [
                {"tied": True, "positions": "learned", "inter_loop_norm": False},
                {"tied": False, "positions": "rotary", "inter_loop_norm": True},
                {"tied": False, "positions": "learned", "inter_loop_norm": True},
                {"tied": True, "positions": "rotary", "inter_loop_norm": False},
                {"tied": True, "positions": "learned", "inter_loop_norm": True},
                {"n_prelude": 1, "n_coda": 1, "injection": "concat", "block_norm": "sandwich-sum", "loop_rank": 2},
                {"injection": "diagonal", "start": "zero", "block_norm": "sandwich", "loop_embedding": True},
            ]
        ),
        strict=False,
    )
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_fused_and_plain_agree(options: dict[str, Any]) -> None:
    training = {"supervision": options["supervision"], "penalty": options["penalty"]}
    shape = {name: value for name, value in options.items() if name not in training}
    plain, plain_gradients = run(model(fused=False, **shape), **training)
    fused, fused_gradients = run(model(fused=True, **shape), **training)
    torch.testing.assert_close(fused.loss, plain.loss, atol=0, rtol=1e-5)
    torch.testing.assert_close(fused.per_loop, plain.per_loop, atol=0, rtol=1e-5, equal_nan=True)
    assert_same_gradients(fused_gradients, plain_gradients, 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_float64(fused: bool) -> None:
    decoder = model(fused=fused, readout="final-only", positions="rotary")
    _, found = run(decoder, penalty=0.05)
    exact = model(fused=False, readout="final-only", positions="rotary").double()
    exact.load_state_dict(decoder.state_dict())
    _, truth = run(exact, penalty=0.05)
    assert_same_gradients({name: gradient.double() for name, gradient in found.items()}, truth, 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_more_loops_than_trained(fused: bool) -> None:
    decoder = model(fused=fused)
    result, _ = run(decoder, n_loops=7)
    assert result.per_loop.shape == (7,)
    torch.testing.assert_close(result.loss, result.per_loop.mean())
    single, _ = run(decoder, n_loops=1)
    torch.testing.assert_close(single.loss, result.per_loop[0])


@pytest.mark.parametrize("supervision", ["per-loop", "terminal"])
@pytest.mark.parametrize("fused", [False, True])
def test_all_targets_ignored(fused: bool, supervision: Any) -> None:
    decoder = model(fused=fused)
    tokens, targets = batch()
    result = decoder(tokens, torch.full_like(targets, -100), supervision=supervision)
    assert result.loss == 0
    assert result.per_loop[-1] == 0
    result.loss.backward()
    assert all((gradient == 0).all() for gradient in gradients(decoder).values())


def test_twenty_steps_agree() -> None:
    def train(fused: bool) -> Tensor:
        decoder = model(fused=fused, dropout=0.1)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
        losses = []
        for step in range(20):
            tokens, targets = batch(seed=step % 2)
            optimizer.zero_grad()
            loss = decoder(tokens, targets, penalty=0.01).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    plain, fused = train(False), train(True)
    torch.testing.assert_close(fused, plain, atol=0, rtol=1e-5)
    assert plain[-5:].mean() < plain[:5].mean()


# Terminal supervision -------------------------------------------------------------------------------------------------


def readout_flops(function: Callable[[], None]) -> int:
    """Operations of the matrix products that have the vocabulary as a dimension."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    flops = 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            first = 0 if event.name == "aten::mm" else 1  # addmm's first matrix is added
            left, right = event.input_shapes[first : first + 2]
            if V in (*left, *right):
                flops += 2 * left[0] * left[1] * right[1]
    return flops


@pytest.mark.parametrize("fused", [False, True])
def test_terminal_reads_out_one_loop(fused: bool) -> None:
    decoder = model(fused=fused)
    tokens, targets = batch()
    one = 6 * BATCH * LENGTH * D * V  # logits, and the gradients of state and head

    def work(**options: Any) -> Callable[[], None]:
        states = decoder(tokens).states
        return lambda: decoder.readout_loss(states, targets, penalty=0.1, **options).loss.backward()

    assert readout_flops(work(supervision="terminal")) == one
    assert readout_flops(work(supervision="per-loop")) == K * one


@pytest.mark.parametrize("fused", [False, True])
def test_terminal_says_which_loops_it_read(fused: bool) -> None:
    result, _ = run(model(fused=fused), supervision="terminal")
    assert result.per_loop.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("fused", [False, True])
def test_penalty_sees_the_loops_that_terminal_does_not_read(fused: bool) -> None:
    decoder = model(fused=fused)
    tokens, targets = batch()
    states = [state.detach().requires_grad_() for state in decoder(tokens).states]
    result = decoder.readout_loss(states, targets, supervision="terminal", penalty=0.5)
    found = torch.autograd.grad(result.loss, states)
    for state, gradient in zip(states[:-1], found, strict=False):
        torch.testing.assert_close(gradient, 0.5 * 2 * state.detach() / (K * state.numel()))


# Precision, checkpoints, compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_autocast_loss_is_close(readout: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looped.kernels.device, "multiplies_faster", lambda dtype: True)
    decoder = model(fused=fused, readout=readout)
    exact, exact_gradients = run(decoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_gradients = run(decoder)
    assert low.loss.dtype == torch.float32
    assert low.loss != exact.loss
    torch.testing.assert_close(low.loss, exact.loss, atol=0, rtol=5e-3)
    torch.testing.assert_close(low.per_loop, exact.per_loop, atol=0, rtol=1e-2)
    for name, wanted in exact_gradients.items():
        assert low_gradients[name].dtype == torch.float32
        assert (low_gradients[name] - wanted).norm() < 0.05 * wanted.norm(), name


@pytest.mark.parametrize(("fused", "checkpoint_loops"), [(False, False), (True, True)])
def test_the_whole_forward_compiles_into_one_graph(fused: bool, checkpoint_loops: bool) -> None:
    torch._dynamo.reset()
    changes: dict[str, Any] = {"positions": "rotary", "n_prelude": 1, "n_coda": 1}
    decoder = model(fused=fused, injection="diagonal", block_norm="sandwich", **changes, **COMPILED)
    decoder.checkpoint_loops = checkpoint_loops
    expected, expected_gradients = run(decoder, penalty=0.01, logits=True)
    decoder.zero_grad()
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    result = compiled(*batch(), penalty=0.01, logits=True)
    result.loss.backward()
    for name in ("loss", "per_loop", "logits"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))
    assert_same_gradients(gradients(decoder), expected_gradients)


# Logits and evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_logits(readout: Any, tied: bool) -> None:
    decoder = model(readout=readout, tied=tied)
    state = 3 * torch.randn(2, 5, D)
    for final, loop in ((True, K - 1), (False, 0)):
        logits = decoder.readout_logits(state, final=final)
        assert logits.shape == (2, 5, V)
        torch.testing.assert_close(logits, expected_logits(decoder, state, loop, K), atol=1e-5, rtol=1e-5)
    assert torch.equal(decoder.readout_logits(state), decoder.readout_logits(state, final=True))


def test_the_compiler_of_pytorch_2_11_knows_what_forward_calls() -> None:
    """It fails at a NamedTuple's _replace, which later ones know."""
    assert "._replace(" not in inspect.getsource(LoopedLM.forward)


@pytest.mark.parametrize("fused", [True, False])
def test_shapes_on_meta(fused: bool) -> None:
    result = model(fused=fused).to("meta")(*(part.to("meta") for part in batch()), logits=True)
    assert result.loss is not None
    assert result.logits is not None
    assert (result.loss.shape, result.logits.shape) == ((), (BATCH, LENGTH, V))


@pytest.mark.parametrize("fused", [False, True])
def test_without_targets_there_is_no_loss(fused: bool) -> None:
    decoder = model(fused=fused, readout="final-only")
    result = decoder(batch()[0], n_loops=2, logits=True)
    assert (result.loss, result.per_loop, result.statistics) == (None, None, None)
    assert len(result.states) == 2
    wanted = expected_logits(decoder, result.states[-1], 1, 2)
    torch.testing.assert_close(result.logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_evaluation_reads_every_loop_as_the_last(readout: Any, fused: bool) -> None:
    decoder = model(fused=fused, readout=readout)
    tokens, targets = batch()
    states = decoder(tokens).states
    losses = decoder.evaluation_losses(states, targets)
    assert losses.shape == (K, BATCH, LENGTH)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    for loop, state in enumerate(states):
        logits = expected_logits(decoder, state.double(), K - 1, K).flatten(0, 1)
        wanted = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
        torch.testing.assert_close(losses[loop].double(), wanted.detach(), atol=1e-5, rtol=1e-5)
        stopped_here = decoder.readout_loss(states[: loop + 1], targets, supervision="terminal").loss
        torch.testing.assert_close(losses[loop].sum() / (targets != -100).sum(), stopped_here, atol=1e-5, rtol=1e-5)
    assert (losses[:, targets == -100] == 0).all()


# Rejections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_rejects_before_any_work(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model(fused=fused)
    tokens, targets = batch()
    monkeypatch.setattr(LoopedLM, "embed", None)  # not callable: a model that begins to work fails otherwise
    for options, message in (
        ({"supervision": "last"}, r"supervision must be one of per-loop, terminal, gated\. Got 'last'"),
        ({"penalty": -0.1}, r"penalty must be at least 0\. Got penalty=-0\.1"),
        ({"penalty": float("nan")}, r"penalty must be at least 0\. Got penalty=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(tokens, targets, **options)
    with pytest.raises(ValueError, match=r"targets must have the tokens' shape \[2, 11\]\. Got \[2, 10\]"):
        decoder(tokens, targets[:, 1:])
    with pytest.raises(TypeError, match=r"targets must be int64\. Got torch\.int32"):
        decoder(tokens, targets.int())
    with pytest.raises(ValueError, match=r"statistics .* need targets\. Got statistics=True, targets=None"):
        decoder(tokens, statistics=True)


@pytest.mark.parametrize("fused", [False, True])
def test_rejects_states_that_do_not_fit(fused: bool) -> None:
    decoder = model(fused=fused)
    tokens, targets = batch()
    states = decoder(tokens).states
    with pytest.raises(ValueError, match=r"supervision must be one of per-loop, terminal, gated\. Got 'last'"):
        decoder.readout_loss(states, targets, supervision="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"penalty must be at least 0\. Got penalty=-0\.1"):
        decoder.readout_loss(states, targets, penalty=-0.1)
    for function in (decoder.readout_loss, decoder.evaluation_losses):
        with pytest.raises(ValueError, match="states must hold the states of at least one loop"):
            function((), targets)
        with pytest.raises(ValueError, match=r"targets must have the tokens' shape \[2, 11\]\. Got \[2, 10\]"):
            function(states, targets[:, 1:])
        with pytest.raises(ValueError, match="states must have one shape"):
            function((states[0], states[1][:1]), targets)
        with pytest.raises(TypeError, match=r"targets must be int64\. Got torch\.int32"):
            function(states, targets.int())


@pytest.mark.parametrize("target", [V, -1])
@pytest.mark.parametrize("fused", [False, True])
def test_rejects_targets_out_of_range(fused: bool, target: int) -> None:
    decoder = model(fused=fused)
    tokens, targets = batch()
    targets[1, 2] = target
    states = decoder(tokens).states
    for function in (decoder.readout_loss, decoder.evaluation_losses):
        with pytest.raises((ValueError, IndexError), match=rf"{target}"):
            function(states, targets)


def test_no_penalty_takes_no_squares() -> None:
    """Behind a coda too: the states' squares may be infinite."""
    decoder = model(n_coda=1, embedding_std=1.0)
    with torch.no_grad():
        decoder.embedding.weight *= 1e21
    assert decoder(*batch(), penalty=0.0).loss.isfinite()
    assert not decoder(*batch(), penalty=0.1).loss.isfinite()
