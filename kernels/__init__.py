from kernels.looped_cross_entropy import LoopedCrossEntropy, LoopedStatistics, looped_cross_entropy
from kernels.radial import RadialGradient, radial_gradient
from kernels.rms_norm import RMSNormPenalty, rms_norm_penalty

__all__ = [
    "LoopedCrossEntropy",
    "LoopedStatistics",
    "RMSNormPenalty",
    "RadialGradient",
    "looped_cross_entropy",
    "radial_gradient",
    "rms_norm_penalty",
]
