"""First-order rules of the zoo."""

from __future__ import annotations

from optimizers.first_order import AMSGrad
from optimizers.spec import Spec

ENTRIES: tuple[Spec, ...] = (
    Spec(
        AMSGrad,
        family="first_order",
        reference="Reddi, Kale, Kumar: On the Convergence of Adam and Beyond, ICLR 2018",
        example={"lr": 1e-2},
        state_floats="3",
        evidence={
            "oracle": "tests/test_amsgrad.py::test_matches_the_oracle",
            "reduction": "tests/test_amsgrad.py: AdaGrad, Adam, torch's amsgrad",
            "rate": "tests/test_amsgrad.py::test_regret_bound",
            "claim": "converges on Reddi's counter-examples, where Adam does not",
        },
    ),
)
