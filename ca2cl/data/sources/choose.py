"""Where tiles come from: class-folder trees and Hugging Face ``datasets``."""

from __future__ import annotations

from pathlib import Path

from ca2cl.data.sources.base import Source, SourceOptions
from ca2cl.data.sources.image_folder import FolderSource
from ca2cl.errors import InputError

_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


def open_source(source: str, options: SourceOptions | None = None, *, mixed: bool = False) -> Source:
    """List ``source``: a folder of images, a folder by ``datasets.save_to_disk``, or ``hf:NAME`` on the hub.

    Args:
        mixed: take images beside class folders, without a label; otherwise such a folder is refused.

    Raises:
        InputError: missing, empty, unreadable, or options that do not fit it.
    """
    options = options or SourceOptions()
    root = Path(source)
    hub = source.startswith("hf:")
    if not hub and not root.is_dir():
        raise InputError(f"{source}: no such folder; give a folder of images, a saved dataset or hf:NAME")
    if hub or any((root / name).is_file() for name in _DATASET_FILES):
        from ca2cl.data.sources.huggingface import DatasetSource  # `datasets` is slow to import and folders do without

        return DatasetSource(source, options)
    return FolderSource(root, options, mixed=mixed)
