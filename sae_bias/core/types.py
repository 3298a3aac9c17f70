"""Names for the tensor shapes that cross function boundaries (jaxtyping)."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
PositionMask = Bool[Tensor, "batch pos"]
Resid = Float[Tensor, "batch pos d_model"]
