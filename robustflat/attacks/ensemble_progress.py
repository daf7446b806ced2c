"""Finished pieces of an evaluation on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import CheckpointError, UserError
from robustflat.types import Forward

Piece = dict[str, Any]
"""Plain tensors and numbers of one attack on one batch."""


class Progress:
    """A folder with one file for each finished (attack, batch), written atomically and loaded without pickle code.

    Args:
        folder: created if missing.
        fingerprint: of the evaluation; see `fingerprint`.

    Raises:
        CheckpointError: if the folder holds pieces of another evaluation.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"progress must be a folder, but {self.folder} is a file.")
        _make(self.folder)
        about = self._load(self.folder / "about.pt")
        if about is None:
            self._save(self.folder / "about.pt", {"fingerprint": fingerprint})
        elif about.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"{self.folder} holds progress of another evaluation (other model, images, labels or settings). "
                "Give another folder, or delete this one to start afresh."
            )

    def load(self, attack: str, batch: int) -> Piece | None:
        """The piece, or `None` where it is not finished."""
        return self._load(self._path(attack, batch))

    def save(self, attack: str, batch: int, piece: Piece) -> None:
        """Write a finished piece; it is there completely or not at all."""
        self._save(self._path(attack, batch), piece)

    def _path(self, attack: str, batch: int) -> Path:
        return self.folder / f"{attack}.{batch:05d}.pt"

    @staticmethod
    def _load(path: Path) -> Piece | None:
        if not path.exists():
            return None
        try:
            piece: Piece = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # half a file can make the reader fail in any way
            raise CheckpointError(f"{path} is damaged. Delete it; that piece is then computed again.") from error
        return piece

    @staticmethod
    def _save(path: Path, piece: Piece) -> None:
        unfinished = path.with_suffix(".unfinished")
        try:
            torch.save(piece, unfinished)
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:  # torch's own for a full disk
            unfinished.unlink(missing_ok=True)
            reason = str(error).splitlines()[0]
            raise UserError(f"Cannot write {path} ({reason}). What was finished before is intact.") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder} for finished batches: {error.strerror}.") from error


def fingerprint(settings: str, model: Forward, x: Tensor, y: Tensor, logits: Tensor) -> str:
    """Hash of what decides the verdicts: settings, examples, and weights (or, without any, predictions)."""
    digest = hashlib.sha256(settings.encode())
    tensors: list[Tensor] = [x, y]
    if isinstance(model, nn.Module) and (state := model.state_dict()):
        digest.update("/".join(state).encode())
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    else:
        tensors.append(logits.argmax(dim=1))
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
