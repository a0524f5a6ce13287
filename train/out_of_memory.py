"""What to change when a run has run out of memory."""

from train import processes
from train.config import TrainConfig

SMALLER = "Lower --d-model, --d-ff, --n-layers or --vocab-size."


def out_of_memory_before_training(error: RuntimeError) -> str:
    """What happened and what helps where the model and the optimizer's state alone are too large."""
    return f"{_happened(error)} {SMALLER}"


def out_of_memory(error: RuntimeError, config: TrainConfig) -> tuple[str, ...]:
    """What happened and what helps, in words; and the options that a continued run is given for it.

    More micro-batches come first: they cost no more arithmetic. Then a loop recomputed costs its forward pass again.
    """
    per_step = config.batch_size // (config.grad_accumulation * processes.world_size())
    parts = next((n for n in range(2, per_step + 1) if per_step % n == 0), 1) * config.grad_accumulation
    advice: list[tuple[str, tuple[str, ...]]] = []
    if parts > config.grad_accumulation:
        advice.append((f"--grad-accumulation {parts}", ("--grad-accumulation", str(parts))))
    if not config.checkpoint_loops:
        advice.append(("--checkpoint-loops", ("--checkpoint-loops",)))
    if not advice:
        return (
            f"{_happened(error)} A micro-batch is one sequence and loops are recomputed: begin a run with a smaller "
            "--seq-len or model.",
        )
    others = " or a new run with a smaller --batch-size" if config.batch_size > 1 else ""
    return f"{_happened(error)} Take {', or '.join(words for words, _ in advice)}{others}.", *advice[0][1]


def _happened(error: RuntimeError) -> str:
    return f"memory ran out ({str(error).strip().splitlines()[0][:160]})."
