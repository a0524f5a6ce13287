"""Every claim of Sharma & Vu (arXiv 2606.24898) that is judged, in the order of the page."""

from train.claim import Claim, Untestable
from train.quality_claims import halting_claim, perplexity_claims, placement_claims, throughput_claim
from train.scale_claims import (
    clamp_claims,
    dynamics_claims,
    growth_claims,
    remedy_claims,
    visibility_claims,
    whole_gradient_claim,
)


def ouro(preset: str) -> Untestable:
    """The one claim that no preset of a sweep reaches."""
    return Untestable(
        "The same blindness in Ouro 1.4B",
        "radial fractions and dynamics of a pretrained model at K = 4",
        "It needs the pretrained weights (1.4 billion parameters, blocks with norms after attention and MLP, which are "
        f"not built here), its tokenizer and FineWeb; a model of preset {preset}, trained from nothing by a sweep, "
        "stands for none of them.",
    )


def paper_claims(preset: str) -> tuple[Claim | Untestable, ...]:
    """The claims, as they are put for the runs of one preset."""
    return (
        *growth_claims(),
        *perplexity_claims(),
        *placement_claims(),
        *visibility_claims(),
        *clamp_claims(),
        *dynamics_claims(),
        *remedy_claims(),
        whole_gradient_claim(),
        halting_claim(),
        throughput_claim(),
        ouro(preset),
    )
