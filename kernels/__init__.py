"""Fused operations for models that read a recurrent state out several times through one head.

looped_cross_entropy  K states, one head: norm, norm penalty, logits, cross-entropy and every gradient, in chunks
readout_statistics    loss, log-sum-exp, entropy, margin and top-1 of K states, without logits or gradients
rms_norm_penalty      residual add, RMSNorm and the mean square of the state, in one pass
radial_gradient       how much of a gradient points along its state
swiglu                silu(gate) * up, in one pass each way

LoopedReadout         looped_cross_entropy as a module: a model's own norm and head, and the loss
RMSNorm               rms_norm_penalty as a module: a drop-in for torch.nn.RMSNorm
VocabularyShard       which rows of a head this process holds, where a process group shares it

Triton on CUDA and ROCm, the same algorithms in ATen on the CPU; kernels/README.md derives the equations.
"""

if __name__ == "kernels":  # in a checkout, by a name that Hugging Face's package has too
    import looped.checkout

    looped.checkout.share_name()
else:
    from .looped_cross_entropy import LoopedCrossEntropy, LoopedStatistics, looped_cross_entropy
    from .modules import LoopedReadout, RMSNorm
    from .radial import RadialGradient, radial_gradient
    from .rms_norm import RMSNormPenalty, rms_norm_penalty
    from .statistics import ReadoutStatistics, readout_statistics
    from .swiglu import swiglu
    from .vocabulary_shard import VocabularyShard

    __all__ = [
        "LoopedCrossEntropy",
        "LoopedReadout",
        "LoopedStatistics",
        "RMSNorm",
        "RMSNormPenalty",
        "RadialGradient",
        "ReadoutStatistics",
        "VocabularyShard",
        "looped_cross_entropy",
        "radial_gradient",
        "readout_statistics",
        "rms_norm_penalty",
        "swiglu",
    ]
