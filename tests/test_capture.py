"""States of other people's models, captured as the models run, against the models' own logits at every depth."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from foreign_models import MODELS, run, small, token_batch
from numerics import assert_no_worse_than
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import looped
from bench.competitors.recurrent_models import SMALL, Ouro
from looped.adapters import find_adapter

TOKENS, LABELS = token_batch()
NAMES = {"norm": "model.norm", "head": "lm_head"}  # Ouro's and Nanbeige's


def targets_of(model: nn.Module) -> Tensor:
    return F.pad(LABELS[:, 1:], (0, 1), value=-100) if find_adapter(model).shifts else LABELS


def plain(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mean over k of the cross-entropy of the model that stops after k loops, and its gradients."""
    model = small(name, dtype).train()
    losses = []
    for n_loops in range(1, find_adapter(model).n_loops + 1):
        logits = run(model, TOKENS, n_loops).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses.append(F.cross_entropy(logits.flatten(0, 1).to(wide), targets_of(model).flatten()))
    per_loop = torch.stack(losses)
    per_loop.mean().backward()
    return {"loss": per_loop.mean().detach(), "per_loop": per_loop.detach(), **gradients(model)}


def captured(model: nn.Module, **options) -> looped.Captured:
    with looped.capture(model, **options) as result:
        run(model, TOKENS)
    return result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_capture_of_known_models(name, dtype):
    """Loss of every loop, and the gradients of every parameter, are those of the model that stops there."""
    truth, same_dtype = plain(name, torch.float64), plain(name, dtype)
    model = small(name, dtype).train()
    result = captured(model).cross_entropy(targets_of(model))
    result.loss.backward()
    actual = {"loss": result.loss.detach(), "per_loop": result.per_loop, **gradients(model)}
    assert actual.keys() == truth.keys()
    for key in truth:
        assert_no_worse_than(actual[key], same_dtype[key], truth[key], dtype=dtype, name=key)


@pytest.mark.parametrize("name", MODELS)
def test_capture_leaves_the_model_alone(name):
    model = small(name, torch.float32)
    before = run(model, TOKENS).logits
    with looped.capture(model) as result:
        during = run(model, TOKENS).logits
    assert torch.equal(before, during)
    assert torch.equal(before, run(model, TOKENS).logits)
    assert len(result.states) == find_adapter(model).n_loops
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["ouro", "huginn"])
def test_capture_penalty_is_on_the_states(name):
    """Also where a coda stands between the states and the norm."""
    model = small(name).train()
    result = captured(model)
    states = result.states
    for weights in (None, [0.0] * (len(states) - 1) + [1.0]):
        with_penalty = result.cross_entropy(targets_of(model), weights=weights, penalty=0.3).loss
        without = result.cross_entropy(targets_of(model), weights=weights).loss
        expected = 0.3 * torch.stack(states).square().mean()
        torch.testing.assert_close(with_penalty - without, expected)
    (actual,) = torch.autograd.grad(with_penalty - without, states[-1], retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, states[-1], retain_graph=True)[0])


def test_capture_weight_zero_is_not_read():
    """Nor is its coda run."""
    model, runs = small("huginn"), []
    result = captured(model)
    model.transformer.coda[0].register_forward_hook(lambda *_: runs.append(1))
    per_loop = result.cross_entropy(LABELS, weights=[0.0, 0.0, 1.0]).per_loop
    assert len(runs) == 1
    assert per_loop.isfinite().tolist() == [False, False, True]


def test_capture_by_names():
    """The names say the same as the adapter, with a state given by keyword, or returned in a tuple."""
    model = small("ouro")
    known, named = captured(model), captured(model, **NAMES)
    assert all(map(torch.equal, known.states, named.states))
    model.model.norm.register_forward_pre_hook(lambda *_: None)
    forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden_states: forward(hidden_states)
    layers = captured(model, states="model.layers.1", norm="model.norm", head="lm_head")
    assert all(map(torch.equal, known.states, layers.states))
    nanbeige = small("nanbeige")
    layers = captured(nanbeige, states="model.layers.1", norm="model.norm", head="lm_head")
    assert all(map(torch.equal, captured(nanbeige).states, layers.states))


def test_capture_without_a_norm():
    model = small("ouro")
    result = captured(model, states="model.norm", head="lm_head")
    assert result.readout.readout == "raw"
    torch.testing.assert_close(result.readout.logits(result.states[-1]), run(model, TOKENS).logits)


def test_capture_keeps_the_last_call():
    model = small("ouro")
    with looped.capture(model) as result:
        run(model, TOKENS)
        last = run(model, TOKENS.flip(1)).logits
    assert len(result.states) == 3
    torch.testing.assert_close(result.readout.logits(result.states[-1]), last)


def test_capture_releases_the_states():
    model = small("ouro")
    result = captured(model)
    state = weakref.ref(result.states[0])
    del result
    gc.collect()
    assert state() is None


# Where the model runs in another way ----------------------------------------------------------------------------------


def compiled_in_place(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")


def compiled_and_replaced(model: nn.Module) -> None:
    model.model.layers = nn.ModuleList(torch.compile(layer, backend="aot_eager") for layer in model.model.layers)


def compiled_norm(model: nn.Module) -> None:
    model.model.norm = torch.compile(model.model.norm, backend="aot_eager")


def checkpointed(model: nn.Module, use_reentrant: bool = False) -> None:
    """Every call of a layer, its hooks included, is computed again in the backward pass."""

    def call(self: nn.Module, state: Tensor, **kwargs):
        return checkpoint(lambda x: nn.Module.__call__(self, x, **kwargs), state, use_reentrant=use_reentrant)

    for layer in model.model.layers:
        layer.__class__ = type("Checkpointed", (type(layer),), {"__call__": call})


def checkpointed_reentrant(model: nn.Module) -> None:
    checkpointed(model, use_reentrant=True)


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    """Of a step within the block, where the backward pass may run the modules again."""
    n_loops = find_adapter(model).n_loops
    with looped.capture(model.train()) as result:
        run(model, TOKENS)
        loss = result.cross_entropy(targets_of(model), penalty=0.1).loss
        loss.backward()
        assert len(result.states) == n_loops
    return [loss.detach(), *gradients(model).values()]


@pytest.mark.parametrize("name", ["nanbeige", "nanbeige, one norm"])
@pytest.mark.parametrize(
    "change",
    [compiled_and_replaced, compiled_norm, checkpointed, checkpointed_reentrant],
    ids=lambda change: change.__name__,
)
def test_capture_under(change, name):
    """Loss and gradients are those of the model as it was."""
    expected = loss_and_gradients(small(name))
    model = small(name)
    change(model)
    for actual, wanted in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_capture_under_blocks_compiled_in_place():
    expected = loss_and_gradients(small("nanbeige"))
    model = small("nanbeige")
    compiled_in_place(model)
    for actual, wanted in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_capture_under_gradient_checkpointing_of_transformers():
    expected = loss_and_gradients(small("hrm_text"))
    model = small("hrm_text")
    model.gradient_checkpointing_enable()
    for actual, wanted in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_capture_under_autocast():
    """No worse than the model's own loss under autocast."""

    def own(model: nn.Module, *, autocast: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = [run(model, TOKENS, n_loops).logits.double() for n_loops in (1, 2)]
        targets = targets_of(model).flatten()
        loss = torch.stack([F.cross_entropy(each.flatten(0, 1), targets) for each in logits]).mean()
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    truth = own(small("nanbeige"), autocast=False)
    same_dtype = own(small("nanbeige", torch.float32), autocast=True)
    model = small("nanbeige", torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = captured(model).cross_entropy(targets_of(model)).loss
    loss.backward()
    for key, value in {"loss": loss.detach(), **gradients(model)}.items():
        assert_no_worse_than(value, same_dtype[key], truth[key], dtype=torch.bfloat16, name=key)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", [lambda m: m, lambda m: m.model, lambda m: m.model.norm], ids=["all", "model", "norm"]
)
def test_capture_rejects_a_compiled_caller(where):
    model = small("ouro")
    where(model).compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"^norm must be called from code that is not compiled.*'model.norm', with"):
        captured(model)


def test_capture_rejects_a_compiled_model():
    with pytest.raises(ValueError, match=r"not compiled: replace blocks .* Got .* with the whole model compiled"):
        captured(torch.compile(small("ouro"), backend="aot_eager"), **NAMES)


def test_capture_says_that_compiled_code_was_not_looked_at():
    model = small("ouro")
    compiled = torch.compile(model, backend="aot_eager")
    run(compiled, TOKENS)
    with looped.capture(model) as result:
        run(compiled, TOKENS)
    with pytest.raises((RuntimeError, ValueError), match=r"the model must have run|outside of compiled code"):
        _ = result.states


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "model.nrom"}, r"norm must be the name .* Got 'model.nrom'; the nearest is 'model.norm'"),
        ({"norm": ""}, r"norm must be the name of a module of Ouro. Got ''"),
        ({"states": "layers"}, r"states must be the name of a module of Ouro. Got 'layers'"),
        ({"norm": "model.norm", "head": "head"}, r"head must be the name of a module of Ouro. Got 'head'"),
        ({"norm": "model.norm", "head": "model.norm"}, r"head must be an nn.Linear or nn.Embedding.* Got Norm"),
        ({"norm": "model.layers.0", "head": "lm_head"}, r"norm must have no parameters and buffers but"),
        ({"norm": "model.norm", "head": "model.early_exit_gate", "coda": ["x"]}, r"coda must be the name of a module"),
        ({"head": "model.early_exit_gate"}, r"norm or states must be named with head and coda. Got head='model.early"),
        ({"coda": ["model.norm"]}, r"norm or states must be named with head and coda. Got head=None, coda=\['model"),
    ],
)  # fmt: skip
def test_capture_rejects_names(options, message):
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        captured(small("ouro"), **options)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200


def test_capture_rejects_an_unknown_model():
    with pytest.raises(ValueError, match=r"model must be one of albert, .*, ouro, or its modules named.* Got Linear"):
        captured(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "option", "value"), [("nanbeige", "enable_hyper_connection", True), ("albert", "num_hidden_groups", 3)]
)
def test_capture_rejects_another_recurrence(name, option, value):
    model = small(name)
    setattr(model.config, option, value)
    with pytest.raises(ValueError, match=f"{option} must be .* Got {value}"):
        captured(model)


def test_capture_rejects_a_norm_after_the_loop():
    with pytest.raises(
        ValueError, match=r"'model.norm' was called once: no recurrent states. For a norm after the loop"
    ):
        _ = captured(small("nanbeige, one norm"), **NAMES).states


def test_capture_rejects_a_model_that_has_not_run():
    model = small("ouro")
    with looped.capture(model) as result:
        model.model(TOKENS)
    with pytest.raises(RuntimeError, match="the model must have run: call the very module"):
        _ = result.states


def test_capture_rejects_a_loss_without_a_head():
    with pytest.raises(ValueError, match="head must be named for a loss"):
        captured(small("ouro"), norm="model.norm").cross_entropy(LABELS)


def test_capture_rejects_states_changed_in_place():
    model = small("ouro")
    model.model.norm.register_forward_hook(lambda _, args, y: args[0].mul_(2) if not args[0].requires_grad else None)
    with torch.no_grad(), pytest.raises(ValueError, match="states must not be changed in place"):
        _ = captured(model).states


def test_capture_rejects_states_that_hide_their_gradients():
    """Those of a module inside of what reentrant checkpointing computes again."""
    model = small("nanbeige").train()
    checkpointed(model, use_reentrant=True)
    inside = {"states": "model.layers.1.self_attn", "norm": "model.norm", "head": "lm_head"}
    with pytest.raises(ValueError, match="states must carry gradients while the model trains"):
        captured(model, **inside).cross_entropy(LABELS)
    assert captured(model.eval(), **inside).cross_entropy(LABELS).loss.isfinite()


def test_capture_rejects_dtypes_and_shapes():
    model = Ouro()
    with pytest.raises(ValueError, match="targets must have the tokens' shape"):
        captured(model).cross_entropy(LABELS[:, 1:])
    model.lm_head.double()
    with looped.capture(model) as result:
        model.model.register_forward_hook(lambda _, __, y: (y[0].double(), *y[1:]))
        run(model, TOKENS)
    with pytest.raises(TypeError, match="head and states must both be float64 or neither"):
        result.cross_entropy(LABELS)
    assert result.states[0].shape == (*TOKENS.shape, SMALL.d)


@pytest.mark.parametrize("name", ["ouro", "huginn"])
@pytest.mark.parametrize("penalty", [-1.0, float("nan")])
def test_capture_rejects_a_penalty(name, penalty):
    with pytest.raises(ValueError, match="penalty must be"):
        captured(small(name)).cross_entropy(LABELS, penalty=penalty)
