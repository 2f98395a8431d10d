"""Forward-only rules of the zoo."""

from __future__ import annotations

from optimizers.forward_only import PolyStep
from optimizers.spec import Spec

ENTRIES: tuple[Spec, ...] = (
    Spec(
        PolyStep,
        family="forward_only",
        reference="An T. Le: Training Non-Differentiable Networks via Optimal Transport, 2026",
        example={"epsilon": 0.3},
        state_floats="0, 1 with momentum",
        evidence={
            "oracle": "tests/test_polystep.py::test_matches_the_oracle",
            "reduction": "tests/test_polystep.py: closed form on linear losses, gradient "
            "step for small radii",
            "rate": "tests/test_polystep.py: fixed point of the orthoplex (derived)",
            "claim": "tests/test_polystep.py: trains a staircase network without a "
            "gradient; the lead over evolution strategies is not tested",
        },
        exceptions={
            "parameter_order_is_irrelevant": "the vector of all parameters is cut into "
            "particles in the order given",
        },
    ),
)
