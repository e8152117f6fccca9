"""Constant matrices of branch and bound, and their products with many domains from both sides.

Tensors are feature-major, `[N, D]`, as in `certify.bab.unstable_core`: sparse products want it so.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from attacks.dense_product import product

SPARSE_BELOW = 0.15
"""Share of non-zeros below which a sparse product is the faster one (scripts/bench/RESULTS.md)."""


class Matrix:
    """A constant matrix and its products from both sides, sparse where that is faster."""

    def __init__(self, dense: Tensor) -> None:
        self.shape = dense.shape
        self.whole = dense
        self._dense: Tensor | None = dense
        filled = int(torch.count_nonzero(dense))
        if filled < SPARSE_BELOW * dense.numel() and dense.numel() > 2**16:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # "beta state"
                self._rows, self._columns = dense.to_sparse_csr(), dense.T.contiguous().to_sparse_csr()
            self._dense = None

    def times(self, v: Tensor) -> Tensor:
        """`W v`, `[m, D]` for `v` `[n, D]`."""
        return self._rows @ v if self._dense is None else product(self._dense, v)

    def transposed_times(self, p: Tensor) -> Tensor:
        """`W^T p`, `[n, D]` for `p` `[m, D]`."""
        return self._columns @ p if self._dense is None else product(self._dense.T, p)

    def top(self, rows: int) -> Matrix:
        """The first rows; they share the memory of a dense matrix."""
        return self if rows == self.shape[0] else Matrix(self.whole[:rows])


class Chained:
    """A matrix whose first rows read the input, and whose others read it through values that lie between.

    Behind a first convolution every neuron reads most of the input, by way of fewer stable neurons than it has
    numbers. Not multiplied out, its weights are smaller, and those of the convolution stay sparse.
    """

    def __init__(self, front: Matrix, near: int, deep: Matrix) -> None:
        """`near` rows of `front` `[near + S, M]` are rows of this matrix; `deep` `[n, S]` reads the others."""
        self.front, self.near, self.deep = front, near, deep
        self.shape = torch.Size([near + deep.shape[0], front.shape[1]])

    @property
    def whole(self) -> Tensor:
        """The matrix multiplied out."""
        front = self.front.whole
        return torch.cat([front[: self.near], self.deep.whole @ front[self.near :]])

    def times(self, v: Tensor) -> Tensor:
        """`W v`, `[m, D]` for `v` `[n, D]`."""
        front = self.front.times(v)
        return torch.cat([front[: self.near], self.deep.times(front[self.near :])])

    def transposed_times(self, p: Tensor) -> Tensor:
        """`W^T p`, `[n, D]` for `p` `[m, D]`."""
        near, deep = p[: self.near], p[self.near :]
        return self.front.transposed_times(torch.cat([near, self.deep.transposed_times(deep)]))

    def top(self, rows: int) -> Matrix | Chained:
        """The first rows."""
        if rows <= self.near:
            return self.front.top(rows)
        return self if rows == self.shape[0] else Chained(self.front, self.near, self.deep.top(rows - self.near))
