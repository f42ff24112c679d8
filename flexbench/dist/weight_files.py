"""Where weights come from: a Hugging Face folder, or a random number generator.

Tensors are read one at a time, so that a pipeline stage touches only what belongs to its layers.
Files in the .bin format are read with weights_only: nothing in them is executed.
"""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from flexbench.core.errors import (
    ConfigError,
    FlexbenchError,
    InputFileError,
    MissingDependencyError,
)
from flexbench.dist.layers import WeightSpec

# What OPT is initialized with (its config.json: init_std).
_INIT_STD = 0.02
# Before, weights_only could be circumvented (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)
_PREFIXES = ("model.", "", "model.model.")
_HUB_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
_HUB_PATTERNS_BIN = ("config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


class WeightSource(Protocol):
    """Named tensors. Names are those of transformers' OPTModel: decoder.layers.0.fc1.weight."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if there is none of this name."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU."""


class DummySource:
    """Random weights, the same for the same seed and name, however many stages share the model."""

    def __init__(self, specs: Iterable[WeightSpec], *, seed: int = 0) -> None:
        self._seed = seed
        self._shapes = {source: spec.source_shape for spec in specs for source in spec.sources}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the layers ask for."""
        return self._shapes.get(name)

    def read(self, name: str) -> torch.Tensor:
        """Uniform around 0 with OPT's initial deviation; around 1 for a layer norm's weight."""
        # The fastest of numpy's generators: large models have billions of weights.
        bits = np.random.SFC64([self._seed, zlib.crc32(name.encode())])
        weight = torch.from_numpy(
            np.random.Generator(bits).random(self._shapes[name], dtype=np.float32)
        )
        center = 1.0 if name.endswith("norm.weight") else 0.0
        bound = _INIT_STD * 3**0.5
        return weight.mul_(2 * bound).add_(center - bound)


class _FolderSource:
    """The files of a folder. `files` has the file that holds each tensor, by its name in there."""

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        self._folder = folder
        self._files = files
        self._prefix = next(
            (p for p in _PREFIXES if f"{p}decoder.embed_tokens.weight" in files), ""
        )

    def _locate(self, name: str) -> tuple[str, Path] | None:
        for stored in (self._prefix + name, name):
            if stored in self._files:
                return stored, self._files[stored]
        return None


class SafetensorsSource(_FolderSource):
    """A folder with model.safetensors, or its shards."""

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        super().__init__(folder, files)
        self._open: dict[Path, tuple[Any, frozenset[str]]] = {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """From the file's header; the tensor itself is not read."""
        found = self._locate(name)
        if found is None:
            return None
        stored, path = found
        file, names = self._file(path)
        if stored not in names:
            raise InputFileError(path, f"has no tensor {stored}, which the index says it has")
        return tuple(file.get_slice(stored).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """The tensor; the file is mapped, so nothing else is read."""
        found = self._locate(name)
        assert found is not None, "shape() is asked first"
        stored, path = found
        tensor: torch.Tensor = self._file(path)[0].get_tensor(stored)
        return tensor

    def _file(self, path: Path) -> tuple[Any, frozenset[str]]:
        if path not in self._open:
            file = _open_safetensors(path)
            self._open[path] = (file, frozenset(file.keys()))
        return self._open[path]


class BinSource(_FolderSource):
    """A folder with pytorch_model.bin, or its shards, as torch.save writes them."""

    def __init__(
        self, folder: Path, files: dict[str, Path], loaded: dict[Path, dict[str, Any]]
    ) -> None:
        super().__init__(folder, files)
        self._loaded = loaded

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the mapped tensor."""
        found = self._locate(name)
        return None if found is None else tuple(self._tensor(*found).shape)

    def read(self, name: str) -> torch.Tensor:
        """The tensor; its pages are read when they are used."""
        found = self._locate(name)
        assert found is not None, "shape() is asked first"
        return self._tensor(*found)

    def _tensor(self, stored: str, path: Path) -> torch.Tensor:
        if path not in self._loaded:
            self._loaded[path] = _load_bin(path)
        tensor = self._loaded[path].get(stored)
        if not isinstance(tensor, torch.Tensor):
            raise InputFileError(path, f"has no tensor {stored}")
        return tensor


def open_folder(folder: Path) -> WeightSource:
    """The weights of a Hugging Face folder; safetensors where there are both formats.

    Raises InputFileError for a folder without weights, or with ones that cannot be read.
    """
    for stem, opened in (("model.safetensors", _safetensors), ("pytorch_model.bin", _bin)):
        index = folder / f"{stem}.index.json"
        if index.exists():
            return opened(folder, _read_index(index))
        if (folder / stem).exists():
            return opened(folder, None)
    raise InputFileError(
        folder,
        "has no model.safetensors or pytorch_model.bin, and no index of their shards",
    )


def _safetensors(folder: Path, files: dict[str, Path] | None) -> WeightSource:
    if files is None:
        path = folder / "model.safetensors"
        files = dict.fromkeys(_open_safetensors(path).keys(), path)
    return SafetensorsSource(folder, files)


def _bin(folder: Path, files: dict[str, Path] | None) -> WeightSource:
    loaded = {}
    if files is None:
        path = folder / "pytorch_model.bin"
        loaded = {path: _load_bin(path)}
        files = dict.fromkeys(loaded[path], path)
    return BinSource(folder, files, loaded)


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingDependencyError(
            f"{path} needs safetensors, which is not installed: pip install 'flexbench[dist]'"
        ) from None
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputFileError(path, f"cannot be read: {error}") from error


def _load_bin(path: Path) -> dict[str, Any]:
    if _torch_version() < _SAFE_TORCH:
        wanted = ".".join(map(str, _SAFE_TORCH))
        raise InputFileError(
            path,
            f"needs torch {wanted} or newer: older ones can be made to run what a .bin file says; "
            "or convert it to safetensors",
        )
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files from before torch 1.6 cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputFileError(
            path,
            "cannot be read as weights: it is damaged, or holds more than tensors, which is not "
            "executed",
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputFileError(path, f"cannot be read as weights: {reason}") from error
    if not isinstance(loaded, dict):
        raise InputFileError(path, f"holds no tensors by name, but a {type(loaded).__name__}")
    return loaded


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): path.parent / str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputFileError(path, f"is no index of shards: {error!r}") from error
    for name in {str(file) for file in weight_map.values()}:
        # Links in the folder may lead anywhere: the cache of the hub is full of them.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputFileError(path, f"names a file outside of its folder: {name}")
    return files


def check_weights(source: WeightSource, specs: Iterable[WeightSpec], where: str) -> None:
    """Raise InputFileError that names every tensor which is missing or has another shape."""
    problems = []
    for spec in specs:
        for name in spec.sources:
            shape = source.shape(name)
            if shape is None:
                problems.append(f"{name} is missing")
            elif shape != spec.source_shape:
                problems.append(f"{name} is {list(shape)}, not {list(spec.source_shape)}")
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputFileError(where, f"{shown}{more}")


def find_model(path: str) -> Path:
    """The folder of a model that is given as a folder, or as a name on the Hugging Face hub.

    Raises ConfigError when there is no such folder, or when the hub cannot be reached.
    """
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError) as error:  # no such user, or no name of a file
        raise ConfigError("--path", f"there is no folder {path[:80]!r}: {error}") from error
    owner, slash, name = path.partition("/")
    if not (slash and owner.strip(".~") and name and "/" not in name):
        raise ConfigError("--path", f"there is no folder {path}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError(
            f"--path: there is no folder {path}, and names on the hub need another package: "
            "pip install huggingface-hub"
        ) from None
    try:
        downloaded = Path(snapshot_download(path, allow_patterns=list(_HUB_PATTERNS)))
        if not any(downloaded.glob("*.safetensors")):
            downloaded = Path(snapshot_download(path, allow_patterns=list(_HUB_PATTERNS_BIN)))
    except FlexbenchError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            "--path", f"there is no folder {path}, and the hub did not give it: {reason}"
        ) from error
    return downloaded
