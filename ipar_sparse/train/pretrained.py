"""Trained runs to share: what prediction needs, in a folder or on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from ..config.schema import CONFIG, INPUTS, REQUESTED, SELECTION
from ..data.records import recorded_inputs
from ..errors import UserError, import_extra
from ..inference.run_folder import REFERENCE, find_checkpoint, read_meta
from .run_folder import check_run_folder, copy_run


class Pretrained:
    """What :class:`~ipar_sparse.api.IPAR` shares models by, named as in ``huggingface_hub``."""

    @property
    def run(self) -> Path:
        """The run folder."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "auto") -> Self:
        """The model of a run folder."""
        raise NotImplementedError

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        overwrite: bool = False,
        **repository: Any,
    ) -> str | None:
        """Writes a model to share: what prediction needs, and a model card.

        The state of training and the paths of the training slides are left behind. Names of these
        slides, and positions and embeddings of some of their cells, are in the model.

        Args:
            folder: made if missing; :meth:`from_pretrained` and the commands read it.
            push_to_hub: upload it to the Hugging Face hub, too.
            repo_id: ``"user/model"`` there; the folder's name if left out.
            overwrite: replace an earlier run in the folder.
            **repository: ``private`` and ``token``, as ``huggingface_hub`` takes them.

        Returns:
            The address of the commit, if it was uploaded.

        Raises:
            UserError: the folder is in use, or the hub refuses.
        """
        folder = Path(folder)
        if folder.resolve() == self.run.resolve():
            raise UserError(f"{folder} is the run itself; choose another folder")
        check_run_folder(folder, overwrite)
        with TemporaryDirectory() as temporary:
            write_pretrained(self.run, Path(temporary))
            copy_run(Path(temporary), folder)
        return upload(folder, repo_id or folder.name, **repository) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, device: str = "auto", **download: Any
    ) -> Self:
        """The model of a folder, or of a repository of the Hugging Face hub.

        Args:
            name: a folder, or ``"user/model"``.
            device: as in :meth:`load`.
            **download: ``revision``, ``token``, ``cache_dir`` and other arguments of
                ``huggingface_hub.snapshot_download``.

        Raises:
            UserError: there is no such folder or repository, or it holds no run.
        """
        return cls.load(find_pretrained(name, **download), device)


def write_pretrained(run: Path, folder: Path) -> None:
    """Copies what prediction and evaluation need to a folder, and describes it in a model card.

    The state of training stays behind, and so do the paths of the training slides.

    Args:
        run: folder of a run.
        folder: an empty folder.

    Raises:
        UserError: the run has no weights, or a file of it is damaged.
    """
    weights, recorded = find_checkpoint(run), recorded_inputs(run)
    for role in {"train", "val", "cells"} & set(recorded):
        recorded[role] = [one | {"path": None} for one in recorded[role]]
    (folder / INPUTS).write_text(json.dumps(recorded, indent=2) + "\n")
    (folder / "README.md").write_text(_card(read_meta(weights), recorded))
    for name in (CONFIG, REQUESTED, SELECTION, REFERENCE, weights.name):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)


def upload(
    folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Uploads a folder to a repository of the hub, which is made if missing.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    hub = import_extra("huggingface_hub", "hub")
    try:
        api = hub.HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder))
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise _refused(repo_id, error) from error


def find_pretrained(name: str | os.PathLike, **options: Any) -> Path:
    """The local folder of a run: itself, or a copy of a repository of the hub.

    Args:
        name: a folder, or ``"user/model"``.
        **options: of ``huggingface_hub.snapshot_download``.

    Raises:
        UserError: there is neither, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if len(Path(name).parts) != 2 or Path(name).is_absolute():
        raise UserError(f"{name}: is no folder, and no model of the hub, which is USER/MODEL")
    hub = import_extra("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(str(name), **options))
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise _refused(str(name), error) from error


def _refused(name: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"{name}: the hub gave no answer that helps ({reason})")


def _card(meta: dict[str, Any], recorded: dict[str, Any]) -> str:
    """A model card: what the model is, what it was trained on, how it is used."""
    slides = "\n".join(
        f"| {one['name']} | {one['cells']:,} | {told} |"
        for role, told in (("train", "trained on"), ("val", "validated on"))
        for one in recorded[role]
    )
    genes = "an embedding of the user" if meta["genes"] is None else f"{len(meta['genes']):,} genes"
    return f"""---
library_name: ipar_sparse
tags: [spatial-transcriptomics, single-cell]
---

# Positions of cells from their expression

Places cells in 2D by {genes}, as on the slides below. Made by `ipar_sparse` {meta["ipar_sparse"]}.

```python
import ipar_sparse

model = ipar_sparse.IPAR.from_pretrained("USER/MODEL")
model.predict(cells)  # AnnData; fills obsm["X_ipar"]
```

| slide | cells | |
|---|---|---|
{slides}
"""
