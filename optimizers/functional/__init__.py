"""In-place multi-tensor kernels shared by the rules."""

from optimizers.functional.multi_tensor import (
    bias_corrections,
    decay_,
    ema_,
    step_counts,
    uniform_count,
)

__all__ = ["bias_corrections", "decay_", "ema_", "step_counts", "uniform_count"]
