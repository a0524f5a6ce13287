"""A head whose rows the ranks of a group share out: loss, gradients and statistics are those of the whole head.

Every case runs in groups of 2 and of 4 gloo processes, each with its share of the tokens, and is put together here
again: the losses' mean is that of all tokens, and so are the gradients of what all ranks have; a rank's part of what is
cut into parts is divided by the number of ranks.  Truth is the plain readout of all tokens in float64.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from numerics import assert_no_worse_than
from ranks import run_ranks
from readout_case import Case
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from looped.kernels import LoopedReadout, VocabularyShard, looped_cross_entropy, readout_statistics
from looped.kernels.cross_entropy import LossOptions, RowResults
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference
from looped.kernels.sharded_cross_entropy import finish_rows, form_parts, n_parts
from looped.kernels.statistics import readout_statistics_reference

SHAPE = (3, 12, 32, 37)  # loops, tokens, channels, words: 19 and 18 of them on 2 ranks, 10, 10, 10 and 7 on 4
BF16 = {"dtype": torch.bfloat16}
CASES = {
    "plain": {},
    "token weights": {"weights": "token", "penalty": 0.1, "ignored": 3},
    "loop weights": {"weights": "loop", "readout": "layernorm"},
    "terminal": {"weights": [0.0, 0.0, 1.0], "readout": "final-only", "penalty": 0.05},
    "numbers": {"weights": [0.2, 0.0, 0.7], "ignored": 6},
    "everything": {
        "bias": True, "softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "weights": "token", "penalty": 0.1,
        "ignored": 3,
    },
    "smoothed": {"label_smoothing": 0.2, "readout": "raw"},
    "n_targets": {"n_targets": 15.0, "bias": True},
    "sum": {"reduction": "sum", "weights": "loop"},
    "none": {"reduction": "none", "weights": "token", "bias": True},
    "all ignored": {"ignored": 12, "penalty": 0.1},
    "bfloat16": BF16,
    "bfloat16 everything": BF16 | {"bias": True, "softcap": 4.0, "label_smoothing": 0.1, "weights": "token"},
    "float64": {"dtype": torch.float64, "bias": True, "z_loss": 0.1},
}  # fmt: skip
FEW = ("plain", "everything", "bfloat16")
OF_TOKENS = {"states": 1, "weights": 1}  # what has a part for each rank's tokens, and the dimension of these
OF_WORDS = ("head", "bias")


def case_of(name: str) -> Case:
    return Case(SHAPE, **CASES[name])


def cut(case: Case, name: str, shard: VocabularyShard, *, same_states: bool) -> Tensor:
    """This rank's part of a tensor of the case."""
    tensor = case.tensors[name]
    if name in OF_WORDS:
        return tensor[shard.rows]
    if name in OF_TOKENS and tensor.dim() > 1 and not same_states:
        return tensor.chunk(shard.n_ranks, OF_TOKENS[name])[shard.rank]
    return tensor


def of_rank(name: str, group: dist.ProcessGroup, *, same_states: bool = False) -> dict[str, object]:
    """Loss, per_loop, the gradients and the statistics that this rank has."""
    case = case_of(name)
    shard = VocabularyShard.of(SHAPE[-1], group, same_states=same_states)
    tensors = {key: cut(case, key, shard, same_states=same_states).clone().requires_grad_() for key in case.tensors}
    arguments = dict(tensors)
    states, head = arguments.pop("states"), arguments.pop("head")
    targets = case.targets if same_states else case.targets.chunk(shard.n_ranks)[shard.rank]
    options = dict(case.options)
    if "n_targets" in options and not same_states:
        options["n_targets"] /= shard.n_ranks
    result = looped_cross_entropy(
        states, head, targets, statistics=True, shard=shard, chunk_rows=8, **arguments, **options
    )
    gradients = torch.autograd.grad(result.loss, list(tensors.values()), torch.ones_like(result.loss))
    return {
        "loss": result.loss.detach(),
        "per_loop": result.per_loop,
        "gradients": dict(zip(tensors, gradients, strict=True)),
        "statistics": result.statistics._asdict(),
    }


def put_together(ranks: list[dict], case: Case, *, same_states: bool) -> dict[str, Tensor]:
    """Of all ranks' results those of all tokens and words, and the loss."""
    n_ranks = len(ranks)
    total = n_ranks if case.options.get("reduction", "mean") != "mean" else 1  # what a mean over ranks is short of
    gradients = [rank["gradients"] for rank in ranks]
    if same_states:
        whole = {"loss": ranks[0]["loss"], "per_loop": ranks[0]["per_loop"]}
        return whole | {
            name: torch.cat([of[name] for of in gradients]) if name in OF_WORDS else gradients[-1][name]
            for name in case.tensors
        }
    losses = [rank["loss"] for rank in ranks]
    whole = {"per_loop": torch.stack([rank["per_loop"] for rank in ranks]).mean(0)}
    whole["loss"] = torch.cat(losses, 1) if losses[0].dim() else torch.stack(losses).mean() * total
    for name, tensor in case.tensors.items():
        parts = [of[name] for of in gradients]
        if name in OF_WORDS:
            whole[name] = torch.cat(parts) * total
        elif name in OF_TOKENS and tensor.dim() > 1:
            whole[name] = torch.cat(parts, OF_TOKENS[name]) * total / n_ranks
        else:
            whole[name] = torch.stack(parts).mean(0) * total
    return whole


def statistics_of_rank(name: str) -> dict[str, Tensor]:
    """`readout_statistics` of this rank's tokens."""
    shard, case = VocabularyShard.of(SHAPE[-1]), case_of(name)
    tensors = {key: cut(case, key, shard, same_states=False) for key in case.tensors if key != "weights"}
    states, head = tensors.pop("states"), tensors.pop("head")
    targets, softcap = case.targets.chunk(shard.n_ranks)[shard.rank], case.options.get("softcap")
    return readout_statistics(states, head, targets, softcap=softcap, shard=shard, **tensors)._asdict()


def of_modules() -> tuple[Tensor, Tensor, Tensor, str]:
    """The loss of a LoopedReadout whose head is a DTensor, its gradient, a statistic; what is said of its logits."""
    shard, case = VocabularyShard.of(SHAPE[-1]), case_of("plain")
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(32, 37, bias=False), "norm": torch.nn.RMSNorm(32, eps=1e-6)})
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    rows = DTensor.from_local(case.tensors["head"][shard.rows], mesh, [Shard(0)], shape=(37, 32), stride=(32, 1))
    model["head"].weight = torch.nn.Parameter(rows)
    readout = LoopedReadout(model["head"], model["norm"], shard=shard)
    states, targets = case.tensors["states"].chunk(4, 1)[shard.rank], case.targets.chunk(4)[shard.rank]
    loss = readout(states, targets).loss
    loss.backward()
    gradient = model["head"].weight.grad
    assert isinstance(gradient, DTensor)
    with pytest.raises(ValueError) as error:
        readout.logits(states[0])
    lse = readout.statistics(states, targets).lse
    return loss.detach(), gradient.full_tensor(), lse, str(error.value)


def refused() -> list[str]:
    """What is said of calls that break a rule: to every rank, so that none waits for another."""
    shard, case = VocabularyShard.of(SHAPE[-1]), case_of("plain")
    states, head = case.tensors["states"], case.tensors["head"]
    targets = torch.full_like(case.targets, 37 if shard.rank == 1 else 0)
    calls = [
        lambda: VocabularyShard.of(0),
        lambda: VocabularyShard.of(5),
        lambda: looped_cross_entropy(states, head, targets, shard=shard),
        lambda: looped_cross_entropy(states, head[shard.rows], targets, shard=shard),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def save_results(rank: int, folder: str) -> None:
    """What every test looks at, into a file: of all ranks, of ranks 0 and 1 alone, and of Triton on ranks 2 and 3."""
    del os.environ["TRITON_INTERPRET"]  # with which Triton has been imported
    everyone = dist.group.WORLD
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results: dict[object, object] = {("ranks 4", name): of_rank(name, everyone) for name in CASES}
    results |= {("same states", name): of_rank(name, everyone, same_states=True) for name in FEW}
    results |= {("statistics", name): statistics_of_rank(name) for name in FEW}
    shard = VocabularyShard.of(SHAPE[-1])
    results["whole"] = shard.whole(torch.arange(SHAPE[-1])[shard.rows])
    results["refused"] = refused()
    results["modules"] = of_modules()
    results["again"] = of_rank("everything", everyone)
    if rank < 2:
        results |= {("ranks 2", name): of_rank(name, pairs[0]) for name in CASES}
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        results |= {("triton", name): of_rank(name, pairs[1]) for name in ("plain", "everything")}
    torch.save(results, Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """The results of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        run_ranks(save_results, folder, str(folder), n_ranks=4)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


def check(ranks: list[dict], way: str, name: str) -> None:
    """Loss, gradients and statistics against those of all tokens."""
    case, same_states = case_of(name), way == "same states"
    results = [rank[way, name] for rank in ranks if (way, name) in rank]
    actual = put_together(results, case, same_states=same_states)
    plain, of_plain = case.run(looped_cross_entropy_reference, statistics=True)
    truth, of_truth = case.run(looped_cross_entropy_reference, torch.float64, statistics=True)
    dtype = case.tensors["states"].dtype
    for part, value in truth.items():
        read = ~value.isnan()
        assert_no_worse_than(actual[part][read], plain[part][read], value[read], dtype=dtype, name=part)
    for field, value in of_truth.statistics._asdict().items():
        if value is not None:
            parts = [of["statistics"][field] for of in results]
            of_all = parts[0] if same_states else torch.cat(parts, 1)
            if field == "radial_dot" and not same_states:
                of_all = of_all / len(results)
            check_statistic(field, of_all, getattr(of_plain.statistics, field), value, dtype)


def check_statistic(field: str, actual: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    if field == "top1":
        assert (actual == truth).double().mean() >= (plain == truth).double().mean()  # bfloat16 has equals
        return
    read = ~truth.isnan()
    assert torch.equal(actual.isnan(), ~read), field
    assert_no_worse_than(actual[read], plain[read], truth[read], dtype=dtype, name=field)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_the_ranks_have_loss_gradients_and_statistics_of_the_whole_head(ranks, n_ranks, name):
    check(ranks, f"ranks {n_ranks}", name)


@pytest.mark.parametrize("name", FEW)
def test_ranks_with_the_same_states(ranks, name):
    check(ranks, "same states", name)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_triton(ranks, name):
    check(ranks, "triton", name)


@pytest.mark.parametrize("name", FEW)
def test_readout_statistics(ranks, name):
    case, results = case_of(name), [rank["statistics", name] for rank in ranks]
    tensors = {key: tensor for key, tensor in case.tensors.items() if key != "weights"}
    softcap, dtype = case.options.get("softcap"), tensors["states"].dtype
    plain, truth = (
        readout_statistics_reference(
            targets=case.targets, softcap=softcap, **{key: tensor.to(wide) for key, tensor in tensors.items()}
        )
        for wide in (dtype, torch.float64)
    )
    for field, value in truth._asdict().items():
        of_all = torch.cat([of[field] for of in results], 1)
        check_statistic(field, of_all, getattr(plain, field), value, dtype)


def test_a_module_reads_out_with_a_head_that_is_a_sharded_dtensor(ranks):
    case = case_of("plain")
    states, head = (case.tensors[name].clone().requires_grad_() for name in ("states", "head"))
    loss = looped_cross_entropy(states, head, case.targets).loss
    loss.backward()
    losses, gradients, lse, said = zip(*(rank["modules"] for rank in ranks), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach())
    for gradient in gradients:
        torch.testing.assert_close(gradient, head.grad)
    torch.testing.assert_close(torch.cat(lse, 1), readout_statistics(states, head).lse)
    assert set(said) == {"logits need the whole head. Got a readout of a shard."}


def test_repeated_calls_give_the_same_bits(ranks):
    first, again = ranks[0]["ranks 4", "everything"], ranks[0]["again"]
    assert torch.equal(first["loss"], again["loss"])
    assert all(torch.equal(first["gradients"][name], again["gradients"][name]) for name in first["gradients"])


def test_a_table_is_put_together_from_rows_of_unequal_number(ranks):
    assert all(torch.equal(rank["whole"], torch.arange(SHAPE[-1])) for rank in ranks)


def test_every_rank_refuses_what_one_may_not_do(ranks):
    for rank in ranks:
        n_words, too_few, rows, target = rank["refused"]
        assert n_words == "n_words must be an integer >= 1. Got 0."
        assert too_few == (
            "n_words must give at most 16777216 rows for each rank, and one for the last. Got n_words=5 for 4 ranks."
        )
        assert re.fullmatch(r"head must have this rank's (10|7) rows, \[\d+, \d+\) of 37\. Got \(37, 32\)\.", rows)
        assert target == "targets must be in [0, 37) or ignore_index=-100. Got 37."


def test_a_shard_of_another_kind_is_refused():
    states, head, targets = torch.zeros(1, 2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"shard must be a VocabularyShard or None\. Got int\."):
        looped_cross_entropy(states, head, targets, shard=2)


def test_without_a_group_there_is_no_shard():
    with pytest.raises(ValueError, match="must be initialised first"):
        VocabularyShard.of(37)


def test_a_row_of_equal_logits_has_the_first_word_of_all_ranks():
    """And one with logits of -inf, of which a rank may have no other, no nan in its statistics."""
    shards = [VocabularyShard(6, "", rank, 3) for rank in range(3)]
    logits = torch.tensor([[1.0, 2, 2, 2, 0, 2], [-torch.inf, -torch.inf, 1, -torch.inf, -torch.inf, -torch.inf]])
    options, targets = LossOptions(), torch.tensor([4, 2])
    parts = torch.empty(3, n_parts(statistics=True), 2)
    for shard in shards:
        form_parts(logits[:, shard.rows].clone(), targets, options, shard, parts[shard.rank])
    results = RowResults(torch.empty(2), torch.empty(3, 2), torch.empty(2, dtype=torch.int64))
    g = logits[:, shards[0].rows].clone()
    finish_rows(g, targets, None, options, shards[0], parts, results, gradient=True)
    lse, entropy, margin = results.statistics
    torch.testing.assert_close(results.loss, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert results.top1.tolist() == [1, 2]
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert margin.tolist() == [0, torch.inf]
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy().nan_to_num(0.0))
    torch.testing.assert_close(g, logits.softmax(-1)[:, :2])


def test_a_margin_that_is_not_known_is_nan(backend, device):
    """Of a row of -inf, or with a nan, on whichever rank; its top-1 token is one of the vocabulary."""
    logits = torch.randn(4, 9, device=device)
    logits[0], logits[1], logits[2, 4] = -torch.inf, torch.nan, torch.nan
    targets, options = torch.zeros(4, dtype=torch.int64, device=device), LossOptions()
    shards = [VocabularyShard(9, "", rank, 3) for rank in range(3)]
    parts = torch.empty(3, n_parts(statistics=True), 4, device=device)
    for shard in shards:
        form_parts(logits[:, shard.rows].clone(), targets, options, shard, parts[shard.rank])
    top1, space = torch.empty(4, dtype=torch.int64, device=device), torch.empty(3, 4, device=device)
    results, own = RowResults(torch.empty(4, device=device), space, top1), logits[:, shards[0].rows].clone()
    finish_rows(own, targets, None, options, shards[0], parts, results, gradient=False)
    assert space[2].isnan().tolist() == [True, True, True, False]
    assert ((top1 >= 0) & (top1 < 9)).all()


def test_a_common_offset_of_the_logits_leaves_the_entropy(backend, device):
    """Of 20,000, whose product with log2(e) float32 rounds by a thousandth."""
    logits = 20_000.0 + torch.randn(4, 30, device=device)
    targets, options = torch.arange(4, device=device), LossOptions()
    shards = [VocabularyShard(30, "", rank, 3) for rank in range(3)]
    parts = torch.empty(3, n_parts(statistics=True), 4, device=device)
    for shard in shards:
        form_parts(logits[:, shard.rows].clone(), targets, options, shard, parts[shard.rank])
    space = torch.empty(3, 4, device=device)
    results = RowResults(torch.empty(4, device=device), space, torch.empty(4, dtype=torch.int64, device=device))
    own = logits[:, shards[0].rows].clone()
    finish_rows(own, targets, None, options, shards[0], parts, results, gradient=False)
    p = logits.double().softmax(-1)
    assert results.statistics is not None
    assert (results.statistics[1] + (p * p.log()).sum(-1)).abs().max() < 2e-5
