"""Patched models: the loss and the gradients are those of the models' own code."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from foreign_models import MODELS, VOCABULARY, run, small, token_batch
from numerics import assert_no_worse_than
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import looped
from bench.competitors.recurrent_models import SMALL, Ouro
from looped.adapters import find_adapter

TOKENS, LABELS = token_batch()
DTYPES = [torch.float32, torch.bfloat16]


def loss_and_gradients(model: nn.Module, **options) -> dict[str, Tensor]:
    loss = run(model.train(), TOKENS, labels=LABELS, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_patch(name, dtype):
    """By the usual criterion; the loss is formed without logits, and afterwards the model is what it was."""
    truth, own = loss_and_gradients(small(name)), loss_and_gradients(small(name, dtype))
    model = small(name, dtype)
    attributes = set(vars(model))
    with looped.patch(model) as patched:
        assert patched is model
        actual = loss_and_gradients(model)
        output = run(model, TOKENS, labels=LABELS)
    assert output.logits is None
    assert set(vars(model)) == attributes
    assert actual.keys() == own.keys()
    for key in truth:
        assert_no_worse_than(actual[key], own[key], truth[key], dtype=dtype, name=key)
    assert run(model, TOKENS, labels=LABELS).logits is not None


@pytest.mark.parametrize("name", MODELS)
def test_patch_without_labels(name):
    """The model does what it did."""
    model = small(name, torch.float32)
    expected = run(model, TOKENS).logits
    with looped.patch(model):
        assert torch.equal(run(model, TOKENS).logits, expected)


@pytest.mark.parametrize("name", ["hrm_text", "ouro", "huginn"])
def test_patch_per_loop_with_penalty(name):
    model = small(name).train()
    with looped.capture(model) as captured:
        run(model, TOKENS)
    targets = F.pad(LABELS[:, 1:], (0, 1), value=-100) if find_adapter(model).shifts else LABELS
    expected = captured.cross_entropy(targets, penalty=0.2).loss
    with looped.patch(model, loss="per-loop", penalty=0.2):
        torch.testing.assert_close(run(model, TOKENS, labels=LABELS).loss, expected)


@pytest.mark.parametrize("loss", ["own", "per-loop"])
@pytest.mark.parametrize("name", ["hrm_text", "ouro", "huginn"])
def test_patch_divides_by_the_items_of_all_batches(name, loss):
    """One of two equal batches that are added up has half of the loss, of the penalty too."""
    model = small(name)
    n_items = (LABELS[:, 1:] if find_adapter(model).shifts else LABELS).ne(-100).sum()
    for penalty in (0.0, 0.5):
        with looped.patch(model, loss=loss, penalty=penalty):
            whole = run(model, TOKENS, labels=LABELS).loss
            half = run(model, TOKENS, labels=LABELS, num_items_in_batch=2 * n_items).loss
            number = run(model, TOKENS, labels=LABELS, num_items_in_batch=2 * int(n_items)).loss
        torch.testing.assert_close(2 * half, whole)
        torch.testing.assert_close(number, half)


def test_patch_takes_shifted_labels():
    model = small("ouro")
    shifted = F.pad(LABELS[:, 1:], (0, 1), value=-100)
    with looped.patch(model):
        expected = run(model, TOKENS, labels=LABELS).loss
        torch.testing.assert_close(run(model, TOKENS, labels=LABELS, shift_labels=shifted).loss, expected)


def test_patch_takes_another_ignore_index():
    model = small("ouro")
    with looped.patch(model):
        expected = run(model, TOKENS, labels=LABELS.masked_fill(LABELS == 3, -100)).loss
        torch.testing.assert_close(run(model, TOKENS, labels=LABELS, ignore_index=3).loss, expected)


def test_patch_of_a_subclass_that_hands_its_arguments_on():
    class Named(Ouro):
        def forward(self, input_ids, **options):
            return super().forward(input_ids, **options)

    model = Named(SMALL)
    own = run(model, TOKENS, labels=LABELS)
    with looped.patch(model):
        patched = run(model, TOKENS, labels=LABELS)
    assert patched.logits is None
    torch.testing.assert_close(patched.loss, own.loss)


def test_patch_takes_positional_labels():
    model = small("ouro")
    expected = model(TOKENS, LABELS).loss
    with looped.patch(model):
        torch.testing.assert_close(model(TOKENS, LABELS).loss, expected)


def test_patch_never_has_the_logits():
    """The head is not multiplied with: neither called nor its result asked for."""
    model, shapes = small("nanbeige"), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().nbytes() > 8:
                shapes.append(tuple(result.shape))
            return result

    with looped.patch(model), Watch():
        run(model, TOKENS, labels=LABELS)
    assert (*TOKENS.shape, VOCABULARY) not in shapes


def test_patch_undo():
    model = small("ouro")
    patched = looped.patch(model, penalty=0.1)
    patched.undo()
    patched.undo()
    with looped.patch(model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert "forward" not in vars(model)


def test_patch_is_undone_under_a_wrapper():
    """As transformers' trainer and accelerate wrap a model's forward, for autocast, and leave it so."""
    model = small("ouro")
    patched = looped.patch(model)
    wrapped = model.forward
    model.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    assert model(TOKENS, labels=LABELS).logits is None
    patched.undo()
    assert model(TOKENS, labels=LABELS).logits is not None


@pytest.mark.parametrize("unwrapped", [False, True])
def test_patch_under_accelerate(unwrapped, monkeypatch):
    """It wraps the function of a model's forward, and makes a method of the result, or of what it finds inside."""
    accelerate = pytest.importorskip("accelerate")
    for kind in (accelerate.state.PartialState, accelerate.state.AcceleratorState, accelerate.state.GradientState):
        monkeypatch.setattr(kind, "_shared_state", {})  # which is the process's, trainers of other tests included
    model = small("hrm_text", torch.float32)
    patched = looped.patch(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(model)
    if unwrapped:
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"
    assert model(TOKENS, labels=LABELS).logits is None
    with pytest.raises(ValueError, match="a patched model must not be copied"):
        copy.deepcopy(model)(TOKENS, labels=LABELS)
    patched.undo()
    output = model(TOKENS, labels=LABELS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(other(TOKENS, labels=LABELS).logits, output.logits)


def test_patch_that_was_undone_is_not_used_again():
    patched = looped.patch(small("ouro"))
    with patched:
        pass
    with pytest.raises(ValueError, match="a patch that was undone must not be used again"), patched:
        pass


def test_patch_after_a_failed_call():
    model = small("ouro")
    with looped.patch(model):
        with pytest.raises(ValueError, match="targets must have the tokens' shape"):
            run(model, TOKENS, labels=LABELS[:, :4])
        assert "forward" not in vars(model.lm_head)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_patch_of_a_compiled_model():
    """The patched forward runs eagerly, its compiled blocks compiled."""
    expected = loss_and_gradients(small("ouro"))
    model = small("ouro")
    model.model.layers = nn.ModuleList(torch.compile(layer, backend="aot_eager") for layer in model.model.layers)
    graphs = CompileCounter()
    with looped.patch(model):
        actual = loss_and_gradients(torch.compile(model, backend=graphs))
    assert graphs.frame_count == 0
    for value, wanted in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(value, wanted)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "terminal"}, r"loss must be one of own, per-loop. Got 'terminal'"),
        ({"penalty": -1.0}, r"penalty must be finite and >= 0. Got -1"),
    ],
)
def test_patch_rejects_options(options, message):
    with pytest.raises(ValueError, match=message):
        looped.patch(small("ouro"), **options)


def test_patch_rejects_a_model_that_is_patched():
    model = small("ouro")
    with looped.patch(model), pytest.raises(ValueError, match=r"model must have the forward of its class.* Got Ouro"):
        looped.patch(model)


def test_patch_rejects_models():
    with pytest.raises(ValueError, match=r"model must be one of albert, [a-z_, ]*ouro\. Got Linear\.$"):
        looped.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Got DataParallel, which wraps one: give its \.module\.$"):
        looped.patch(nn.DataParallel(small("ouro")))
    model = small("ouro")
    del model.lm_head
    with pytest.raises(ValueError, match=r"model must have its head, the module lm_head\. Got Ouro, which has none"):
        looped.patch(model)

    class Headless(Ouro):
        def forward(self, input_ids):
            return self.model(input_ids)

    model = Headless()
    with pytest.raises(ValueError, match=r"model must take labels. Got Headless"):
        looped.patch(model)
    assert "forward" not in vars(model)


def test_patch_rejects_a_compiled_head():
    """It would form the logits all the same."""
    model = small("ouro")
    model.lm_head.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="head must have the forward of its class"):
        looped.patch(model)
    model = small("nanbeige")
    model.lm_head = torch.compile(model.lm_head, backend="aot_eager")
    with pytest.raises(ValueError, match="head must have the forward of its class"):
        looped.patch(model)


def test_patch_rejects_copies():
    model = small("ouro")
    with looped.patch(model):
        with pytest.raises(ValueError, match="a patched model must not be copied"):
            copy.deepcopy(model)
        with pytest.raises(ValueError, match="a patched model must not be pickled"):
            pickle.dumps(model)


def test_patch_rejects_other_outputs():
    """A tuple; and one of two losses, of which the head's is one."""
    model = small("hrm_text")
    with (
        looped.patch(model),
        pytest.raises(ValueError, match=r"must return an output with loss and logits.* Got a tuple"),
    ):
        run(model, TOKENS, labels=LABELS, return_dict=False)
    assert isinstance(run(model, TOKENS, labels=LABELS, return_dict=False), tuple)
    transformers = pytest.importorskip("transformers")
    model = transformers.AlbertForPreTraining(small("albert").config)
    with (
        looped.patch(model),
        pytest.raises(ValueError, match=r"with loss and logits.* Got a AlbertForPreTrainingOutput"),
    ):
        run(model, TOKENS, labels=LABELS)
