"""Small recurrent models of others, with fixed weights, and how they are run."""

import torch
from torch import Tensor, nn

from bench.competitors.recurrent_models import RECURRENT_MODELS, SMALL, Nanbeige, Output, Size

VOCABULARY, LENGTH = SMALL.vocabulary, 7

MODELS = {name: lambda make=make: make(SMALL) for name, make in RECURRENT_MODELS.items()} | {
    "nanbeige": lambda: Nanbeige(Size(n_loops=2)),
    "nanbeige, one norm": lambda: Nanbeige(Size(n_loops=2), skip_loop_final_norm=True),
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
        start = torch.randn(*tokens.shape, model.config.n_embd, generator=torch.Generator().manual_seed(2))
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


def token_batch() -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, T]; one label does not count."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    labels[0, 2] = -100
    return tokens, labels
