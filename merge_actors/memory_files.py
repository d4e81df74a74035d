"""Files of which some are memory: what makes a merge worker write into a model instead of a checkpoint.

An evaluator merges by the ordinary plan and the ordinary worker; only the files are others. Outputs are
tensors in memory, one per output tensor, so each starts at an address that every kernel likes. Inputs
are mapped once (`MappedSources`) as far as memory allows, and then never read from the disk again; the
others are read by slices as always.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.checkpoint.layout import Layout
from raymerge.merge_actors.dtypes import element_bytes, torch_dtype
from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.mapped_sources import MappedSources, Source
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.uris import is_remote

if TYPE_CHECKING:
    import torch

#: Alignment of each output tensor: what cuBLAS and vector units want at most.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class _OutputFile:
    """A file that is memory: its tensors by their place."""

    begins: Sequence[int]
    """First byte of each tensor, ascending."""
    bytes_of: Sequence[torch.Tensor]
    """Each tensor as uint8."""


class MemoryFiles(StorageFiles):
    """Open files, some of which are tensors."""

    def __init__(self, sources: MappedSources | None = None) -> None:
        """Make files without any output.

        Args:
            sources: inputs that are kept in memory; None reads all of them by slices.
        """
        super().__init__()
        self._sources = sources
        self._outputs: dict[str, _OutputFile] = {}
        self._counting = threading.Lock()
        self._sliced_bytes = 0

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk, its cache or a store so far; a mapped file counts once, whole."""
        mapped_bytes = self._sources.num_bytes if self._sources else 0
        return self._sliced_bytes + mapped_bytes + self._remote.fetched_bytes

    def lay_out(
        self,
        folder: str,
        layout: Layout,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        devices: Sequence[str] = ("cpu",),
        device_of: Mapping[str, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Make the tensors of an output, in one piece of memory a device; a folder laid out before is replaced.

        Args:
            folder: the output's folder in the plan; nothing of it exists on a disk.
            layout: its files.
            shapes: dtype and shape of every tensor, by name.
            devices: where the memory is.
            device_of: on which of them each tensor is, by number; None for all on the first.

        Returns:
            the tensors by name, zeros, in the order of the layout.
        """
        self.drop(folder)
        places = [(file, name, *place) for file in layout.files for name, place in file.tensors.items()]
        numbers = {name: device_of[name] if device_of else 0 for _, name, _, _ in places}
        totals = [0] * len(devices)
        for _, name, begin, end in places:
            totals[numbers[name]] += _aligned(end - begin)
        memories = [_zeros(total, device) for total, device in zip(totals, devices, strict=True)]
        used = [0] * len(devices)
        tensors: dict[str, torch.Tensor] = {}
        in_file: dict[str, list[tuple[int, torch.Tensor]]] = {file.name: [] for file in layout.files}
        for file, name, begin, end in places:
            at = used[numbers[name]]
            raw = memories[numbers[name]][at : at + end - begin]
            dtype, shape = shapes[name]
            tensors[name] = raw.view(torch_dtype(dtype)).view(shape)
            if end > begin:
                in_file[file.name].append((begin, raw))
            used[numbers[name]] += _aligned(end - begin)
        for file_name, found in in_file.items():
            found.sort(key=lambda each: each[0])
            self._outputs[f"{folder}/{file_name}"] = _OutputFile(
                [begin for begin, _ in found], [raw for _, raw in found]
            )
        return tensors

    def drop(self, folder: str) -> None:
        """Forget the outputs of a folder."""
        for path in [path for path in self._outputs if path.rpartition("/")[0] == folder]:
            del self._outputs[path]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from memory, else from the file."""
        source = self._find(path, offset, len(buffer))
        if source is not None:
            buffer[:] = source.data[offset : offset + len(buffer)].data
            return
        super().read_into(path, offset, buffer)
        if not is_remote(path):
            with self._counting:
                self._sliced_bytes += len(buffer)

    def view(self, path: str, offset: int, num_bytes: int, dtype: str) -> HostInput | None:
        """Return elements of an input that are in memory, not to be written to; None if they are not."""
        source = self._find(path, offset, num_bytes)
        if source is None:
            return None
        if source.on_device is not None:
            on_device = source.on_device[offset : offset + num_bytes]
            return None if offset % element_bytes(dtype) else HostInput(source.data[:0], dtype, on_device)
        data = source.data[offset : offset + num_bytes]
        # A file may hold an element at any byte; what computes wants it at a multiple of its width.
        return None if data.ctypes.data % element_bytes(dtype) else HostInput(data, dtype)

    def output(self, path: str, offset: int, num_bytes: int) -> NDArray[np.uint8] | None:
        """Return the memory of an output, if it is the host's."""
        target = self._target(path, offset, num_bytes) if num_bytes else None
        return target.numpy() if target is not None and target.device.type == "cpu" else None

    def write_from(self, path: str, offset: int, buffer: memoryview) -> None:
        """Write `buffer` to memory, else to the file."""
        if not len(buffer):
            return
        target = self._target(path, offset, len(buffer))
        if target is None:
            super().write_from(path, offset, buffer)
            return
        import torch

        source = torch.frombuffer(buffer, dtype=torch.uint8)
        if source.data_ptr() != target.data_ptr():  # it may have been made in place
            target.copy_(source)

    def _find(self, path: str, offset: int, num_bytes: int) -> Source | None:
        if self._sources is None or is_remote(path):
            return None
        source = self._sources.find(self.located(path))
        # The ordinary way of reading says what is wrong with a file that ends early.
        return None if source is None or offset + num_bytes > len(source.data) else source

    def _target(self, path: str, offset: int, num_bytes: int) -> torch.Tensor | None:
        """Return the memory of a part of an output as uint8; None if it is a file."""
        file = self._outputs.get(path)
        if file is None:
            return None
        number = bisect.bisect_right(file.begins, offset) - 1
        first = offset - file.begins[number] if number >= 0 else 0
        if number < 0 or first + num_bytes > file.bytes_of[number].numel():
            raise OutputError(f"{path} has no tensor at bytes [{offset}, {offset + num_bytes})")
        return file.bytes_of[number][first : first + num_bytes]


def _zeros(num_bytes: int, device: str) -> torch.Tensor:
    """Return bytes that begin at an aligned address."""
    import torch

    memory = torch.zeros(num_bytes + _ALIGNMENT, dtype=torch.uint8, device=device)
    return memory[-memory.data_ptr() % _ALIGNMENT :]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
