from kernels.looped_cross_entropy import LoopedCrossEntropy, LoopedStatistics, looped_cross_entropy
from kernels.radial import RadialGradient, radial_gradient
from kernels.rms_norm import RMSNormPenalty, rms_norm_penalty
from kernels.statistics import ReadoutStatistics, readout_statistics

__all__ = [
    "LoopedCrossEntropy",
    "LoopedStatistics",
    "RMSNormPenalty",
    "RadialGradient",
    "ReadoutStatistics",
    "looped_cross_entropy",
    "radial_gradient",
    "readout_statistics",
    "rms_norm_penalty",
]
