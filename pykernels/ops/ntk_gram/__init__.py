"""Kernels of infinitely wide networks: Gram matrices, products with them, and sums with their gradients."""

from pykernels.ops.ntk_gram.activations import Activation
from pykernels.ops.ntk_gram.kernel import ntk_diag, ntk_gram, ntk_matvec, ntk_witness

__all__ = ["Activation", "ntk_diag", "ntk_gram", "ntk_matvec", "ntk_witness"]
