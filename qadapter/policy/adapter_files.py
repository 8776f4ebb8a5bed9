"""The files of a saved adapter: where they are, and that they are what was saved."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import huggingface_hub

from qadapter.errors import QAdapterError, shown
from qadapter.system import manifest

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "qadapter_config.json"
PEFT_CONFIG_NAME = "adapter_config.json"


class AdapterFiles:
    """A local folder, or a repository of the hub, by its name.

    Its manifest, where it has one, is held against every file before that file is read.
    """

    def __init__(self, adapter_dir: str | Path) -> None:
        self.name = str(adapter_dir)
        self._folder = Path(adapter_dir)

    @classmethod
    def of(cls, place: str | Path | AdapterFiles) -> AdapterFiles:
        return place if isinstance(place, AdapterFiles) else cls(place)

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> Path:
        """Absolute; of a repository of the hub, it says nothing."""
        return self._folder.absolute()

    def above(self) -> AdapterFiles:
        """The folder that this one lies in."""
        return AdapterFiles(self.path.parent)

    def locate(self, name: str) -> Path:
        """The path of a file, downloaded where it is on the hub.

        Raises:
            QAdapterError: missing.
        """
        if self._folder.is_dir():
            if not (self._folder / name).is_file():
                raise QAdapterError(f"{self._folder}: {name} is missing: not a saved Q-Adapter")
            return self._folder / name
        if self._folder.is_absolute() or self.name.count("/") != 1:
            raise QAdapterError(f"{self.name}: no such folder")
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, name))
        except Exception as error:
            raise QAdapterError(
                f"{self.name}: neither a local folder nor to be had from the hub "
                f"({type(error).__name__})"
            ) from error

    def require_inside(self, folder: str) -> None:
        """Raises ValueError unless this is the name of a folder inside, that leads nowhere else."""
        if not isinstance(folder, str) or not re.fullmatch(r"\w[\w.-]*", folder):
            raise ValueError(f"{shown(folder)} is no name of a folder of its own")
        if (self._folder / folder).is_symlink():
            raise ValueError(f"{shown(folder)} is a link, no folder of its own")

    def has(self, name: str) -> bool:
        try:
            self.locate(name)
        except QAdapterError:
            return False
        return True

    @functools.cached_property
    def manifest(self) -> manifest.Manifest | None:
        """None where there is none: saved before, by PEFT, or never finished.

        Raises:
            QAdapterError: damaged.
        """
        if not self.has(manifest.MANIFEST_NAME):
            return None
        try:
            return manifest.read(self.locate(manifest.MANIFEST_NAME))
        except QAdapterError:
            if self.has(CONFIG_NAME):
                raise
            return None  # of another tool, beside PEFT's files

    def lists(self, name: str) -> bool:
        """Whether the file is a part of what was saved; without a manifest, whether it is there."""
        return self.has(name) if self.manifest is None else name in self.manifest.files

    def checked(self, name: str) -> Path:
        """The path of a file that is what was saved, as far as a manifest tells.

        Raises:
            QAdapterError: missing, not listed, or another; the message names it.
        """
        path = self.locate(name)
        if self.manifest is not None:
            self.manifest.check_file(name, path)
        return path
