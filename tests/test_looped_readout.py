"""LoopedReadout beside the model that it reads out, and as a part of a model."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign_modules import HEADS, NORMS, VOCABULARY, D, LlamaNorm, Model, OnePlusWeight, batch
from numerics import assert_no_worse_than
from ranks import run_ranks
from torch import nn

import looped.kernels.device
from looped.kernels import LoopedReadout, RMSNorm, looped_cross_entropy, readout_statistics
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# LoopedReadout: the same as the modules -------------------------------------------------------------------------------


def check_against_modules(device, dtype, norm, head, **options):
    """Loss and all gradients against the model's own modules in the same dtype, truth being float64."""
    results = {}
    for name, kind in (("actual", dtype), ("plain", dtype), ("truth", torch.float64)):
        model = Model(norm, head, **options).to(device, dtype).to(kind)
        x, targets = batch(device, dtype)
        states = [state.detach().requires_grad_() for state in model.states(x.to(kind))]
        if name != "actual" and isinstance(model.norm, nn.RMSNorm):
            eps = model.norm.eps or torch.finfo(torch.float32).eps  # float64's own would not be that of `dtype`
            model.norm.__class__, model.norm.eps = nn.RMSNorm, eps
        loss = model.readout(states, targets).loss if name == "actual" else model.plain(states, targets, **options)
        parameters = [p for key, p in model.named_parameters() if not key.startswith("layer")]
        results[name] = [loss, *torch.autograd.grad(loss, [*states, *parameters])]
    for index, (actual, plain, truth) in enumerate(zip(*results.values(), strict=True)):
        # the states of the truth are not rounded, as the others' are
        assert_no_worse_than(actual, plain, truth, dtype=dtype, factor=3.0, name=f"{index}")


@pytest.mark.parametrize("norm", NORMS)
def test_readout_of_every_norm(backend, device, norm):
    check_against_modules(device, torch.float32, norm, "nn.Linear", penalty=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_readout_of_every_head(backend, device, head, dtype):
    check_against_modules(device, dtype, "nn.RMSNorm", head, softcap=3.0)


def test_readout_of_the_final_norm_only(backend, device):
    check_against_modules(device, torch.float32, "Llama", "nn.Linear", final_only=True, penalty=0.1)


def test_eps_none_is_that_of_the_sums(backend, device):
    """States so small that eps decides what the norm gives."""
    model = Model("nn.RMSNorm without eps").to(device, torch.bfloat16)
    states, targets = torch.full((2, 2, 5, D), 2e-4, device=device, dtype=torch.bfloat16), batch(device)[1]
    expected = torch.stack([model.plain([state], targets) for state in states])
    torch.testing.assert_close(model.readout(states, targets).per_loop, expected.detach(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        dict(penalty=0.3),
        dict(weights=[0.0, 0.25, 0.75]),
        dict(label_smoothing=0.2),
        dict(softcap=2.0),
        dict(z_loss=0.1),
        dict(ignore_index=4),
        dict(reduction="sum"),
        dict(reduction="none"),
    ],
)
def test_options_reach_the_loss(options):
    model = Model(head="nn.Linear", **options)
    x, targets = batch()
    targets[targets == -100] = 4
    norm, head = model.norm, model.lm_head
    arguments = dict(norm_weight=norm.weight, eps=norm.eps, bias=head.bias)
    actual = model.readout(model.states(x), targets)
    expected = looped_cross_entropy(model.states(x), head.weight, targets, **arguments, **options)
    assert torch.equal(actual.loss, expected.loss)
    without = looped_cross_entropy(model.states(x), head.weight, targets, **arguments)
    assert not torch.equal(actual.loss, without.loss)


def test_options_may_change():
    model = Model(chunk_rows=4)
    model.readout.chunk_rows = 0
    with pytest.raises(ValueError, match=r"chunk_rows must be >= 1\. Got 0"):
        model(*batch())
    model.readout.chunk_rows, model.readout.penalty = None, 1.0
    assert model(*batch()) > Model()(*batch())


def test_options_of_a_call(backend, device):
    model = Model(weights=[1.0, 0.0, 0.0], penalty=0.5).to(device)
    x, targets = batch(device)
    states = torch.stack(model.states(x)).detach().requires_grad_()
    weights = torch.rand(3, 2, 5, device=device, requires_grad=True)
    call = dict(n_targets=4.0, weights=weights, penalty=torch.tensor(0.2, device=device))
    result = model.readout(states, targets, **call, statistics=True)
    arguments = dict(norm_weight=model.norm.weight, eps=model.norm.eps, bias=model.lm_head.bias)
    expected = looped_cross_entropy_reference(states, model.lm_head.weight, targets, **arguments, **call)[0]
    torch.testing.assert_close(result.loss, expected)
    assert result.statistics.loss.shape == (3, 2, 5)
    assert torch.autograd.grad(result.loss, weights)[0].abs().min(0).values.count_nonzero() == 9
    assert model.readout(states, targets, penalty=0.0).loss < model.readout(states, targets).loss
    assert model.readout(states, targets).per_loop.isnan().tolist() == [False, True, True]
    assert model.readout(states, targets).statistics is None


@pytest.mark.parametrize("norm", ["Llama", "nn.LayerNorm", "none"])
def test_logits_and_statistics(backend, device, norm):
    model = Model(norm, softcap=30.0).to(device)
    x, targets = batch(device)
    states = model.states(x)
    logits = torch.stack([model.readout.logits(state) for state in states])
    per_loop = torch.stack([F.cross_entropy(z.flatten(0, 1), targets.flatten()) for z in logits])
    torch.testing.assert_close(per_loop, torch.stack([model.plain([state], targets, softcap=30.0) for state in states]))
    seen = model.readout.statistics(states, targets)
    torch.testing.assert_close(seen.loss.flatten(1).sum(1) / 9, per_loop.detach())
    torch.testing.assert_close(seen.lse, logits.logsumexp(-1).detach())
    assert torch.equal(seen.top1, logits.argmax(-1))
    assert model.readout.statistics(states).loss is None
    head_gradient = torch.autograd.grad(logits[1].logsumexp(-1).sum(), model.lm_head.weight)[0]
    assert head_gradient.abs().sum() > 0


def test_statistics_know_the_ignored_token():
    model = Model(ignore_index=7)
    x, targets = batch()
    targets[targets == -100] = 7
    assert model.readout.statistics(model.states(x), targets).loss[:, targets == 7].eq(0).all()


def test_logits_of_a_final_only_readout(backend, device):
    model = Model("RMSNorm", final_only=True).to(device)
    x, _ = batch(device)
    torch.testing.assert_close(model.readout.logits(x), model.lm_head(model.norm(x)))
    torch.testing.assert_close(model.readout.logits(x, last=False), model.lm_head(x))


def test_logits_of_states_in_another_dtype_than_the_head(backend, device):
    model = Model("nn.LayerNorm").to(device)
    x, targets = batch(device, torch.bfloat16)
    logits = model.readout.logits(x)
    assert logits.dtype == torch.bfloat16
    seen = readout_statistics([x], model.lm_head.weight, targets, **model.readout._parameters_of(x.dtype))
    torch.testing.assert_close(logits.float().logsumexp(-1), seen.lse[0], rtol=2e-2, atol=2e-2)


def test_the_readmes_model_runs():
    text = (Path(__file__).parents[1] / "kernels/README.md").read_text().split("## In a model that is not ours")[1]
    names = {"nn": nn, "RMSNorm": RMSNorm, "LoopedReadout": LoopedReadout}
    exec(text.split("```python\n")[1].split("```")[0], names)
    torch.manual_seed(0)
    model = names["Model"](nn.Embedding(VOCABULARY, D), nn.Linear(D, D), D, VOCABULARY)
    tokens, states = torch.randint(VOCABULARY, (2, 5)), []
    result = model(tokens, tokens)
    hidden = model.embed(tokens)
    for _ in range(4):
        hidden = model.stack(hidden)
        states.append(hidden)
    losses = [F.cross_entropy(model.lm_head(model.norm(h)).flatten(0, 1), tokens.flatten()) for h in states]
    torch.testing.assert_close(result.per_loop, torch.stack(losses).detach())
    expected = torch.stack(losses).mean() + 0.01 * torch.stack(states).square().mean()
    torch.testing.assert_close(result.loss, expected)


# LoopedReadout: a part of a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["nn.Linear", "nn.Embedding"])
def test_a_models_state_dict_does_not_change(head):
    model = Model(head=head)
    names = [name for name in model.state_dict() if not name.startswith("lm_head.bias")]
    assert names == ["layer.weight", "layer.bias", "norm.weight", "lm_head.weight"]
    assert [*dict(model.named_parameters(remove_duplicate=False))] == [*model.state_dict()]
    assert list(model.readout.modules()) == [model.readout]


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copied, pickled, saved, copy.copy])
@pytest.mark.parametrize("norm", ["nn.RMSNorm", "none"])
def test_a_copy_reads_out_its_own_modules(again, norm):
    model = Model(norm, penalty=0.2, softcap=4.0)
    other, (x, targets) = again(model), batch()
    assert other.readout.head is other.lm_head
    assert other.readout.norm is other.norm
    assert (other.lm_head is model.lm_head) == (again is copy.copy)
    expected = model(x, targets)
    assert torch.equal(other(x, targets), expected)
    nn.init.zeros_(other.lm_head.weight)
    assert again is copy.copy or torch.equal(model(x, targets), expected)
    assert not torch.equal(other(x, targets), expected)


def test_weights_are_read_at_every_call():
    model, (x, targets) = Model(), batch()
    model.double()
    assert model(x.double(), targets).dtype == torch.float64
    model.to(torch.bfloat16)
    assert model(x.bfloat16(), targets).isfinite()
    model.norm.eps = 1e3
    loss = model(x.bfloat16(), targets)
    model.norm.eps = 1e-3
    assert loss != model(x.bfloat16(), targets)
    other = Model().bfloat16()
    nn.init.ones_(other.norm.weight)
    swapped = torch.func.functional_call(model, dict(other.named_parameters()), (x.bfloat16(), targets))
    assert torch.equal(swapped, other(x.bfloat16(), targets))
    assert swapped != model(x.bfloat16(), targets)


@pytest.mark.parametrize("name", ["lm_head", "norm"])
def test_a_module_that_the_model_replaced_is_not_used(name):
    model, (x, targets) = Model(), batch()
    setattr(model, name, copy.deepcopy(getattr(model, name)))
    with pytest.raises(RuntimeError, match=f"{name.removeprefix('lm_')} must be held by the model.*one that is gone"):
        model(x, targets)
    with pytest.raises(RuntimeError, match="one that is gone"):
        copy.deepcopy(model)
    assert "readout='rmsnorm'" in repr(model)
    model.readout = LoopedReadout(model.lm_head, model.norm)
    assert model(x, targets).isfinite()


def test_a_head_that_nobody_trains_is_not_used():
    readout = LoopedReadout(nn.Linear(D, VOCABULARY), None)
    with pytest.raises(RuntimeError, match="head must be held by the model"):
        readout(*batch())


@pytest.mark.parametrize("d", [1, 2, 4096])
@pytest.mark.parametrize(
    ("kind", "readout"), [(nn.RMSNorm, "rmsnorm"), (LlamaNorm, "rmsnorm"), (nn.LayerNorm, "layernorm")]
)
def test_norms_of_any_width_are_known(kind, readout, d):
    assert LoopedReadout(nn.Linear(d, 2), kind(d)).readout == readout
    with pytest.raises(ValueError, match="Got OnePlusWeight"):
        LoopedReadout(nn.Linear(d, 2), OnePlusWeight(d))


def test_a_parametrized_head():
    """Its weight is computed when it is read."""
    model, (x, targets) = Model("none"), batch()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    model.readout = LoopedReadout(model.lm_head, None)
    loss, plain = model(x, targets), model.plain(model.states(x), targets)
    torch.testing.assert_close(loss, plain)
    parameters = list(model.lm_head.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters))


def test_representation():
    model = Model(final_only=True, penalty=0.01)
    assert repr(model.readout) == "LoopedReadout(readout='final-only', penalty=0.01)"
    assert repr(Model("none").readout) == "LoopedReadout(readout='raw')"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("norm", "head"), [("nn.RMSNorm without eps", "nn.Linear"), ("Llama", "nn.Embedding")])
def test_compiles_without_graph_breaks(norm, head, autocast):
    model, (x, targets) = Model(norm, head, penalty=0.1, weights=[0.0, 0.5, 0.5]), batch()

    def run(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(x, targets)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = dict(rtol=2e-2, atol=2e-2) if autocast else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(compiled), run(model), **tolerance)
    with torch.no_grad():  # a step, which the compiled graph must see
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(run(compiled), run(model), **tolerance)
    logits = torch.compile(model.readout.logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(x), model.readout.logits(x))


def test_autocast(backend, device, monkeypatch):
    monkeypatch.setattr(looped.kernels.device, "multiplies_faster", lambda dtype: True)  # else products are float32
    model = Model().to(device)
    x, targets = batch(device)
    states = [state.detach() for state in model.states(x)]
    with torch.autocast(device.type, torch.bfloat16):
        result, logits = model.readout(states, targets), model.readout.logits(states[0])
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(result.loss, model.plain(states, targets), rtol=2e-2, atol=2e-2)
    assert not torch.equal(result.loss, model.readout(states, targets).loss)


def test_a_model_on_meta():
    """The norm is tried on the CPU, and the readout follows the model from there."""
    with torch.device("meta"):
        model = Model("Llama")
    model.to_empty(device="cpu")
    model.load_state_dict(Model("Llama").state_dict())
    assert torch.equal(model(*batch()), Model("Llama")(*batch()))
    with torch.device("meta"), pytest.raises(ValueError, match="Got OnePlusWeight"):
        LoopedReadout(nn.Linear(D, VOCABULARY), OnePlusWeight(D))


def _rank_of_two(rank: int) -> None:
    """One of two ranks with half of the batch: DDP's gradients and FSDP2's against the whole batch on one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, targets = batch()
    targets[targets == -100] = 5  # so that the ranks' means are of equally many tokens
    whole = Model("Llama", penalty=0.1)
    whole(x, targets).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}

    def check(model):
        model(x[rank : rank + 1], targets[rank : rank + 1]).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], rtol=1e-4, atol=1e-6)

    check(nn.parallel.DistributedDataParallel(Model("Llama", penalty=0.1)))
    mesh = init_device_mesh("cpu", (2,))
    for apart in ((), ("lm_head",), ("lm_head", "norm")):  # modules whose own forward would gather them
        model = Model("Llama", penalty=0.1)
        for name in apart:
            fully_shard(getattr(model, name), mesh=mesh)
        model.readout = LoopedReadout(model.lm_head, model.norm, penalty=0.1)  # of sharded modules too
        fully_shard(model, mesh=mesh)
        check(model)
        assert model.readout.logits(x).isfinite().all()


def test_a_model_in_parallel(tmp_path):
    run_ranks(_rank_of_two, tmp_path)
