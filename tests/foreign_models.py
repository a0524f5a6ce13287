"""Recurrent models of others, small. Of those whose code comes with their weights, stand-ins of our own.

A stand-in has the names of the modules, the arguments of the calls and the flow of data of the original: Ouro's
modeling_ouro.py, Huginn's raven_modeling_minimal.py, Nanbeige's modeling_nanbeige.py. Nothing else is alike.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, VOCABULARY, LENGTH = 24, 37, 7


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

    def __init__(self) -> None:
        super().__init__()
        self.own, self.past = nn.Linear(D, D), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.own(x) + self.past(mask.to(x.dtype) @ x))


class DecoderLayer(nn.Module):
    """Pre-norm, and Ouro's second norm. returns_tuple: as the layers of older transformers."""

    def __init__(self, sandwich: bool, returns_tuple: bool) -> None:
        super().__init__()
        self.self_attn, self.input_layernorm = Mixer(), Norm(D)
        self.input_layernorm_2 = Norm(D) if sandwich else nn.Identity()
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
        self.embed_tokens = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(DecoderLayer(True, False) for _ in range(config.num_hidden_layers))
        self.norm, self.early_exit_gate = Norm(D), nn.Linear(D, 1)
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

    def __init__(self, n_loops: int = 3) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="ouro", num_hidden_layers=2, total_ut_steps=n_loops, vocab_size=VOCABULARY
        )
        self.model, self.lm_head = OuroModel(self.config), nn.Linear(D, VOCABULARY, bias=False)

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
        self.embed_tokens = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(DecoderLayer(False, True) for _ in range(config.num_hidden_layers))
        self.norm, self.config = Norm(D), config

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
    def __init__(self, n_loops: int = 2, skip_loop_final_norm: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="nanbeige", num_hidden_layers=2, num_loops=n_loops, loop_loss_weights=[],
            skip_loop_final_norm=skip_loop_final_norm, vocab_size=VOCABULARY,
        )  # fmt: skip
        self.model, self.lm_head = NanbeigeModel(self.config), nn.Linear(D, VOCABULARY, bias=False)

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
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Mixer(), nn.Linear(D, D)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (HuginnNorm(D) for _ in range(4))

    def forward(self, x: Tensor, freqs_cis: Tensor, step_idx: Tensor, mask=None, past_key_values=None) -> Tensor:
        x = self.norm_2(self.attn(self.norm_1(x), freqs_cis) + x)
        return self.norm_4(torch.tanh(self.mlp(self.norm_3(x))) + x)


class Huginn(nn.Module):
    """n iterations without and k with gradients, from a random state; labels are not shifted. The head is tied."""

    def __init__(self, n_loops: int = 3, n_gradient_loops: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="huginn_raven", n_layers_in_recurrent_block=2, n_layers_in_coda=2, mean_recurrence=n_loops,
            n_embd=D, vocab_size=VOCABULARY,
        )  # fmt: skip
        blocks = {
            "prelude": nn.ModuleList([SandwichBlock()]),
            "adapter": nn.Linear(2 * D, D, bias=False),
            "core_block": nn.ModuleList(SandwichBlock() for _ in range(2)),
            "coda": nn.ModuleList(SandwichBlock() for _ in range(2)),
            "ln_f": HuginnNorm(D),
        }
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCABULARY, D), **blocks})
        self.lm_head = nn.Linear(D, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.steps = (n_loops - n_gradient_loops, n_gradient_loops)

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
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels is None:
            return Output(torch.tensor(0.0), logits, torch.tensor(0.0))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss, logits, loss.detach().exp())


def hrm_text(**changes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 12, "H_cycles": 3, "L_cycles": 2, "initializer_range": 0.1,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**(options | changes)))


def albert(**changes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": VOCABULARY, "hidden_size": D, "embedding_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**(options | changes)))


MODELS = {
    "hrm_text": hrm_text,
    "albert": albert,
    "ouro": Ouro,
    "nanbeige": Nanbeige,
    "nanbeige, one norm": lambda: Nanbeige(skip_loop_final_norm=True),
    "huginn": Huginn,
}


def small(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of that name with fixed weights, none of them at a value that hides it."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "z_L_init" not in parameter_name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


DEPTHS = {  # of config.model_type: what of the configuration says how often the loop is run
    "hrm_text": "H_cycles", "albert": "num_hidden_layers", "nanbeige": "num_loops", "ouro": "total_ut_steps",
}  # fmt: skip


def run(model: nn.Module, tokens: Tensor, n_loops: int | None = None, **options) -> Output:
    """The output of the model, or of the model that stops after n_loops.

    Huginn begins with the same state every time, and runs as many of its iterations without gradients as it does whole.
    """
    kind = model.config.model_type
    if kind == "hrm_text":
        options["use_cache"] = False  # its cache has room for the loops that are configured
    if kind == "huginn_raven":
        start = torch.randn(*tokens.shape, D, generator=torch.Generator().manual_seed(2))
        options["input_states"] = start.to(model.lm_head.weight.dtype)
    if n_loops is None:
        return model(input_ids=tokens, **options)
    if kind == "huginn_raven":
        whole = model.steps
        model.steps = (min(n_loops, whole[0]), max(0, n_loops - whole[0]))
        output = model(input_ids=tokens, **options)
        model.steps = whole
        return output
    whole = getattr(model.config, DEPTHS[kind])
    setattr(model.config, DEPTHS[kind], n_loops)
    output = model(input_ids=tokens, **options)
    setattr(model.config, DEPTHS[kind], whole)
    return output


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def token_batch() -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, T]; one label does not count."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    labels[0, 2] = -100
    return tokens, labels
