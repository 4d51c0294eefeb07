"""Feed the readers of checkpoints with damaged files, and report what they do not refuse politely.

A mutated file must either be read, in bounded memory and time, or be refused with an ArchiveError;
what is read must lie inside of the file and be what the header says.

    python scripts/fuzz_readers.py --inputs 1000000
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import re
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from sinktrack.archive.discover import discover
from sinktrack.archive.layouts.indexed import weight_map
from sinktrack.archive.layouts.safetensors_files import INDEX
from sinktrack.archive.storage import dcp, pickles
from sinktrack.archive.storage.files import Files, parse_json
from sinktrack.archive.storage.mapped_torch_file import load_tensors
from sinktrack.archive.storage.safetensors_file import SafetensorsSlice, parse_header, read_header
from sinktrack.archive.storage.slices import DTYPES
from sinktrack.errors import ArchiveError

NUMBERS = (0, 1, 2, 4, 7, 8, 16, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -1, -8)
WORDS = (*DTYPES, "F4", "", "\0", "../x.safetensors", "__metadata__", "a" * 300, "\ud800", None)


def sound_header(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A header that is true, and the bytes of data it describes."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.3 else {}
    end = 0
    for index in range(rng.randrange(5)):
        name = rng.choice(tuple(DTYPES))
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        size = DTYPES[name].itemsize
        for count in shape:
            size *= count
        found[f"t{index}"] = {"dtype": name, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return found, end


def any_value(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(WORDS)
    if kind == 4:
        return rng.choice((True, False, None, 0.5, 1e308, float("nan"), float("inf")))
    if kind < 7:
        return [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(WORDS)): any_value(rng, depth - 1) for _ in range(rng.randrange(3))}


def change(rng: random.Random, value: Any) -> Any:
    """The value with one place of it exchanged."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        move = rng.random()
        if move < 0.1:
            del changed[key]
        elif move < 0.2:
            changed[str(rng.choice(WORDS))] = changed.pop(key)
        else:
            changed[key] = change(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], change(rng, value[index]), *value[index + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -4, -1, 1, 4, 8))
    return any_value(rng)


def scramble(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if not changed:
            break
        place = rng.randrange(len(changed))
        move = rng.randrange(4)
        if move == 0:
            changed[place] = rng.randrange(256)
        elif move == 1:
            del changed[place : place + rng.randrange(1, 9)]
        elif move == 2:
            changed[place:place] = changed[place : place + rng.randrange(1, 9)]
        else:
            del changed[place:]
    return bytes(changed)


def header_case(rng: random.Random, _: Path) -> bool:
    """A header in memory; true where it was believed."""
    header, room = sound_header(rng)
    if rng.random() < 0.7:
        for _round in range(rng.randrange(1, 3)):
            changed = change(rng, header)
            header = changed if isinstance(changed, dict) or rng.random() < 0.1 else header
    text = json.dumps(header).encode(errors="surrogatepass")
    if rng.random() < 0.4:
        text = scramble(rng, text)
    if rng.random() < 0.1:
        room += rng.choice((-1, 1, 8))
    try:
        places = parse_header(text, room)
    except ValueError:
        return False
    for place in places.values():
        size = DTYPES[place.dtype].itemsize
        for count in place.shape:
            size *= count
        start = place.start - 8 - len(text)
        assert 0 <= start <= start + size <= room, (text, room)
    return True


def file_case(rng: random.Random, directory: Path) -> bool:
    """A whole file on disk, its tensors read."""
    header, room = sound_header(rng)
    if rng.random() < 0.3:
        changed = change(rng, header)
        header = changed if isinstance(changed, dict) else header
    text = json.dumps(header).encode(errors="surrogatepass")
    length = len(text) if rng.random() < 0.9 else abs(rng.choice(NUMBERS)) % 2**64
    data = struct.pack("<Q", length) + text + rng.randbytes(room)
    if rng.random() < 0.5:
        data = scramble(rng, data)
    (directory / "model.safetensors").write_bytes(data)
    files = Files(directory)
    try:
        places = read_header(files, "model.safetensors")
    except ArchiveError:
        return False
    for place in places.values():
        tensor = SafetensorsSlice(files, "model.safetensors", place)[...]
        assert list(tensor.shape) == list(place.shape) and tensor.dtype == DTYPES[place.dtype]
    return True


def index_case(rng: random.Random, directory: Path) -> bool:
    """A sharded checkpoint's index."""
    index: Any = {"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors"}}
    index = change(rng, index)
    text = json.dumps(index).encode(errors="surrogatepass")
    (directory / INDEX).write_bytes(scramble(rng, text) if rng.random() < 0.3 else text)
    try:
        found = weight_map(Files(directory), INDEX, ".safetensors")
    except ArchiveError:
        return False
    assert all("/" not in shard and shard not in ("..", ".") for shard in found.values()), found
    return True


def state_case(rng: random.Random, directory: Path) -> bool:
    """A trainer's state beside weights, read when checkpoints are looked for."""
    state: Any = {"global_step": 5, "num_input_tokens_seen": 100, "log_history": [{"loss": 1.0}]}
    text = json.dumps(change(rng, state)).encode(errors="surrogatepass")
    (directory / "trainer_state.json").write_bytes(
        scramble(rng, text) if rng.random() < 0.5 else text
    )
    (checkpoint,) = discover(directory)
    assert checkpoint.step >= 0 and (checkpoint.tokens is None or checkpoint.tokens > 0)
    return True


def json_case(rng: random.Random, _: Path) -> bool:
    """Any text as JSON."""
    text = scramble(rng, json.dumps(any_value(rng, 5)).encode(errors="surrogatepass"))
    if rng.random() < 0.01:
        text = rng.choice((b"[", b'{"a":')) * rng.randrange(200_000)
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def pickle_case(rng: random.Random, directory: Path) -> bool:
    """An old file of weights; opened, not computed with."""
    tensors = {f"t{i}": torch.rand(rng.randrange(4), 3) for i in range(rng.randrange(1, 3))}
    path = directory / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    data = path.read_bytes()
    if rng.random() < 0.5:
        head = rng.choice((200, 600, len(data)))
        data = scramble(rng, data[:head]) + data[head:]
    else:
        data = scramble(rng, data)
    path.write_bytes(data)
    try:
        found = load_tensors(Files(directory), path.name, str(path))
    except ArchiveError:
        return False
    for tensor in found.values():
        tensor.sum()
    return True


@cache
def sound_dcp() -> dict[str, bytes]:
    """The files of a small distributed checkpoint, and arguments as Megatron saves them."""
    with tempfile.TemporaryDirectory() as directory:
        tensors = {"a": torch.rand(3, 4), "b": torch.rand(2, 3, 5).bfloat16()}
        torch_save(tensors, checkpoint_id=directory, no_dist=True)
        files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
    arguments = argparse.Namespace(hidden_size=32, params_dtype=torch.bfloat16, moe=[0, 1])
    return files | {"args": pickle.dumps({"args": arguments, "iteration": 5}, 2)}


def dcp_case(rng: random.Random, _: Path) -> bool:
    """A distributed checkpoint: what is where, its chunks, the arguments beside it."""
    files = dict(sound_dcp())
    name = rng.choice(tuple(files))
    files[name] = scramble(rng, files[name])
    try:
        arguments = pickles.load(files["args"], {"argparse.Namespace": None} | pickles.dtypes(), "")
        assert name != "args" or not isinstance(arguments, argparse.Namespace)
        found = dcp.read_metadata(files[".metadata"], "")
        for stored in found.values():
            lead = (0,) if len(stored.shape) > 2 else ()
            tensor = dcp.read(
                stored, lambda file, start, size: files.get(file, b"")[start:][:size], lead
            )
            assert tuple(tensor.shape) == stored.shape[len(lead) :]
    except ArchiveError:
        return False
    return True


CASES: dict[str, tuple[Callable[[random.Random, Path], bool], int]] = {
    "header": (header_case, 70), "file": (file_case, 6), "index": (index_case, 5),
    "state": (state_case, 3), "json": (json_case, 6), "pickle": (pickle_case, 4),
    "dcp": (dcp_case, 6),
}  # fmt: skip
"""How each input is made and judged, and its share."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = [name for name, (_, share) in CASES.items() for _ in range(share)]
    tried, believed, found = Counter[str](), Counter[str](), Counter[str]()
    slowest, began = 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "model.safetensors").write_bytes(b"")
        for number in range(given.inputs):
            seed = f"{given.seed}-{number}"
            rng = random.Random(seed)
            name = rng.choice(names)
            start = time.perf_counter()
            try:
                believed[name] += CASES[name][0](rng, Path(directory))
            except Exception as error:
                kind = f"{name}: {type(error).__name__}: {re.sub(r'[0-9]+', 'N', str(error))[:80]}"
                found[kind] += 1
                if found[kind] == 1:
                    print(f"seed {seed}", kind, file=sys.stderr)
                    traceback.print_exc()
            tried[name] += 1
            slowest = max(slowest, time.perf_counter() - start)
    for name, count in tried.items():
        print(f"{name:8} {count:9,} inputs, {believed[name]:9,} read, the others refused")
    print(f"{time.perf_counter() - began:.0f} s, the slowest input {slowest:.2f} s")
    for kind, count in found.items():
        print(f"NOT REFUSED {count:7,} {kind}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
