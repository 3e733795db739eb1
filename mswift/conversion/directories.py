"""What a model or adapter directory holds, read without torch: a wrong path or a damaged file is told before anything heavy is imported.

The format of safetensors: 8 bytes of header length, JSON with ``dtype``, ``shape`` and ``data_offsets`` of every tensor, then the bytes
without a hole (https://github.com/huggingface/safetensors). That of ``torch.save``: a zip archive of a pickle and of a stored entry for each
storage; before torch 1.6 a pickle with the bytes behind it. Here nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mswift.conversion.rules import Shape
from mswift.errors import ModelError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
MCORE_FILE, MCORE_WEIGHTS = "latest_checkpointed_iteration.txt", "release"
"""Of a Megatron checkpoint: the file by which Megatron-LM finds the folder of the weights, and that folder."""
ADAPTER_CONFIG_FILE, ADAPTER_FILE, ADAPTER_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Any one of these is a tokenizer; which class reads it is a matter of tokenizer_config.json."""
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_LFS_POINTER = b"version https://git-lfs"
_ZIP, _PICKLE = b"PK", b"\x80"  # how an archive and a pickle of protocol 2 or later begin
_LOCAL_HEADER = 30  # bytes before the name of an entry of a zip archive

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Element types of safetensors that are known here, and the bytes of one element."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a safetensors file: its element type, its shape, and the byte of the file at which it begins."""

    type: str
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.type]


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one safetensors file, checked against the size of the file."""

    tensors: dict[str, HeaderEntry]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors of a model directory. headers: by file name. where: tensor -> file name, in file order."""

    headers: dict[str, Header]
    where: dict[str, str]


def listing(what: str, names: Iterable[str], limit: int = 8) -> str:
    """``3 absent tensors (a, b, c)``; past ``limit`` names the rest is a number."""
    all_names = sorted(names)
    shown = ", ".join(all_names[:limit]) + (f" and {len(all_names) - limit} more" if len(all_names) > limit else "")
    return f"{len(all_names)} {what}{'s' if len(all_names) != 1 else ''} ({shown})"


def damaged(path: Path, what: str) -> ModelError:
    """The error about a file that ends early or holds something else."""
    return ModelError(f"{path} is truncated or corrupt: {what}; download or copy it again")


def open_file(path: Path) -> BinaryIO:
    """The file, unbuffered.

    Raises:
        ModelError: it cannot be opened.
    """
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise ModelError(f"cannot open {path}: {error.strerror}; check the path and its permissions") from None


def read_header(path: Path) -> Header:
    """The header of a safetensors file; its bytes are not read.

    Raises:
        ModelError: the file is absent, truncated or corrupt.
    """
    with open_file(path) as file:
        return parse_header(file, path)


def parse_header(file: BinaryIO, path: Path) -> Header:
    """`read_header` of an open file, positioned at its start."""
    size = os.fstat(file.fileno()).st_size
    start = _first_bytes(file, path)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise damaged(path, f"{size} bytes do not hold its header")
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        metadata: dict[str, str] = dict(header.pop("__metadata__", None) or {})
        spans = {name: (int(begin), int(stop)) for name, entry in header.items() for begin, stop in [entry["data_offsets"]]}
        types = {name: str(entry["dtype"]) for name, entry in header.items()}
        shapes = {name: tuple(int(size) for size in entry["shape"]) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise damaged(path, "its header is not that of a safetensors file") from None
    unknown = sorted(set(types.values()) - set(ITEM_BYTES))
    if unknown:
        raise ModelError(f"{path} has tensors of {listing('unknown type', unknown)}; known are {', '.join(ITEM_BYTES)}")
    tensors = {name: HeaderEntry(types[name], shapes[name], 8 + length + spans[name][0]) for name in header}
    _check_spans(tensors, spans, path, 8 + length, size)
    return Header(tensors, metadata)


def _check_spans(tensors: dict[str, HeaderEntry], spans: dict[str, tuple[int, int]], path: Path, start: int, size: int) -> None:
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: (item[1], item[0])):
        if begin != end or stop - begin != tensors[name].nbytes:
            raise damaged(path, f"the bytes of {name} do not fit its shape and its neighbours")
        end = stop
    if start + end != size:
        raise damaged(path, f"it has {size} bytes, its header describes {start + end}")


def _first_bytes(file: BinaryIO, path: Path) -> bytes:
    start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ModelError(f"{path} is a git-lfs pointer, wanted the weights themselves; run `git lfs pull` in its directory")
    return start


def read_archive(path: Path) -> dict[int, int] | None:
    """Where the entries of a file of ``torch.save`` begin, and their bytes; None where their bytes are not as they lie in memory.

    Raises:
        ModelError: the file is absent, truncated or corrupt.
    """
    with open_file(path) as file:
        start = _first_bytes(file, path)
        if not start.startswith(_ZIP):
            if not start.startswith(_PICKLE):
                raise damaged(path, "it is not a file of torch.save")
            return None
        try:
            archive = zipfile.ZipFile(file)
            entries = archive.infolist()
            orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")]
            begins = {entry.header_offset: _data_offset(file, entry.header_offset) for entry in entries}
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError):
            raise damaged(path, "it is no whole zip archive, as torch.save writes them") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise damaged(path, "its entries are compressed, which those of torch.save are not")
    if any(order != sys.byteorder.encode() for order in orders):
        return None
    return {begins[entry.header_offset]: entry.file_size for entry in entries}


def _data_offset(file: BinaryIO, header: int) -> int:
    file.seek(header)
    fixed = file.read(_LOCAL_HEADER)
    return header + _LOCAL_HEADER + int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")


def read_weights(directory: Path) -> Weights:
    """The headers of all safetensors of a model directory.

    Raises:
        ModelError: the directory, config.json or the weights are missing, truncated, corrupt or at odds with the index.
    """
    filenames, weight_map = weight_files(directory)
    headers = {filename: read_header(directory / filename) for filename in filenames}
    return Weights(headers, located(directory / INDEX_FILE, weight_map, {filename: header.tensors for filename, header in headers.items()}))


def check_weights(directory: Path) -> None:
    """What can be known of the weights of a model directory without torch.

    Raises:
        ModelError: as `read_weights`; of pickles, which tensors they hold is not known yet.
    """
    if not is_pickled(directory):
        read_weights(directory)
        return
    for filename in weight_files(directory)[0]:
        read_archive(directory / filename)


def is_pickled(directory: Path) -> bool:
    """Whether the weights of a model directory are in pickles alone: safetensors are preferred."""
    there = {name for name in (SINGLE_FILE, INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE) if (directory / name).is_file()}
    return bool(there) and there <= {PICKLE_FILE, PICKLE_INDEX_FILE}


def weight_paths(directory: Path) -> list[Path]:
    """The files with weights of a model directory, sorted, as far as their names tell."""
    return sorted(directory.glob("pytorch_model*.bin" if is_pickled(directory) else "*.safetensors"))


def weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the files with weights of a model directory, and the file of every tensor that an index tells, or nothing.

    Raises:
        ModelError: the directory, config.json, the index or a file is missing, or the index is corrupt.
    """
    _check_directory(directory)
    single, index = (PICKLE_FILE, directory / PICKLE_INDEX_FILE) if is_pickled(directory) else (SINGLE_FILE, directory / INDEX_FILE)
    if (directory / single).is_file():
        return [single], {}
    weight_map = _read_index(index)
    filenames = sorted(set(weight_map.values()))
    absent = [name for name in filenames if Path(name).name != name or not (directory / name).is_file()]
    if absent:
        raise ModelError(f"{index} names {listing('absent file', absent)}; download the model again")
    return filenames, weight_map


def located(index: Path, weight_map: Mapping[str, str], held: Mapping[str, Collection[str]]) -> dict[str, str]:
    """The file of every tensor, in file order. held: the tensors of each file.

    Raises:
        ModelError: the index names tensors that are not where it says.
    """
    wrong = [name for name, filename in weight_map.items() if name not in held[filename]]
    if wrong:
        raise ModelError(f"{index} names {listing('tensor', wrong)} absent from the files; download the model again")
    return {name: filename for filename, names in held.items() for name in names} | dict(weight_map)


def is_megatron(directory: Path) -> bool:
    """Whether a model directory holds its weights in Megatron's form rather than as safetensors."""
    return (directory / MCORE_FILE).is_file() and (directory / CONFIG_FILE).is_file() and megatron_weights(directory).is_dir()


def megatron_weights(directory: Path) -> Path:
    """The folder of the distributed checkpoint, as Megatron-LM finds it: ``release``, or ``iter_0000100`` of a training run."""
    word = (directory / MCORE_FILE).read_text(encoding="utf8", errors="replace").strip()
    return directory / (f"iter_{int(word):07d}" if word.isdecimal() else MCORE_WEIGHTS)


def is_megatron_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in Megatron's form."""
    return (directory / MCORE_FILE).is_file() and (directory / ADAPTER_CONFIG_FILE).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {' '.join(str(error).splitlines())}; download or copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, wanted a JSON object; download or copy it again")
    return content


def check_tokenizer(directory: Path) -> None:
    """Refuse a model directory in which there is nothing to make a tokenizer of.

    Raises:
        ModelError: there is no such file.
    """
    if not any((directory / name).is_file() for name in TOKENIZERS) and not any(directory.glob("*.tiktoken")):
        raise ModelError(f"{directory} has no tokenizer; wanted {' or '.join(TOKENIZERS)}, and tokenizer_config.json; download them too")


def _check_directory(directory: Path) -> None:
    try:
        entries = sorted(path.name for path in directory.iterdir())
    except NotADirectoryError:
        raise ModelError(f"model directory {directory} is a file; give the directory of a checkpoint") from None
    except FileNotFoundError:
        raise ModelError(f"model directory {directory} does not exist; give the directory of a checkpoint") from None
    except OSError as error:
        raise ModelError(f"model directory {directory} cannot be read: {error.strerror}; check its permissions") from None
    if not entries:
        raise ModelError(f"model directory {directory} is empty; wanted {CONFIG_FILE} and {SINGLE_FILE}")
    if CONFIG_FILE not in entries:
        hint = "give it with --adapters, and its base" if ADAPTER_CONFIG_FILE in entries else "give the directory of a Hugging Face checkpoint"
        raise ModelError(f"model directory {directory} has no {CONFIG_FILE}; {hint}")
    if not {SINGLE_FILE, INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE}.isdisjoint(entries):
        return
    pickles = [name for name in entries if name.endswith((".bin", ".pt", ".pth"))]
    others = [name for name in entries if name.endswith(".safetensors")]
    if others:
        raise ModelError(f"{directory} has {listing('safetensors file', others)} but neither {SINGLE_FILE} nor {INDEX_FILE}; download the index too")
    if pickles:
        raise ModelError(
            f"{directory} has {listing('pickle', pickles)} but no {SINGLE_FILE}, {PICKLE_FILE} or index of them; download the weights in "
            "the form that transformers reads"
        )
    raise ModelError(f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}; download the weights too (pickles are not fetched from a hub)")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, OSError):
        weight_map = None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(value, str) for value in weight_map.values()):
        raise ModelError(f"{path} is not the index of a checkpoint (no weight_map); download it again")
    return weight_map


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT adapter; its weights are there as well, whole.

    Raises:
        ModelError: not an adapter directory, or its files are damaged.
    """
    config_file, weights_file = directory / ADAPTER_CONFIG_FILE, adapter_weights(directory)
    if not directory.is_dir():
        raise ModelError(f"adapter directory {directory} does not exist; give a directory with {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE}")
    if not config_file.is_file():
        raise ModelError(f"{directory} has no {ADAPTER_CONFIG_FILE}; give the directory of a PEFT adapter")
    if not weights_file.is_file():
        raise ModelError(f"{directory} has no {ADAPTER_FILE} and no {ADAPTER_PICKLE}; copy it again")
    try:
        config = json.loads(config_file.read_bytes())
        float(config["lora_alpha"]) / int(config["r"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise ModelError(f"{config_file} is not the config of a LoRA adapter (peft_type LORA, r, lora_alpha); copy it again") from None
    (read_archive if weights_file.name == ADAPTER_PICKLE else read_header)(weights_file)
    return dict(config)


def adapter_weights(directory: Path) -> Path:
    """The weights of a PEFT adapter: its safetensors, or the pickle where only that is there."""
    pickled = not (directory / ADAPTER_FILE).is_file() and (directory / ADAPTER_PICKLE).is_file()
    return directory / (ADAPTER_PICKLE if pickled else ADAPTER_FILE)
