"""What LoopedReadout refuses."""

import pytest
import torch
from foreign_modules import (
    VOCABULARY,
    BiasedNorm,
    D,
    EpsBesideTheRoot,
    Model,
    OnePlusLayerNorm,
    OnePlusWeight,
    PairNorm,
    PartialNorm,
    ScaledNorm,
    SquaredWeight,
    batch,
)
from torch import nn

from looped.kernels import LoopedReadout

pytestmark = pytest.mark.usefixtures("poisoned")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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
