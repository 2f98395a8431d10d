"""First-order rules: one gradient per step, element by element."""

from optimizers.first_order.amsgrad import AMSGrad

__all__ = ["AMSGrad"]
