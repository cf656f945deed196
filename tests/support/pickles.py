"""Files that would run code if anything loaded them the dangerous way, and a look at whether it did."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch


class _Plant:
    """Unpickled, it makes a folder: a builtin of ``os``, so that any unpickler that looks nothing up finds it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


class Bait:
    """Bytes in every form that something unpickles, and the marker that they would leave."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "the-pickle-ran"

    @property
    def sprung(self) -> bool:
        return self.marker.exists()

    @property
    def pickle(self) -> bytes:
        return pickle.dumps(_Plant(self.marker))

    @property
    def torch_zip(self) -> bytes:
        out = io.BytesIO()
        torch.save({"model": _Plant(self.marker)}, out)
        return out.getvalue()

    @property
    def torch_old(self) -> bytes:
        out = io.BytesIO()
        torch.save({"net": _Plant(self.marker)}, out, _use_new_zipfile_serialization=False)
        return out.getvalue()

    @property
    def numpy(self) -> bytes:
        out = io.BytesIO()
        np.save(out, np.array([_Plant(self.marker)], object), allow_pickle=True)
        return out.getvalue()

    @property
    def joblib(self) -> bytes:
        import joblib

        out = io.BytesIO()
        joblib.dump(_Plant(self.marker), out, compress=3)
        return out.getvalue()

    @property
    def yaml(self) -> bytes:
        return f'x: !!python/object/apply:os.mkdir ["{self.marker}"]\n'.encode()

    @property
    def forms(self) -> dict[str, bytes]:
        """All of them by name."""
        names = ("pickle", "torch_zip", "torch_old", "numpy", "joblib", "yaml")
        return {name: getattr(self, name) for name in names}


def spring(form: str, data: bytes) -> None:
    """Load it the dangerous way: that the bait works at all."""
    if form == "yaml":
        import yaml

        yaml.unsafe_load(data)
    elif form == "numpy":
        np.load(io.BytesIO(data), allow_pickle=True)
    elif form == "joblib":
        import joblib

        joblib.load(io.BytesIO(data))
    elif form.startswith("torch"):
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        pickle.loads(data)  # noqa: S301  # the point of it


def zipped(name: str, data: bytes) -> bytes:
    """A zip with one member."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, data)
    return out.getvalue()
