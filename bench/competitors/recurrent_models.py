"""Recurrent models of others, at any size: HRM-Text and ALBERT of transformers, and stand-ins of three more.

Ouro, Huginn and Nanbeige4.2 bring their code with their weights. A stand-in has the names of the modules, the arguments
of the calls and the flow of data of the original (Ouro's modeling_ouro.py, Huginn's raven_modeling_minimal.py,
Nanbeige's modeling_nanbeige.py), and forms its loss as that does, from logits in float32. Nothing else is alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """d channels, V tokens in the vocabulary, K loops of n_layers layers each. ALBERT has one layer."""

    d: int = 24
    vocabulary: int = 37
    n_loops: int = 3
    n_layers: int = 2


SMALL = Size()
LONGEST = 512  # tokens that the models of transformers take


@dataclass
class Output:
    loss: Tensor | None = None
    logits: Tensor | None = None
    log_ppl: Tensor | None = None


class Norm(nn.Module):
    """Llama's."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(d)), 1e-5

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(
            hidden_states.dtype
        )


class Mixer(nn.Module):
    """Stands for attention and an MLP: a token sees those before it, by a mask that the model hands over."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.own, self.past = nn.Linear(d, d), nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.own(x) + self.past(mask.to(x.dtype) @ x))


class DecoderLayer(nn.Module):
    """Pre-norm, and Ouro's second norm. returns_tuple: as the layers of older transformers."""

    def __init__(self, d: int, sandwich: bool, returns_tuple: bool) -> None:
        super().__init__()
        self.self_attn, self.input_layernorm = Mixer(d), Norm(d)
        self.input_layernorm_2 = Norm(d) if sandwich else nn.Identity()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_):
        mixed = self.self_attn(self.input_layernorm(hidden_states), attention_mask)
        after = hidden_states + self.input_layernorm_2(mixed)
        return (after,) if self.returns_tuple else after


def causal_mask(length: int, device: torch.device) -> Tensor:
    mask = torch.ones(length, length, device=device).tril()
    return mask / mask.sum(-1, keepdim=True)


class OuroModel(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(DecoderLayer(d, True, False) for _ in range(config.num_hidden_layers))
        self.norm, self.early_exit_gate = Norm(d), nn.Linear(d, 1)
        self.config = config

    def forward(self, input_ids: Tensor, use_cache: bool | None = None):
        hidden, states, gates = self.embed_tokens(input_ids), [], []
        mask = causal_mask(input_ids.shape[1], input_ids.device)
        for step in range(self.config.total_ut_steps):
            for layer in self.layers:
                hidden = layer(hidden, attention_mask=mask, current_ut=step)
            hidden = self.norm(hidden)
            states.append(hidden)
            gates.append(self.early_exit_gate(hidden))
        return hidden, states, gates


class Ouro(nn.Module):
    """Its own loss is the cross-entropy of the expected logits under the gate's distribution over loops."""

    def __init__(self, size: Size = SMALL) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="ouro", num_hidden_layers=size.n_layers, total_ut_steps=size.n_loops, hidden_size=size.d,
            vocab_size=size.vocabulary,
        )  # fmt: skip
        self.model, self.lm_head = OuroModel(self.config), nn.Linear(size.d, size.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None) -> Output:
        hidden, states, gates = self.model(input_ids, use_cache=use_cache)
        if labels is None:
            return Output(logits=self.lm_head(hidden))
        left, logits = 1.0, 0.0
        for loop, (state, gate) in enumerate(zip(states, gates, strict=True)):
            share = left if loop == len(states) - 1 else left * torch.sigmoid(gate)
            left = left * (1 - torch.sigmoid(gate))
            logits = logits + share * self.lm_head(state)
        return Output(shifted_loss(logits, labels), logits)


class NanbeigeModel(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(DecoderLayer(d, False, True) for _ in range(config.num_hidden_layers))
        self.norm, self.config = Norm(d), config

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        mask = causal_mask(input_ids.shape[1], input_ids.device)
        for loop in range(self.config.num_loops):
            for layer in self.layers:
                hidden = layer(hidden, attention_mask=mask, loop_idx=loop)[0]
            if not self.config.skip_loop_final_norm:
                hidden = self.norm(hidden)
        return self.norm(hidden) if self.config.skip_loop_final_norm else hidden


class Nanbeige(nn.Module):
    def __init__(self, size: Size = SMALL, skip_loop_final_norm: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="nanbeige", num_hidden_layers=size.n_layers, num_loops=size.n_loops, loop_loss_weights=[],
            skip_loop_final_norm=skip_loop_final_norm, hidden_size=size.d, vocab_size=size.vocabulary,
        )  # fmt: skip
        self.model, self.lm_head = NanbeigeModel(self.config), nn.Linear(size.d, size.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None) -> Output:
        logits = self.lm_head(self.model(input_ids, use_cache=use_cache))
        return Output(None if labels is None else shifted_loss(logits, labels), logits)


class HuginnNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class SandwichBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attn, self.mlp = Mixer(d), nn.Linear(d, d)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (HuginnNorm(d) for _ in range(4))

    def forward(self, x: Tensor, freqs_cis: Tensor, step_idx: Tensor, mask=None, past_key_values=None) -> Tensor:
        x = self.norm_2(self.attn(self.norm_1(x), freqs_cis) + x)
        return self.norm_4(torch.tanh(self.mlp(self.norm_3(x))) + x)


class Huginn(nn.Module):
    """n iterations without and k with gradients, from a random state; labels are not shifted. The head is tied."""

    def __init__(self, size: Size = SMALL) -> None:
        super().__init__()
        d, n_gradient_loops = size.d, (size.n_loops + 1) // 2
        self.config = SimpleNamespace(
            model_type="huginn_raven", n_layers_in_recurrent_block=size.n_layers, n_layers_in_coda=2,
            mean_recurrence=size.n_loops, n_embd=d, vocab_size=size.vocabulary,
        )  # fmt: skip
        blocks = {
            "prelude": nn.ModuleList([SandwichBlock(d)]),
            "adapter": nn.Linear(2 * d, d, bias=False),
            "core_block": nn.ModuleList(SandwichBlock(d) for _ in range(size.n_layers)),
            "coda": nn.ModuleList(SandwichBlock(d) for _ in range(2)),
            "ln_f": HuginnNorm(d),
        }
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(size.vocabulary, d), **blocks})
        self.lm_head = nn.Linear(d, size.vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.steps = (size.n_loops - n_gradient_loops, n_gradient_loops)

    def initialize_state(self, input_embeds: Tensor, scale: float = 1.0) -> Tensor:
        return nn.init.trunc_normal_(torch.randn_like(input_embeds), std=0.3 * scale, a=-0.9, b=0.9)

    def forward(
        self, input_ids: Tensor, input_states: Tensor | None = None, labels: Tensor | None = None, num_steps=None,
        use_cache: bool = False,
    ) -> Output:  # fmt: skip
        embedded, rotary = self.transformer.wte(input_ids), causal_mask(input_ids.shape[1], input_ids.device)
        step = torch.tensor(-1)
        for block in self.transformer.prelude:
            embedded = block(embedded, rotary, step, None, None)
        x = self.initialize_state(embedded) if input_states is None else input_states.clone()
        without, gradient_steps = self.steps if num_steps is None else (num_steps, 0)
        for iteration in range(without + gradient_steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and iteration >= without):
                x = self.transformer.adapter(torch.cat([x, embedded], -1))
                for block in self.transformer.core_block:
                    step += 1
                    x = block(x, rotary, step, None, None)
        x, step = self.transformer.ln_f(x), torch.tensor(0)
        for block in self.transformer.coda:
            step -= 1
            x = block(x, rotary, step, None, None)
        logits = self.lm_head(self.transformer.ln_f(x))
        logits = logits.to(wide(logits.dtype))
        if labels is None:
            return Output(torch.tensor(0.0), logits, torch.tensor(0.0))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss, logits, loss.detach().exp())


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers' loss_function for a causal language model."""
    logits, labels = logits.to(wide(logits.dtype)), F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


# Of transformers ------------------------------------------------------------------------------------------------------


def hrm_text(size: Size = SMALL) -> nn.Module:
    """n_layers in the low and in the high stack each, and two low cycles in a loop."""
    import transformers

    n_heads = 2 if size.d < 64 else size.d // 64
    config = transformers.HrmTextConfig(
        vocab_size=size.vocabulary, hidden_size=size.d, intermediate_size=8 * size.d // 3,
        num_hidden_layers=size.n_layers, num_attention_heads=n_heads, head_dim=size.d // n_heads, H_cycles=size.n_loops,
        L_cycles=2, initializer_range=0.5 / size.d**0.5, max_position_embeddings=LONGEST,
    )  # fmt: skip
    return transformers.HrmTextForCausalLM(config)


def albert(size: Size = SMALL) -> nn.Module:
    """The layer K times."""
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=size.vocabulary, hidden_size=size.d, embedding_size=max(16, size.d // 6),
        intermediate_size=4 * size.d, num_hidden_layers=size.n_loops, num_attention_heads=max(2, size.d // 64),
        initializer_range=size.d**-0.5, max_position_embeddings=LONGEST, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.AlbertForMaskedLM(config)


RECURRENT_MODELS: Mapping[str, Callable[[Size], nn.Module]] = {
    "hrm_text": hrm_text,
    "albert": albert,
    "ouro": Ouro,
    "nanbeige": Nanbeige,
    "huginn": Huginn,
}
