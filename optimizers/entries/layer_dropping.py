"""Layer-dropping rules of the zoo."""

from __future__ import annotations

from optimizers.layer_dropping import CyclicBCD, DropMuon
from optimizers.spec import Spec

ENTRIES: tuple[Spec, ...] = (
    Spec(
        DropMuon,
        family="layer_dropping",
        reference="Gruntkowska et al.: Drop-Muon, Update Less, Converge Faster, 2025",
        example={"lr": 2e-2},
        state_floats="1",
        evidence={
            "oracle": "tests/test_drop_muon.py::test_matches_the_oracle",
            "reduction": "tests/test_drop_muon.py: Muon when nothing is dropped",
            "rate": "tests/test_drop_muon.py::test_expected_decrease",
            "claim": "tests/test_drop_muon.py: dropped layers run no backward; a gain in "
            "time to a loss is not established",
        },
        exceptions={
            "one_group_equals_many": "a group is a layer",
            "parameter_order_is_irrelevant": "the order of the layers is the method",
            "late_parameter_starts_afresh": "which layers a step updates depends on how "
            "many steps were taken before",
        },
    ),
    Spec(
        CyclicBCD,
        family="layer_dropping",
        reference="Cai, Song, Wright, Diakonikolas: Cyclic Block Coordinate Descent With "
        "Variance Reduction for Composite Nonconvex Optimization, ICML 2023",
        example={"lr": 0.1},
        state_floats="2, 0 with refresh_prob=1",
        evidence={
            "oracle": "tests/test_cyclic_bcd.py::test_matches_the_oracle",
            "reduction": "tests/test_cyclic_bcd.py: SGD, PAGE, proximal gradient, "
            "Gauss-Seidel, and P-CCD when small batches hold all samples",
            "rate": "tests/test_cyclic_bcd.py: descent and stationarity of P-CCD in every "
            "cycle, ::test_linear_rate (derived)",
            "claim": "tests/test_cyclic_bcd.py"
            "::test_gets_below_the_noise_floor_of_sgd_and_sccd; on a network no gain at "
            "equal work, and divergence at rates that SGD bears (tested)",
        },
        exceptions={
            "one_group_equals_many": "a group is a block",
            "parameter_order_is_irrelevant": "the order of the blocks is the method",
        },
    ),
)
