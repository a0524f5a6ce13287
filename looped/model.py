"""The looped language model: tokens and targets -> states H_1..H_K, the training loss, logits, statistics."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped.config import LoopedConfig, at_least
from looped.context import Context
from looped.exit_gate import ExitGate, log_exit_probabilities
from looped.generate import Generated, Options, generate
from looped.kernels import LoopedStatistics, VocabularyShard
from looped.kernels.looped_cross_entropy import mean_square
from looped.recurrence import Recurrence, first_with_gradient
from looped.supervision import IGNORE_INDEX, Gated, Supervision, gated, supervision_weights


class LoopedOutput(NamedTuple):
    """What `LoopedLM` returns.

    states: (H_1, ..., H_K), those that are fed back, each [B, T, d] in the embedding's dtype, under autocast too.
    loss: scalar, fp32, differentiable; None without targets.
    per_loop: [K] fp32, detached, the mean cross-entropy of each loop in nats, nan for loops that were not read; None
        without targets.
    logits: [B, T, V] of the last loop alone, or None if not asked for.
    statistics: per (loop, token), or None if not asked for. Only of the loops with gradient.
    log_exits: [K, B, T] fp32, detached, the log of the exit probabilities that weighed the loss; None unless gated.
        Nobody exits at a loop without gradient: the probability is 0 there, its log the lowest number.
    """

    states: tuple[Tensor, ...]
    loss: Tensor | None = None
    per_loop: Tensor | None = None
    logits: Tensor | None = None
    statistics: LoopedStatistics | None = None
    log_exits: Tensor | None = None


class LoopedLM(Recurrence):
    """A decoder stack applied K times to its own output, and read out after every loop (Sharma & Vu, arXiv 2606.24898).

    The recurrence is described in looped/recurrence.py. Every state H_k that is fed back can be read out: through the
    coda, if there is one, whose result is R_k; then the readout's norm; then the head.

    fused: use the functions of `kernels` instead of plain PyTorch (looped/implementation.py).
    checkpoint_loops: keep only the states for the backward pass and recompute each loop from the one before.
    Both are attributes that may change at any time; neither touches parameters or checkpoints.

    shard: which rows of the head are here; None while all are (looped/vocabulary.py).

    Weights start as PyTorch's nn.Linear starts them, embedding and learned positions as
    N(0, `config.embedding_std`^2), norms at 1.
    """

    shard: VocabularyShard | None = None

    def __init__(self, config: LoopedConfig, *, fused: bool = True, checkpoint_loops: bool = False) -> None:
        super().__init__(config, fused=fused, checkpoint_loops=checkpoint_loops)
        self.readout_norm: nn.RMSNorm | nn.LayerNorm | None = None
        if config.readout == "layernorm":
            self.readout_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        elif config.readout != "raw":
            self.readout_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=config.embedding_std)
        # Last, and without a random number: a gate leaves the other parameters as they would be.
        self.exit_gate = ExitGate(config.d_model, config.n_loops) if config.exit_gate else None

    @property
    def head_weight(self) -> Tensor:
        """[V, d]: the rows that states are multiplied with to give logits; the embedding when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        n_loops: int | None = None,
        backprop_loops: int | None = None,
        supervision: Supervision | Gated = "per-loop",
        penalty: float | Tensor = 0.0,
        n_targets: int | Tensor | None = None,
        logits: bool = False,
        statistics: bool = False,
    ) -> LoopedOutput:
        """The states of tokens and, with targets, the training loss.

        tokens: [B, T] int64, each in [0, vocab_size). targets: [B, T] int64, -100 where they do not count.
        n_loops: K >= 1, any number; default `config.n_loops`. logits: return those of the last loop.
        backprop_loops: k >= 1: only the last k loops have a gradient (None: all); the loss is that of their states
            alone, as if they were all: per-loop supervision weighs each by 1/k, and the penalty is a mean over them.
            What comes before is neither read out nor penalised: it could train the head alone, on states that the
            rest of the model does not learn from. Embedding and prelude have a gradient through the injection; with
            none there is only what a tied embedding learns as the head.
        supervision, penalty, n_targets, statistics: of the loss, as `readout_loss` describes.

        Raises TypeError for another dtype and ValueError for another rank, no tokens, targets of another shape, a
        sequence longer than the learned positions, n_loops or backprop_loops < 1, statistics without targets, what
        `readout_loss` refuses, or tokens out of range (on a CPU; looking at CUDA tokens would stall the device, whose
        embedding kernel asserts the range itself).
        """
        n_loops = self.config.n_loops if n_loops is None else n_loops
        if targets is not None:
            _check_targets(targets, tokens.shape)
            self._check_loss_options(supervision, penalty)
        elif statistics:
            raise ValueError("statistics are those of a loss and need targets. Got statistics=True, targets=None.")
        states = self.unroll(tokens, n_loops, backprop_loops)
        last_logits = self.readout_logits(states[-1]) if logits else None
        if targets is None:
            return LoopedOutput(states, logits=last_logits)
        result = self.readout_loss(
            states, targets, backprop_loops=backprop_loops, supervision=supervision, penalty=penalty,
            n_targets=n_targets, statistics=statistics,
        )  # fmt: skip
        # not _replace, which PyTorch 2.11's compiler does not know
        return LoopedOutput(states, result.loss, result.per_loop, last_logits, result.statistics, result.log_exits)

    def readout_loss(
        self,
        states: Sequence[Tensor],
        targets: Tensor,
        *,
        backprop_loops: int | None = None,
        supervision: Supervision | Gated = "per-loop",
        penalty: float | Tensor = 0.0,
        n_targets: int | Tensor | None = None,
        statistics: bool = False,
        context: Context | None = None,
    ) -> LoopedOutput:
        """The training loss of the states of all loops, in nats, with those states.

        `L = sum_k w_k CE_k + penalty * mean over loops, tokens and channels of H_k^2`. The penalty acts on the states
        H_k that are fed back. CE_k is of what is read, R_k = `read(H_k)`: the mean cross-entropy of loop k over the
        targets that are not -100 (0 if all are). w_k = 1/K for `per-loop` supervision; for `terminal` w_K = 1, the
        others are 0 and not read out. With `gated` supervision every token has weights of its own, its exit
        probabilities, and a term that holds those close to a prior is added (`looped.supervision.Gated`, whose options
        go in the word's place).

        states: K states, each [B, T, d]; the last one is the last loop of the `final-only` readout. targets: [B, T]
        int64. backprop_loops: as in `forward`. n_targets: by what the sums of cross-entropies are divided, in
        `per_loop` too, instead of the number of targets that are not -100; a number, or a tensor on the device.
        penalty: a number or such a tensor. statistics: measure what the readout sees of every loop and token. context:
        as in `read`.
        Raises ValueError for states and targets that do not fit, a negative penalty, an unknown supervision, or gated
        supervision of a model without a gate, TypeError for targets that are not int64.
        """
        _check_states(states, targets)
        self._check_loss_options(supervision, penalty)
        first = first_with_gradient(len(states), backprop_loops)
        trained = states[first:]
        read, weights, log_p = self._weighed(trained, supervision, context)
        result = self.implementation.readout_loss(
            read,
            self.head_weight,
            targets,
            readout=self.config.readout,
            **self._readout_norm_options(),
            penalty=0.0 if self.config.n_coda else penalty,  # the kernel's penalty is one on what is read
            weights=weights,
            ignore_index=IGNORE_INDEX,
            n_targets=n_targets,
            statistics=statistics,
            **self._shard_option(),
        )
        loss = result.loss
        if self.config.n_coda and (isinstance(penalty, Tensor) or penalty > 0):
            loss = loss + penalty * mean_square(trained)
        gate, per_loop, log_exits = gated(supervision), result.per_loop, None
        if gate is not None and log_p is not None:
            loss, log_exits = loss + gate.divergence(log_p, targets != IGNORE_INDEX, n_targets), log_p.detach()
        if first > 0:
            per_loop = F.pad(per_loop, (first, 0), value=math.nan)
        if first > 0 and log_exits is not None:
            log_exits = F.pad(log_exits, (0, 0, 0, 0, first, 0), value=torch.finfo(log_exits.dtype).min)
        return LoopedOutput(tuple(states), loss, per_loop, None, result.statistics, log_exits)

    def _weighed(
        self, states: Sequence[Tensor], supervision: Supervision | Gated, context: Context | None
    ) -> tuple[list[Tensor], list[float] | Tensor, Tensor | None]:
        """What is read of the states, its weights in the loss, and of gated supervision the logarithms of those."""
        if gated(supervision) is None:
            weights = supervision_weights(supervision, len(states))
            # A loop that has no weight needs no coda; its state stands for what is not read.
            pairs = zip(states, weights, strict=True)
            return [state if weight == 0 else self.read(state, context) for state, weight in pairs], weights, None
        read = [self.read(state, context) for state in states]
        log_p = log_exit_probabilities(torch.stack([self.exit_logit(state) for state in read]))
        return read, log_p.exp(), log_p

    def exit_logit(self, read: Tensor) -> Tensor:
        """The gate's g [B, T] of what is read of one loop, R_k = `read(H_k)` [B, T, d]; lambda_k = sigmoid(g_k).

        The gate sees it through the readout's norm, if there is one (`final-only` has it at every loop here). fp32,
        under autocast too. Raises ValueError for a model without a gate.
        """
        if self.exit_gate is None:
            raise ValueError("exit probabilities are those of a gate and need exit_gate=True. Got exit_gate=False.")
        with torch.autocast(read.device.type, enabled=False):
            return self.exit_gate(read if self.readout_norm is None else self.readout_norm(read))

    def exit_logits(self, states: Sequence[Tensor]) -> Tensor:
        """g [K, B, T] of K states H_k [B, T, d], as `exit_logit` gives it and raises."""
        return torch.stack([self.exit_logit(self.read(state)) for state in states])

    def exit_probabilities(self, states: Sequence[Tensor]) -> Tensor:
        """p_k [K, B, T] fp32 of all K states H_k: how probable it is that a token stops at loop k.

        Over the K loops they add up to 1: the last one takes what remains, whatever K is (looped/exit_gate.py, which
        has their logarithms too). Raises as `exit_logit` does.
        """
        return log_exit_probabilities(self.exit_logits(states)).exp()

    def readout_logits(self, state: Tensor, *, final: bool = True, context: Context | None = None) -> Tensor:
        """Logits [B, T, V] of one state H_k [B, T, d]: the coda, the readout's norm, then the head.

        final: whether this is the last loop; the `final-only` readout normalises no other. context: as in `read`.
        """
        return self.head_logits(self.read(state, context), final=final)

    def head_logits(self, read: Tensor, *, final: bool = True) -> Tensor:
        """Logits [B, T, V] of one R_k [B, T, d], what the coda has made of a state. final: as in `readout_logits`."""
        if self.shard is not None:
            raise ValueError("logits need all of a shared vocabulary: call inside whole_vocabulary(model). Got a part.")
        if self.readout_norm is not None and (final or self.config.readout != "final-only"):
            read = self.readout_norm(read)
        with self.implementation.product_context(read):
            return F.linear(read, self.head_weight)

    @torch.no_grad()
    def evaluation_losses(self, states: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Cross-entropy in nats of every token at every loop, [K, B, T] fp32, 0 where the target is -100.

        Every loop is read as if it were the last (so `final-only` uses its norm): what a model that stops there loses.
        Raises as `readout_loss` does.
        """
        _check_states(states, targets)
        result = self.implementation.readout_statistics(
            [self.read(state) for state in states],
            self.head_weight,
            targets,
            readout="rmsnorm" if self.config.readout == "final-only" else self.config.readout,
            **self._readout_norm_options(),
            **self._shard_option(),
            ignore_index=IGNORE_INDEX,
        )
        assert result.loss is not None  # targets were given
        return result.loss

    def generate(self, prompts: Tensor | Sequence[Sequence[int]], **options: Any) -> Generated:
        """New tokens after each of the prompts: [B, T] int64, or B lists of token ids, of any lengths.

        options: the fields of `looped.generate.Options`: max_new_tokens, n_loops, temperature, top_k, top_p, seed,
        stop_tokens, exit, shared_cache, draft_loops, draft_tokens. Raises as it and `looped.generate.stream` do.
        """
        return generate(self, prompts, Options(**options))

    def _check_loss_options(self, supervision: Supervision | Gated, penalty: float | Tensor) -> None:
        if gated(supervision) is None:
            supervision_weights(supervision, 1)
        elif self.exit_gate is None:
            raise ValueError("gated supervision needs a model with exit_gate=True. Got exit_gate=False.")
        if not isinstance(penalty, Tensor):
            at_least(0, penalty=penalty)

    def _readout_norm_options(self) -> dict[str, Any]:
        """The readout's norm, as the functions of `kernels` take it."""
        norm = self.readout_norm
        return {
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": norm.bias if isinstance(norm, nn.LayerNorm) else None,
            "eps": self.config.norm_eps,
        }

    def _shard_option(self) -> dict[str, Any]:
        """Which rows of the head are here, as the functions of `kernels` take it."""
        if self.shard is None:
            return {}
        if not self.fused:
            raise ValueError(
                "fused must be True for a shared vocabulary: the plain readout has the whole head. Got False."
            )
        return {"shard": self.shard}

    def parameter_count(self) -> int:
        """Number of parameters, wherever they are; a tied head counts once."""
        here = sum(parameter.numel() for parameter in self.parameters())
        if self.shard is None:
            return here
        return here + (self.shard.n_words - len(self.head_weight)) * self.config.d_model

    def flops_per_token(
        self,
        n_loops: int | None = None,
        *,
        n_readouts: int | None = None,
        seq_len: int | None = None,
        training: bool = True,
        backprop_loops: int | None = None,
    ) -> int:
        """Floating-point operations of the matrix multiplications for one token, an addition or product counting 1.

        A block takes `2 * (4 d^2 + 3 d d_ff) + 2 T d`. `2 T d` is causal attention: `2 * 2 T d` for scores and mixing,
        halved because a token sees half of the sequence on average. A loop takes n_layers blocks, `4 d^2` to join E and
        H where the injection is `concat`, and `4 d r` for a low-rank update of rank r. A readout takes n_coda blocks
        and `2 V d`. The sum, with the prelude's blocks, counts 3 times for training (the backward pass multiplies each
        matrix twice); what `backprop_loops` leaves without gradient counts once. Recomputation is not counted.
        Defaults: the trained n_loops; a readout of every loop with gradient; T = max_seq_len.
        """
        config = self.config
        n_loops = config.n_loops if n_loops is None else n_loops
        n_forward_only = first_with_gradient(n_loops, backprop_loops)
        n_readouts = n_loops - n_forward_only if n_readouts is None else n_readouts
        seq_len = config.max_seq_len if seq_len is None else seq_len
        d_model = config.d_model
        block = 2 * (4 * d_model**2 + 3 * d_model * config.d_ff) + 2 * seq_len * d_model
        loop = config.n_layers * block + 4 * d_model * config.loop_rank
        if config.injection == "concat":
            loop += 4 * d_model**2
        prelude = config.n_prelude * block
        readout = config.n_coda * block + 2 * config.vocab_size * d_model
        forward = prelude + n_loops * loop + n_readouts * readout
        if not training:
            return forward
        forward_only = n_forward_only * loop
        if n_forward_only > 0 and config.injection == "none":
            forward_only += prelude  # nothing reaches it
        return 3 * forward - 2 * forward_only


def _check_targets(targets: Tensor, shape: torch.Size) -> None:
    if targets.shape != shape:
        raise ValueError(f"targets must have the tokens' shape {list(shape)}. Got {list(targets.shape)}.")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64. Got {targets.dtype}.")


def _check_states(states: Sequence[Tensor], targets: Tensor) -> None:
    if len(states) < 1:
        raise ValueError("states must hold the states of at least one loop. Got none.")
    shapes = {state.shape for state in states}
    if len(shapes) > 1:
        raise ValueError(f"states must have one shape [..., d]. Got {[list(shape) for shape in shapes]}.")
    _check_targets(targets, states[0].shape[:-1])
