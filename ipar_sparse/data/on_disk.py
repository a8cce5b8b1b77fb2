"""Expression larger than memory: sparse matrices whose values lie in a temporary file.

They are scipy matrices like any other, on arrays that are mapped from the disk. Work that goes
through :func:`row_blocks` holds one block of them in memory at a time, and takes matrices in memory
the same way, so that both give the same numbers.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from ..errors import UserError
from ..ticks import counted
from .headers import STREAM_VALUES, sparse_kind, sparse_shape

BLOCK = 1 << 22
"""Stored values handled at a time."""


def is_large(group: Any) -> bool:
    """Whether a matrix in a file is too large to be read as a whole; it is dense, or CSR."""
    if not hasattr(group, "keys"):
        return int(np.prod(group.shape)) > STREAM_VALUES
    return sparse_kind(group) == "csr_matrix" and group["data"].shape[0] > STREAM_VALUES


def block_length(array: Any) -> int:
    """Rows of a dense array that hold about :data:`BLOCK` values.

    A block never splits a chunk along the first axis, or the chunk would be read many times.
    """
    chunk = (getattr(array, "chunks", None) or (1,))[0]
    per_row = math.prod(array.shape[1:]) or 1
    return max(BLOCK // per_row // chunk, 1) * chunk


def read_to_disk(group: Any, shape: tuple[int, int], where: str) -> sparse.csr_matrix:
    """Copies a matrix of a file, block by block, to arrays on the disk.

    Args:
        group: an open matrix, dense or CSR.
        shape: cells and genes that it has to have.
        where: what messages call it.

    Returns:
        (n, G) float32 CSR without zeros or duplicates. Its file vanishes with it.

    Raises:
        UserError: it has another shape or is damaged, or the disk is full.
    """
    rows = _SparseRows(group) if hasattr(group, "keys") else _DenseRows(group)
    if rows.shape != shape:
        raise UserError(
            f"{where}: the matrix is {rows.shape[0]} x {rows.shape[1]} but obs and var name "
            f"{shape[0]} x {shape[1]}; export it again"
        )
    cuts = rows.cuts()
    spans = list(zip(cuts, cuts[1:], strict=False))
    most = rows.count_values(spans)
    kind = np.dtype(np.int32 if max(most, *shape) < 2**31 else np.int64)
    data, indices = _mapped(most, np.dtype(np.float32)), _mapped(most, kind)
    lengths, used = [np.zeros(0, dtype=np.int64)], 0
    for start, stop in counted(spans):
        block = rows.read(start, stop)
        if block is None:
            raise UserError(f"{where}: its sparse matrix is damaged; copy or export it again")
        end = used + block.nnz
        data[used:end], indices[used:end] = block.data, block.indices
        lengths.append(np.diff(block.indptr))
        used = end
        _release(data, indices)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]).astype(kind)
    matrix = sparse.csr_matrix((data[:used], indices[:used], indptr), shape=shape, copy=False)
    matrix.has_canonical_format = True  # every block has it
    return matrix


def is_on_disk(matrix: sparse.csr_matrix) -> bool:
    """Whether the values of a matrix lie in a file."""
    return _mapping(matrix.data) is not None


def row_blocks(matrix: sparse.csr_matrix) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Rows of a matrix in order, some at a time: which they are, and they themselves."""
    cuts = _cuts(np.asarray(matrix.indptr, dtype=np.int64))
    for start, stop in counted(list(zip(cuts, cuts[1:], strict=False))):
        part = slice(int(matrix.indptr[start]), int(matrix.indptr[stop]))
        indptr = matrix.indptr[start : stop + 1] - matrix.indptr[start]
        block = sparse.csr_matrix(
            (matrix.data[part], matrix.indices[part], indptr),
            shape=(stop - start, matrix.shape[1]),
            copy=False,
        )
        block.has_sorted_indices = matrix.has_sorted_indices
        yield slice(start, stop), block
        release(matrix)


def take_columns(matrix: sparse.csr_matrix, columns: Sequence[int] | np.ndarray):
    """Some columns of a matrix, in memory; of one that lies on the disk block by block."""
    if not is_on_disk(matrix):
        return matrix[:, columns]
    parts = [block[:, columns] for _, block in row_blocks(matrix)]
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    kind = np.int32 if indptr[-1] < 2**31 else np.int64
    data, indices = np.empty(indptr[-1], np.float32), np.empty(indptr[-1], kind)
    end = int(indptr[-1])
    while parts:  # used up, so that no value is held twice for long
        part = parts.pop()
        data[end - part.nnz : end], indices[end - part.nnz : end] = part.data, part.indices
        end -= part.nnz
    shape = (matrix.shape[0], len(columns))
    return sparse.csr_matrix((data, indices, indptr.astype(kind)), shape=shape)


def take_rows(matrix: sparse.csr_matrix, rows: np.ndarray) -> sparse.csr_matrix:
    """Some rows of a matrix; many rows of one that lies on the disk do too."""
    if not is_on_disk(matrix):
        return matrix[rows]
    numbers = np.arange(matrix.shape[0])[rows]
    lengths = np.diff(matrix.indptr)[numbers].astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(matrix.indptr.dtype)
    count = int(indptr[-1])
    new = _mapped if count > STREAM_VALUES else np.empty
    data, indices = new(count, matrix.data.dtype), new(count, matrix.indices.dtype)
    block = matrix.indptr[numbers] // BLOCK  # of the file, to be in memory one at a time
    cuts = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(numbers)]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        found, part = matrix[numbers[start:stop]], slice(indptr[start], indptr[stop])
        data[part], indices[part] = found.data, found.indices
        release(matrix)
        _release(data, indices)
    shape = (len(numbers), matrix.shape[1])
    taken = sparse.csr_matrix((data, indices, indptr), shape=shape, copy=False)
    taken.has_canonical_format = matrix.has_canonical_format
    return taken


def row_sums(matrix: sparse.csr_matrix, weight: np.ndarray | None = None) -> np.ndarray:
    """Sum of each row (n,), float64, and of its values times a weight (G,), if one is given."""
    parts = [
        np.asarray(block.sum(axis=1) if weight is None else block @ weight).ravel()
        for _, block in row_blocks(matrix)
    ]
    return np.concatenate([np.zeros(0), *parts])


def smallest_value(matrix: sparse.csr_matrix) -> float:
    """The smallest stored value, or 0."""
    return min((float(block.data.min(initial=0.0)) for _, block in row_blocks(matrix)), default=0.0)


def release(matrix: sparse.csr_matrix) -> None:
    """Gives back the memory that holds values of a matrix on the disk, which stay there."""
    _release(matrix.data, matrix.indices)


def changed_values(matrix: sparse.csr_matrix, function) -> sparse.csr_matrix:
    """A matrix with a function applied to its stored values, in float64; on the disk if it is."""
    count, on_disk = len(matrix.data), is_on_disk(matrix)
    data = _mapped(count, np.dtype(np.float32)) if on_disk else np.empty(count, np.float32)
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        data[part] = function(matrix.data[part].astype(np.float64))
        _release(matrix.data, data)
    found = sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)
    found.has_canonical_format = matrix.has_canonical_format
    return found


class _SparseRows:
    """Rows of a stored CSR matrix."""

    def __init__(self, group: Any):
        self._data, self._indices = group["data"], group["indices"]
        self._indptr = np.asarray(group["indptr"][:], dtype=np.int64)
        self.shape = sparse_shape(group, (len(self._indptr) - 1, 0))
        count = self._data.shape[0]
        self._is_sound = bool(
            len(self._indptr) == self.shape[0] + 1
            and self._indptr[0] == 0
            and self._indptr[-1] == count == self._indices.shape[0]
            and np.all(np.diff(self._indptr) >= 0)
        )

    def cuts(self) -> list[int]:
        return _cuts(self._indptr) if self._is_sound else [0, 0]

    def count_values(self, spans: Sequence[tuple[int, int]]) -> int:
        return int(self._data.shape[0])

    def read(self, start: int, stop: int) -> sparse.csr_matrix | None:
        if not self._is_sound:
            return None
        part = slice(int(self._indptr[start]), int(self._indptr[stop]))
        values, indices = self._data[part], self._indices[part]
        if len(indices) and not (0 <= indices.min() and indices.max() < self.shape[1]):
            return None
        indptr = self._indptr[start : stop + 1] - self._indptr[start]
        block = sparse.csr_matrix(
            (np.asarray(values, np.float32), np.asarray(indices, np.int32), indptr),
            shape=(stop - start, self.shape[1]),
        )
        block.sum_duplicates()
        block.eliminate_zeros()
        return block


class _DenseRows:
    """Rows of a stored dense matrix."""

    def __init__(self, dataset: Any):
        self._data, self.shape = dataset, tuple(dataset.shape)

    def cuts(self) -> list[int]:
        return [*range(0, self.shape[0], block_length(self._data)), self.shape[0]]

    def count_values(self, spans: Sequence[tuple[int, int]]) -> int:
        return sum(int(np.count_nonzero(self._data[start:stop])) for start, stop in spans)

    def read(self, start: int, stop: int) -> sparse.csr_matrix | None:
        return sparse.csr_matrix(np.asarray(self._data[start:stop], dtype=np.float32))


def _cuts(indptr: np.ndarray) -> list[int]:
    """Row numbers between which lie at most :data:`BLOCK` values, or one row."""
    marks = np.arange(BLOCK, indptr[-1] + BLOCK, BLOCK)
    rows = np.searchsorted(indptr, marks, side="right") - 1
    return sorted({0, *rows.tolist(), len(indptr) - 1})


def _mapped(count: int, kind: np.dtype) -> np.ndarray:
    """An array in a temporary file, whose space is taken at once."""
    with tempfile.TemporaryFile(prefix="ipar_sparse-") as file:
        size = max(count, 1) * kind.itemsize
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # not on this system
            file.truncate(size)
        except OSError as error:
            raise UserError(
                f"no space left in {tempfile.gettempdir()} for {size / 2**30:.1f} GiB of "
                "expression; free some, or set TMPDIR to a folder on a larger disk"
            ) from error
        return np.memmap(file, dtype=kind, mode="r+", shape=(max(count, 1),))[:count]


def _mapping(array: Any) -> mmap.mmap | None:
    """What an array is mapped from, if it is."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and isinstance(array._mmap, mmap.mmap):  # type: ignore[attr-defined]
            return array._mmap  # type: ignore[attr-defined]
        array = array.base
    return None


def _release(*arrays: np.ndarray) -> None:
    """Gives back the memory that holds mapped arrays; their values stay in the file."""
    for mapping in map(_mapping, arrays):
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)
