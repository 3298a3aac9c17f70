"""Names for the tensor shapes that cross function boundaries (jaxtyping)."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
PositionMask = Bool[Tensor, "batch pos"]
Resid = Float[Tensor, "batch pos d_model"]
LastResid = Float[Tensor, "batch d_model"]
FeatureActs = Float[Tensor, "batch pos n_features"]
Logits = Float[Tensor, "batch d_vocab"]
