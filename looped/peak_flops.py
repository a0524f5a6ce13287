"""What GPUs could carry out: what the utilisation of one (MFU) is a share of."""

import re

import torch

# Dense bf16 products with float32 sums, TFLOP/s, from the vendors' data sheets. The first pattern that fits counts.
PEAKS = {
    r"\bH100 PCIe": 756, r"\bH100 NVL": 835, r"\bG?H(100|200|800)\b": 989, r"\bH20\b": 148,
    r"\bG?B200\b": 2250, r"\bA[18]00\b": 312, r"\bA30\b": 165, r"\bA40\b": 149.7, r"\bA10\b": 125,
    r"\bL40S\b": 362, r"\bL4\b": 121, r"\bRTX 4090\b": 165.2, r"\bRTX 3090\b": 71,
    r"\bMI3(00|25)X\b": 1307, r"\bMI250X\b": 383,
}  # fmt: skip


def peak_tflops(name: str) -> float | None:
    """TFLOP/s of a GPU's dense bf16 products, by its name. None for one that is not known."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of this GPU's dense bf16 products. None for a CPU or an unknown GPU."""
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else 1e12 * peak
