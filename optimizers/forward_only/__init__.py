"""Rules that use values of the loss alone: no backward pass, no smoothness."""

from optimizers.forward_only.polystep import PolyStep

__all__ = ["PolyStep"]
