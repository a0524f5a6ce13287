"""The modules beside PyTorch's, and a readout beside the model that it reads out."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse_than
from torch import nn

from looped.kernels import LoopedReadout, RMSNorm, looped_cross_entropy, readout_statistics
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
D, VOCABULARY = 24, 37


# RMSNorm --------------------------------------------------------------------------------------------------------------


def norm_of(kind, device, dtype, *arguments, **options):
    torch.manual_seed(1)
    norm = kind(*arguments, **options, device=device)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(), dict(eps=1e-3), dict(elementwise_affine=False, eps=1e-5)])
@pytest.mark.parametrize(("shape", "normalized"), [((7, 48), 48), ((2, 3, 33), [33]), ((5, 4, 10), (4, 10))])
def test_rms_norm_is_a_drop_in(backend, device, shape, normalized, options, dtype):
    """Result and gradients of rows so small that eps weighs, against nn.RMSNorm with the same state dict."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=device).to(dtype) * 1e-3, torch.randn(shape, device=device).to(dtype)

    def run(kind, dtype):
        norm = norm_of(nn.RMSNorm, device, dtype, normalized, **options)
        if kind is RMSNorm:
            ours = RMSNorm(normalized, **options, device=device, dtype=dtype)
            ours.load_state_dict(norm.state_dict())
            norm = ours
        elif norm.eps is None:
            norm.eps = torch.finfo(torch.float32).eps  # that of float64's truth too
        h = x.to(dtype).requires_grad_()
        y = norm(h)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, [h, *norm.parameters()], dy.to(dtype))]

    results = run(RMSNorm, dtype), run(nn.RMSNorm, dtype), run(nn.RMSNorm, torch.float64)
    for actual, plain, truth in zip(*results, strict=True):
        assert_no_worse_than(actual, plain, truth, dtype=dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rms_norm_without_eps_has_pytorchs(dtype):
    x = torch.full((3, D), 1e-4 if dtype != torch.float64 else 1e-8, dtype=dtype)
    expected = nn.RMSNorm(D, dtype=dtype)(x)
    assert expected.max() < 0.9  # eps weighs
    torch.testing.assert_close(RMSNorm(D, dtype=dtype)(x), expected)


def test_rms_norm_interchanges_with_pytorchs():
    ours, theirs = RMSNorm(D, eps=1e-3), nn.RMSNorm(D, 1e-3)
    assert isinstance(ours, nn.RMSNorm)
    assert str(ours) == str(theirs)
    nn.init.uniform_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == ["weight"]
    assert list(RMSNorm(D, elementwise_affine=False).state_dict()) == []


@pytest.mark.parametrize("normalized", [(D,), (3, D)])
def test_rms_norm_gives_on_request_what_the_pass_gives(backend, device, normalized):
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, D, device=device, requires_grad=True) for _ in range(2))
    norm = norm_of(RMSNorm, device, torch.float32, normalized, eps=1e-3)
    plain = norm_of(nn.RMSNorm, device, torch.float32, normalized, eps=1e-3)
    axes = tuple(range(-len(normalized), 0))
    for more in (None, residual):
        h = x if more is None else x + more
        y, mean_square, total = norm(x, more, mean_square=True)
        expected = [plain(h), h.square().mean(axes)] + ([] if more is None else [h])
        actual = [y, mean_square] + ([] if more is None else [total])
        inputs = [x, *norm.parameters()] + ([] if more is None else [more])
        plains = [x, *plain.parameters()] + ([] if more is None else [more])
        upstream = [torch.randn_like(e) for e in expected]
        assert more is not None or total is None
        assert mean_square.dtype == torch.float32
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, plains, upstream)
        )
    assert torch.equal(norm(x, residual).residual, x + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_keeps_its_inputs_dtype_under_autocast(backend, device, dtype):
    x = torch.randn(3, D, device=device).to(dtype)
    norm = norm_of(RMSNorm, device, torch.float32, D)
    with torch.autocast(device.type, torch.bfloat16):
        y = norm(x)
        assert torch.is_autocast_enabled(device.type)
    assert y.dtype == dtype == norm_of(nn.RMSNorm, device, torch.float32, D)(x).dtype
    assert torch.equal(y, norm(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_compiles_without_graph_breaks(autocast):
    norm, x = norm_of(RMSNorm, "cpu", torch.float32, D), torch.randn(3, D)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x, x, mean_square=True), norm(x, x, mean_square=True))
        torch.testing.assert_close(compiled(x), norm(x))


def test_rms_norm_knows_shapes_on_meta():
    y, mean_square, total = RMSNorm((3, D), device="meta")(torch.empty(2, 3, D, device="meta"), mean_square=True)
    assert (y.shape, mean_square.shape, total) == ((2, 3, D), (2,), None)


@pytest.mark.parametrize(
    ("normalized", "arguments", "error", "message"),
    [
        (D, ("text",), TypeError, "x must be a tensor. Got str"),
        (D, (torch.ones(2, D), 3.0), TypeError, "residual must be a tensor. Got float"),
        (D, (torch.ones(2, D + 1),), ValueError, rf"x must have shape \[..., {D}\]. Got \(2, {D + 1}\)"),
        ((2, D), (torch.ones(2, D), torch.ones(D, 2)), ValueError, rf"residual must have shape \[..., 2, {D}\]"),
        (D, (torch.ones(2, D), torch.ones(3, D)), ValueError, r"residual must have x's shape"),
        (D, (torch.ones(2, D, dtype=torch.int64),), TypeError, "x must be float32"),
    ],
)
def test_rms_norm_rejects(normalized, arguments, error, message):
    with pytest.raises(error, match=message):
        RMSNorm(normalized)(*arguments)


def test_rms_norm_rejects_a_negative_eps():
    with pytest.raises(ValueError, match=r"eps must be finite and >= 0. Got -1\.0"):
        RMSNorm(D, eps=-1.0)(torch.ones(2, D))


# Norms that others write ----------------------------------------------------------------------------------------------


class LlamaNorm(nn.Module):
    """transformers' LlamaRMSNorm."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.variance_epsilon = 1e-4

    def forward(self, x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


class CohereNorm(LlamaNorm):
    """A LayerNorm without bias."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OnePlusWeight(LlamaNorm):
    """Gemma's, whose weight starts at 0."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class OnePlusLayerNorm(nn.LayerNorm):
    """Nemotron's: PyTorch's class and parameters, another result."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class EpsBesideTheRoot(LlamaNorm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class SquaredWeight(LlamaNorm):
    """The same as long as the weight is 1."""

    def forward(self, x):
        return super().forward(x) * self.weight


class PartialNorm(LlamaNorm):
    """pRMSNorm: the scale of the first quarter of the channels."""

    def forward(self, x):
        part = x[..., : max(1, x.shape[-1] // 4)]
        return self.weight * x * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class BiasedNorm(LlamaNorm):
    def __init__(self, d):
        super().__init__(d)
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return super().forward(x) + self.bias


class ScaledNorm(LlamaNorm):
    """A parameter more, which starts where it does nothing."""

    def __init__(self, d):
        super().__init__(d)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class PairNorm(LlamaNorm):
    def forward(self, x):
        return super().forward(x), x


NORMS = {
    "nn.RMSNorm": lambda: nn.RMSNorm(D, eps=1e-3),
    "nn.RMSNorm without eps": lambda: nn.RMSNorm(D),
    "RMSNorm": lambda: RMSNorm(D, eps=1e-3),
    "RMSNorm without weight": lambda: RMSNorm(D, elementwise_affine=False),
    "Llama": lambda: LlamaNorm(D),
    "nn.LayerNorm": lambda: nn.LayerNorm(D),
    "nn.LayerNorm without bias": lambda: nn.LayerNorm(D, bias=False),
    "nn.LayerNorm without parameters": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "Cohere": lambda: CohereNorm(D),
    "none": lambda: None,
}
HEADS = {
    "nn.Linear": lambda: nn.Linear(D, VOCABULARY),
    "nn.Linear without bias": lambda: nn.Linear(D, VOCABULARY, bias=False),
    "nn.Embedding": lambda: nn.Embedding(VOCABULARY, D),
}


class Model(nn.Module):
    """A recurrent model of someone else's: one layer K times, a norm, a head, and a readout of the two."""

    def __init__(self, norm="nn.RMSNorm", head="nn.Linear", n_loops=3, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.n_loops = nn.Linear(D, D), n_loops
        self.norm, self.lm_head = NORMS[norm](), HEADS[head]()
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 1.0)
        self.readout = LoopedReadout(self.lm_head, self.norm, **options)

    def states(self, x):
        states = []
        for _ in range(self.n_loops):
            x = x + torch.tanh(self.layer(x))
            states.append(x)
        return states

    def plain(self, states, targets, penalty=0.0, final_only=False, softcap=None):
        """The mean loss as one writes it with modules."""
        losses = []
        for loop, state in enumerate(states):
            y = state if self.norm is None or (final_only and loop < len(states) - 1) else self.norm(state)
            head = self.lm_head
            logits = F.linear(y, head.weight) if isinstance(head, nn.Embedding) else head(y)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            losses.append(F.cross_entropy(logits.flatten(0, -2).to(torch.float32), targets.flatten()))
        return torch.stack(losses).mean() + penalty * torch.stack(states).float().square().mean()

    def forward(self, x, targets):
        return self.readout(self.states(x), targets).loss


def batch(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, D, generator=generator)
    targets = torch.randint(VOCABULARY, (2, 5), generator=generator)
    targets[0, 1] = -100
    return x.to(device, dtype), targets.to(device)


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


def test_autocast(backend, device):
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


def _rank_of_two(rank: int, store: str) -> None:
    """One of two ranks with half of the batch: DDP's gradients and FSDP2's against the whole batch on one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
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
    dist.barrier()
    dist.destroy_process_group()


def test_a_model_in_parallel(tmp_path):
    torch.multiprocessing.spawn(_rank_of_two, args=(f"{tmp_path}/store",), nprocs=2)


# LoopedReadout: what it refuses ---------------------------------------------------------------------------------------


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def weight_normed():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(D, VOCABULARY))


def parametrized():
    return nn.utils.parametrizations.spectral_norm(nn.LayerNorm(D))


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (
            lambda: OnePlusWeight(D),
            ValueError,
            "norm must compute an RMSNorm without bias or a LayerNorm.*Got OnePlusWeight",
        ),
        (lambda: OnePlusLayerNorm(D), ValueError, "Got OnePlusLayerNorm"),
        (lambda: EpsBesideTheRoot(D), ValueError, "Got EpsBesideTheRoot"),
        (lambda: SquaredWeight(D), ValueError, "Got SquaredWeight"),
        (lambda: PartialNorm(D), ValueError, "Got PartialNorm"),
        (lambda: BiasedNorm(D), ValueError, "Got BiasedNorm"),
        (lambda: PairNorm(D), ValueError, "Got PairNorm"),
        (lambda: ScaledNorm(D), ValueError, "no parameters and buffers but weight and bias. Got ScaledNorm with gain"),
        (lambda: nn.BatchNorm1d(D), ValueError, "norm must have no parameters.*BatchNorm1d with running_mean"),
        (lambda: nn.RMSNorm((3, D)), ValueError, rf"norm.weight must have.*\({D},\). Got \(3, {D}\) of RMSNorm"),
        (lambda: nn.LayerNorm(D + 1), ValueError, rf"norm.weight must have the head's columns \({D},\)"),
        (
            lambda: nn.RMSNorm((2, D), elementwise_affine=False),
            ValueError,
            f"norm float32 rows of {D} on .*RMSNorm raised",
        ),
        (lambda: nn.Identity(), ValueError, "norm must have eps or variance_epsilon. Got Identity"),
        (lambda: nn.LayerNorm(D, eps=-1.0), ValueError, "eps must be finite and >= 0. Got -1.0"),
        (
            lambda: parametrized(),
            ValueError,
            "norm must have no parameters.*ParametrizedLayerNorm with parametrizations",
        ),
        (lambda: nn.RMSNorm, TypeError, "norm must be a module or None. Got type"),
        (lambda: 1e-6, TypeError, "norm must be a module or None. Got float"),
    ],
)
def test_refuses_a_norm(backend, device, norm, error, message):
    norm = norm()
    if isinstance(norm, nn.Module):
        norm.to(device)
    with pytest.raises(error, match=message) as raised:
        LoopedReadout(nn.Linear(D, VOCABULARY, device=device), norm)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (lambda: nn.Bilinear(D, D, VOCABULARY), TypeError, "head must be an nn.Linear or nn.Embedding.*Got Bilinear"),
        (lambda: ScaledLinear(D, VOCABULARY), TypeError, "Got ScaledLinear"),
        (lambda: torch.ones(VOCABULARY, D), TypeError, "head must be an nn.Linear or nn.Embedding.*Got Tensor"),
        (weight_normed, ValueError, "head must have no parameters.*Got Linear with weight_g, weight_v"),
    ],
)
def test_refuses_a_head(head, error, message):
    with pytest.raises(error, match=message):
        LoopedReadout(head(), None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(penalty=-1.0), ValueError, "penalty must be finite and >= 0. Got -1.0"),
        (dict(penalty=torch.ones(())), TypeError, "penalty must be a number"),
        (dict(z_loss=torch.ones(())), TypeError, "z_loss must be a number"),
        (dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]. Got 1.5"),
        (dict(softcap=0.0), ValueError, "softcap must be"),
        (dict(ignore_index=0.5), TypeError, "ignore_index must be an integer"),
        (dict(reduction="median"), ValueError, "reduction must be mean, sum or none. Got 'median'"),
        (dict(reduction="none", penalty=0.1), ValueError, "penalty is added to a sum"),
        (dict(chunk_rows=0), ValueError, "chunk_rows must be"),
        (dict(weights=torch.ones(3)), TypeError, "weights must be a sequence of numbers or None; a tensor.*Got Tensor"),
        (dict(weights="111"), TypeError, "weights must be a sequence of numbers.*Got str"),
        (dict(weights=[1.0, float("nan")]), ValueError, r"weights\[1\] must be finite"),
        (
            dict(norm="nn.LayerNorm", final_only=True),
            ValueError,
            "norm must be an RMSNorm for final_only. Got LayerNorm",
        ),
        (dict(norm="none", final_only=True), ValueError, "norm must be an RMSNorm for final_only. Got NoneType"),
    ],
)
def test_refuses_an_option(options, error, message):
    with pytest.raises(error, match=message):
        Model(**options)


@pytest.mark.parametrize(
    ("states", "call", "error", "message"),
    [
        ([], dict(), ValueError, "states must be a tensor .*Got an empty sequence"),
        (3, dict(), ValueError, "states must be a tensor .*Got int"),
        (["text"], dict(), TypeError, r"states\[0\] must be a tensor. Got str"),
        (torch.ones(3, 2, 5, D + 1), dict(), ValueError, rf"head must have shape \[V, {D + 1}\]"),
        (torch.ones(3, 2, 5, D), dict(weights=[1.0]), ValueError, "each of the 3 loops. Got 1"),
        (torch.ones(3, 2, 5, D), dict(penalty=-1.0), ValueError, "penalty must be finite and >= 0"),
    ],
)
def test_refuses_a_call(states, call, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        model.readout(states, batch()[1], **call)
