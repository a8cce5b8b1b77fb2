"""What a user names as input: a path of any known format, told by names of files alone.

No data is read here, so that a wrong path is refused before anything slow is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

ALL = "all"
"""``STORE::all`` takes all regions of a SpatialData store as one slide."""
_MARK, _ESCAPED = "::", r"\::"
_SPATIALDATA = ("tables", "shapes", "labels", "points", "images")


class Platform(NamedTuple):
    """Files that the software of a platform leaves.

    Args:
        name: of the platform.
        matrix: patterns of the file of counts; the first that matches counts.
        positions: patterns of the file of positions.
    """

    name: str
    matrix: tuple[str, ...]
    positions: tuple[str, ...]


PLATFORMS = (
    Platform("Xenium", ("cell_feature_matrix.h5",), ("cells.parquet", "cells.csv.gz", "cells.csv")),
    Platform(
        "Visium",
        ("filtered_feature_bc_matrix.h5", "*filtered_feature_bc_matrix.h5"),
        ("spatial/tissue_positions.parquet", "spatial/tissue_positions*.csv"),
    ),
    Platform(
        "MERSCOPE",
        ("*cell_by_gene*.csv", "*cell_by_gene*.csv.gz"),
        ("*cell_metadata*.csv", "*cell_metadata*.csv.gz"),
    ),
    Platform(
        "CosMx",
        ("*exprMat_file.csv", "*exprMat_file.csv.gz"),
        ("*metadata_file.csv", "*metadata_file.csv.gz"),
    ),
    Platform(
        "Slide-seq",
        ("*MappedDGEForR.csv*", "*digital_expression.txt*", "*digital_expression.csv*"),
        ("*BeadLocationsForR.csv*", "*bead_locations*.csv*", "*BeadLocations*.csv*"),
    ),
)


class VendorFiles(NamedTuple):
    """The files of one slide.

    Args:
        kind: of the platform.
        matrix: file of counts.
        positions: file of positions; None where the counts hold them, or there are none.
    """

    kind: str
    matrix: Path
    positions: Path | None = None


@dataclass(frozen=True)
class Source:
    """A path, and what of it is meant.

    Args:
        path: a file or folder.
        parts: what is picked, from coarse to fine: a table or a size of bins where the format has
            several, then the label of one slide.
    """

    path: Path
    parts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | os.PathLike) -> Source:
        r"""Reads ``PATH::PART``; a path that holds ``::`` is written with ``\::``."""
        if not isinstance(text, str | os.PathLike):
            kind = type(text).__name__
            raise UserError(
                f"cells are given as AnnData, or as the path of a file; {kind} is neither"
            )
        hidden = os.fspath(text).replace(_ESCAPED, "\0")
        path, *parts = (piece.replace("\0", _MARK) for piece in hidden.split(_MARK))
        if not path or "" in parts:
            raise UserError(f"{text}: write it as PATH or PATH::PART, e.g. slides.h5ad::C")
        if parts and not os.path.exists(path) and os.path.exists(text):
            escaped = os.fspath(text).replace(_MARK, _ESCAPED)
            raise UserError(
                f"{text}: a path that holds '::' is written with a backslash: {escaped}"
            )
        return cls(Path(path), tuple(parts))

    def __str__(self) -> str:
        return _MARK.join(
            str(text).replace(_MARK, _ESCAPED) for text in (self.path.absolute(), *self.parts)
        )

    def shares(self, other: Source) -> bool:
        """Whether one of two sources is the other, or a part of it."""
        both = zip(self.parts, other.parts, strict=False)
        return self.path.resolve() == other.path.resolve() and all(a == b for a, b in both)

    @property
    def name(self) -> str:
        """What slides are called: the stem of the path, its folder's for ``outs``; and the bins."""
        path, part = self.path.absolute(), self.part
        stem = path.parent.name if path.name == "outs" and path.is_dir() else path.stem
        return stem if part is None else f"{stem}-{part}"

    @property
    def is_spatialdata(self) -> bool:
        """Whether it is a SpatialData store."""
        is_zarr = any((self.path / name).is_file() for name in ("zarr.json", ".zgroup"))
        inside = any((self.path / kind).is_dir() for kind in _SPATIALDATA)
        return is_zarr and inside and not (self.path / "obs").exists()

    @property
    def is_foreign(self) -> bool:
        """Whether it is a vendor's format, which holds no AnnData elements."""
        return vendor_files(self) is not None

    @property
    def part(self) -> str | None:
        """The table or the size of bins that is picked, if one is."""
        if not self.parts:
            return None
        takes = self.parts[0] in self._tables if self.is_spatialdata else self._has_bins
        return self.parts[0] if takes else None

    @property
    def label(self) -> str | None:
        """The label of the slide that is picked, if one is; ``"all"`` picks none."""
        rest = self.parts[self.part is not None :]
        if len(rest) > 1:
            raise UserError(f"{self.path}: has no {_MARK.join(self.parts)!r}; pick one part")
        return None if not rest or self.takes_all else rest[0]

    @property
    def takes_all(self) -> bool:
        """Whether all regions of a SpatialData store are taken as one slide."""
        return self.is_spatialdata and self.parts[-1:] == (ALL,)

    @property
    def group(self) -> str | None:
        """The group of the path that holds AnnData elements, where it is not the root.

        Raises:
            UserError: a SpatialData store has no table, or several and none is picked.
        """
        if not self.is_spatialdata:
            return None
        names = self._tables
        if not names:
            raise UserError(f"{self.path}: is a SpatialData store without a table; add one")
        if self.part is None and len(names) > 1:
            raise UserError(
                f"{self.path}: holds the tables {', '.join(names)}; pick one, e.g. "
                f"{self.path}::{names[0]}"
            )
        return f"tables/{self.part or names[0]}"

    @property
    def suffix(self) -> str:
        """That of a file which can hold all of it: .zarr for stores, else .h5ad."""
        return ".zarr" if self.path.is_dir() and not self.is_foreign else ".h5ad"

    @property
    def _tables(self) -> list[str]:
        folder = self.path / "tables"
        below = folder.iterdir() if folder.is_dir() else ()
        return sorted(one.name for one in below if one.is_dir() and one.name[0] != ".")

    @property
    def _has_bins(self) -> bool:
        path = self.path
        return path.suffix == ".gef" or _bin_folder(path) is not None or bool(_gef_files(path))


def vendor_files(source: Source) -> VendorFiles | None:
    """The files of a vendor's format; None for AnnData and SpatialData.

    Raises:
        UserError: in one line, if files are missing, or several could be meant.
    """
    path = source.path
    if not path.is_dir():
        kind = _kind_of_file(path)
        return VendorFiles(kind, path) if kind else None
    if bins := _bin_folder(path):
        sizes = {folder.name: folder for folder in sorted(bins.glob("square_*um"))}
        folder = sizes[pick_bins(path, source.part, list(sizes))]
        found = _of_platform(folder)
        return found and found._replace(kind=f"Visium HD, {folder.name}")
    if found := _of_platform(path) or _of_platform(path / "outs"):
        return found
    files = _gef_files(path)
    return VendorFiles("Stereo-seq", _only(files)) if files else None


def pick_bins(path: Path, part: str | None, sizes: list[str]) -> str:
    """The size of bins that is named, or the only one.

    Raises:
        UserError: none is named and there are several, or there is none of the name.
    """
    if part is None and len(sizes) == 1:
        return sizes[0]
    if part not in sizes:
        raise UserError(
            f"{path}: holds bins of {', '.join(sizes) or 'no size'}; pick one, e.g. "
            f"{path}::{next(iter(sizes), '...')}"
        )
    return part


def _kind_of_file(path: Path) -> str | None:
    """The vendor's format of a file, told by its suffix; AnnData may be called .h5, too."""
    if path.suffix == ".h5" and path.is_file():
        import h5py

        try:
            with h5py.File(path) as store:
                if "obs" in store and "var" in store:
                    return None
        except OSError:
            pass  # is told where it is read
    return {".h5": "10x matrix", ".gef": "Stereo-seq"}.get(path.suffix)


def _of_platform(folder: Path) -> VendorFiles | None:
    for platform in PLATFORMS:
        if matrix := _find(folder, platform.matrix):
            positions = _find(folder, platform.positions)
            if positions is None:
                raise UserError(
                    f"{folder}: looks like {platform.name}, but no {platform.positions[0]} lies "
                    "beside the counts; copy the whole folder"
                )
            return VendorFiles(platform.name, _only(matrix), _only(positions))
    return None


def _find(folder: Path, patterns: Iterable[str]) -> list[Path] | None:
    """The files of the first pattern that matches any."""
    return next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), None)


def _bin_folder(path: Path) -> Path | None:
    folders = (path / "binned_outputs", path / "outs" / "binned_outputs")
    return next((folder for folder in folders if folder.is_dir()), None)


def _gef_files(path: Path) -> list[Path]:
    """Files of cells if there are any, else of bins."""
    kinds, below = (".cellbin.gef", ".gef"), ("", "*/", "*/*/")
    return _find(path, [f"{folder}*{kind}" for kind in kinds for folder in below]) or []


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise UserError(
            f"{files[0].parent}: {names} could be meant; give each slide a folder of its own"
        )
    return files[0]
