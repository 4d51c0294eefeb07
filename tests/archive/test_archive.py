"""Reading checkpoints: the bytes that are asked for, and nothing that a stranger's file claims."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinktrack import ArchiveError, Probe, Run, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.huggingface import load
from sinktrack.archive.source import open as open_checkpoint
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.safetensors_file import SafetensorsSlice, parse_header, read_header
from sinktrack.archive.storage.slices import DTYPES
from tests.helpers import models
from tests.helpers.archives import place, steps

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MoE, sharded."""
    path = tmp_path_factory.mktemp("archive") / "checkpoint-7"
    models.qwen3_moe().save_pretrained(path, max_shard_size="20KB")
    return path


def of_every_dtype(path: Path) -> dict[str, Tensor]:
    bits = torch.randint(0, 2, (4, 3, 5, 8), dtype=torch.uint8)
    tensors = {name: bits.to(dtype).contiguous() for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(3, 0, 2)}
    save_file(tensors, path / WEIGHTS)
    return tensors


def test_every_tensor_is_read_as_safetensors_reads_it(saved: Path) -> None:
    (checkpoint,) = discover(saved)
    source = open_checkpoint(checkpoint)
    seen = 0
    for file in saved.glob("*.safetensors"):
        with safe_open(file, framework="pt") as truth:
            for name in truth.keys():  # noqa: SIM118
                found = source.slice(name)
                assert found.get_shape() == truth.get_slice(name).get_shape()
                assert found.get_dtype() == truth.get_slice(name).get_dtype()
                assert torch.equal(found[...], truth.get_tensor(name))
                seen += 1
    assert seen == len(source.names()) > 60


def test_every_dtype(tmp_path: Path) -> None:
    tensors = of_every_dtype(tmp_path)
    files = Files(tmp_path)
    for name, found_at in read_header(files, WEIGHTS).items():
        found = SafetensorsSlice(files, WEIGHTS, found_at)[...]
        assert found.dtype == tensors[name].dtype and found.shape == tensors[name].shape
        as_bytes = (t.reshape(-1).view(torch.uint8) for t in (found, tensors[name]))
        assert torch.equal(*as_bytes)


BOUNDS = st.one_of(st.none(), st.integers(-9, 9))
PART = st.one_of(
    st.integers(-3, 2),
    st.builds(slice, BOUNDS, BOUNDS, st.sampled_from([None, 1, 2, 3])),
    st.just(...),
)


@settings(max_examples=300, deadline=None)
@given(index=st.one_of(PART, st.lists(PART, max_size=4).map(tuple)))
def test_any_index_means_what_it_means_to_torch(index: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "indexed"
    tensor = torch.arange(4 * 3 * 5, dtype=torch.float32).reshape(4, 3, 5)
    if not path.exists():
        path.mkdir()
        save_file({"before": torch.zeros(3), "t": tensor, "z": torch.ones(9)}, path / WEIGHTS)
    files = Files(path)
    found = SafetensorsSlice(files, WEIGHTS, read_header(files, WEIGHTS)["t"])
    try:
        wanted = tensor[index]
    except IndexError:
        with pytest.raises(IndexError):
            found[index]
    else:
        assert torch.equal(found[index], wanted)


def test_only_the_bytes_asked_for_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.rand(100), "experts": torch.rand(16, 8, 4)}, tmp_path / WEIGHTS)
    files = Files(tmp_path)
    experts = SafetensorsSlice(files, WEIGHTS, read_header(files, WEIGHTS)["experts"])
    row = 8 * 4 * 4
    for index, cost in (
        ((3,), row), ((slice(2, 5),), 3 * row), ((3, slice(1, 3)), row // 4), ((-1, 7), row // 8),
        ((slice(0, 0),), 0), ((slice(None), 2), 16 * row), ((...,), 16 * row),
    ):  # fmt: skip
        before = files.bytes_read
        experts[index]
        assert files.bytes_read - before == cost, index


def test_a_source_is_shared_by_threads_and_sent_to_processes(saved: Path) -> None:
    (checkpoint,) = discover(saved)
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint
    source = open_checkpoint(pickle.loads(pickle.dumps(checkpoint)))
    names = source.names() * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: source.slice(name)[...], names))
    plain = open_checkpoint(checkpoint)
    assert all(torch.equal(a, plain.slice(n)[...]) for a, n in zip(found, names, strict=True))
    size = sum(tensor.nbytes for tensor in found)
    assert size < source.files.bytes_read < size + 60_000  # headers and config.json


def test_a_whole_model_equals_the_one_that_was_saved(saved: Path) -> None:
    (checkpoint,) = discover(saved)
    model, truth = load(checkpoint), models.qwen3_moe()
    for (name, found), wanted in zip(
        model.state_dict().items(), truth.state_dict().values(), strict=True
    ):
        assert torch.equal(found, wanted), name


def file_of(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: Any = 0, stop: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES = {
    "nothing": (b"", "0 bytes"),
    "less than a length": (b"\1\0", "2 bytes"),
    "a length and no header": (struct.pack("<Q", 9), "a header of 9 bytes in a file of 8"),
    "a length beyond any file": (file_of({}, length=2**64 - 1), "a header of 18446744073709551615"),
    "not JSON": (file_of(b'{"a'), "header: Unterminated"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "header: 'utf-8' codec"),
    "a list": (file_of([1]), "no header in JSON"),
    "deep": (file_of(b'{"a":' + b"[" * 100_000), "nested too deep"),
    "beyond the file": (file_of({"a": entry(0, 8), "b": entry(8, 16)}), "16 bytes, 8 bytes of"),
    "short of the file": (file_of({"a": entry(0, 4, [1])}), "tensors of 4 bytes, 8 bytes of data"),
    "overlapping": (
        file_of({"a": entry(0, 8), "b": entry(0, 8)}),
        "begins at byte 0 .*expected 8",
    ),
    "a hole": (file_of({"a": entry(4, 8, [1])}), "begins at byte 4 of the data, expected 0"),
    "backwards": (file_of({"a": entry(8, 0)}), "has -8 bytes"),
    "negative": (file_of({"a": entry(-8, 0)}), "has offsets"),
    "a fraction": (file_of({"a": entry(0.0, 8)}), "has offsets"),
    "a truth": (file_of({"a": entry(False, 8)}), "has offsets"),
    "three offsets": (file_of({"a": entry() | {"data_offsets": [0, 8, 9]}}), "has offsets"),
    "a huge count": (file_of({"a": entry(0, 8, [2**62, 2**62])}), "has 8 bytes for F32"),
    "a count that wraps": (file_of({"a": entry(0, 8, [2**62 + 2])}), "has 8 bytes for F32"),
    "a negative count": (file_of({"a": entry(0, 8, [-2])}), "has shape"),
    "a million counts": (file_of({"a": entry(0, 8, [1] * 10**6)}), "has shape"),
    "a count of 5,000 digits": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "header: Exceeds"),
    "another dtype": (file_of({"a": entry(dtype="F31")}), "dtype 'F31', which is not known"),
    "a dtype that is a list": (file_of({"a": entry(dtype=["F32"])}), "which is not known"),
    "a dtype of another size": (file_of({"a": entry(dtype="F16")}), "has 8 bytes for F16"),
    "half an entry": (file_of({"a": {"dtype": "F32"}}), "is not described by"),
    "no entry": (file_of({"a": None}), "is not described by"),
    "a name twice": (file_of(b'{"a": 1, "a": 2}'), "a name stands there twice"),
    "notes that are none": (file_of({"__metadata__": {"a": 1}}), "__metadata__ is not text"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    data, reason = LIES[name]
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(ArchiveError, match=f"model.safetensors is truncated or .*{reason}"):
        read_header(Files(tmp_path), WEIGHTS)


def test_a_header_of_a_hundred_megabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 100 * 10**6 + 1))
        file.truncate(200 * 10**6)
    files = Files(tmp_path)
    with pytest.raises(ArchiveError, match="a header of 100000001 bytes"):
        read_header(files, WEIGHTS)
    assert files.bytes_read == 8


def test_a_header_of_too_many_values_is_refused_unparsed(tmp_path: Path) -> None:
    text = b'{"a":[' + b"[]," * 10**7 + b"[]]}"
    (tmp_path / WEIGHTS).write_bytes(file_of(text))
    with pytest.raises(ArchiveError, match="more than 4000000 values"):
        read_header(Files(tmp_path), WEIGHTS)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "x\0y"]
)
def test_an_index_that_points_elsewhere_is_refused(saved: Path, shard: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    (checkpoint,) = discover(tmp_path)
    with pytest.raises(ArchiveError, match=r"index.json names .* not a file of its directory"):
        open_checkpoint(checkpoint)


def test_an_index_that_names_a_tensor_its_file_lacks(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))
    (checkpoint,) = discover(tmp_path)
    with pytest.raises(ArchiveError, match="one.safetensors holds no tensor 'b'"):
        load(checkpoint)


@pytest.mark.parametrize("link", ["config.json", WEIGHTS])
def test_links_that_leave_the_archive_are_not_followed(
    link: str, saved: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    models.mixtral().save_pretrained(outside)
    inside = tmp_path / "archive" / "checkpoint-1"
    models.mixtral().save_pretrained(inside)
    (inside / link).unlink()
    (inside / link).symlink_to(outside / link)
    (checkpoint,) = discover(tmp_path / "archive")
    with pytest.raises(ArchiveError, match=f"{link} leads out of .*archive, to .*outside"):
        load(checkpoint)
    (inside / link).unlink()
    (tmp_path / "archive" / "blob").write_bytes((outside / link).read_bytes())
    (inside / link).symlink_to("../blob")
    load(checkpoint)


def test_a_directory_that_is_a_link_out_of_the_archive(tmp_path: Path) -> None:
    models.mixtral().save_pretrained(tmp_path / "outside")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "checkpoint-1").symlink_to(tmp_path / "outside")
    with pytest.raises(ArchiveError, match="checkpoint-1/.* leads out of"):
        load(discover(tmp_path / "archive")[0])
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    assert load(discover(tmp_path / "link")[0])  # what the user names is meant


def test_pipes_and_devices_do_not_hang_a_scan(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(ArchiveError, match="not an ordinary file"):
        load(discover(tmp_path)[0])


def test_code_beside_a_checkpoint_is_not_run(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    save_file({"a": torch.zeros(1)}, model / WEIGHTS)
    with pytest.raises(ArchiveError, match="does not know how to build model_type 'strange'"):
        load(discover(model)[0])
    assert not ran.exists()


def test_steps_and_tokens_are_read_from_names(tmp_path: Path) -> None:
    place(
        tmp_path, "step1000-tokens4B", "step20-tokens83M", "checkpoint-7", "step-9", "global_step3",
        "step5000-unsharded", "checkpoint_12", "latest", "step", "notes-step5",
    )  # fmt: skip
    assert steps(tmp_path) == [
        ("global_step3", 3, None), ("checkpoint-7", 7, None), ("step-9", 9, None),
        ("step20-tokens83M", 20, 83_000_000), ("step1000-tokens4B", 1000, 4_000_000_000),
        ("step5000-unsharded", 5000, None),
    ]  # fmt: skip


def test_the_trainers_state_gives_tokens_and_what_it_lacks_is_null(tmp_path: Path) -> None:
    place(tmp_path, "checkpoint-7", "checkpoint-8", "checkpoint-9")
    state = {"global_step": 70, "num_input_tokens_seen": 5_000}
    (tmp_path / "checkpoint-7/trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-8/trainer_state.json").write_text('{"num_input_tokens_seen": true}')
    (tmp_path / "checkpoint-9/trainer_state.json").write_text("{")
    assert [row[1:] for row in steps(tmp_path)] == [(7, 5_000), (8, None), (9, None)]


def test_stages_that_begin_anew_must_be_chosen(tmp_path: Path) -> None:
    place(
        tmp_path, "stage1-step1000-tokens5B", "stage1-step2000-tokens9B",
        "stage2-ingredient1-step1000-tokens5B", "stage2-ingredient2-step1000-tokens5B",
    )  # fmt: skip
    with pytest.raises(ArchiveError, match="several stages .*steps begin anew") as raised:
        discover(tmp_path)
    pattern = str(raised.value).split("--pattern '")[1].rstrip("'")
    assert steps(tmp_path, pattern) == [
        ("stage1-step1000-tokens5B", 1000, 5_000_000_000),
        ("stage1-step2000-tokens9B", 2000, 9_000_000_000),
    ]


def test_a_pattern_finds_other_names_at_other_depths(tmp_path: Path) -> None:
    place(tmp_path, "global_step_5/actor/huggingface", "global_step_6/actor/huggingface", "step7")
    assert steps(tmp_path, r"global_step_(?P<step>\d+)/actor/huggingface") == [
        ("global_step_5/actor/huggingface", 5, None),
        ("global_step_6/actor/huggingface", 6, None),
    ]
    place(tmp_path / "b", "run-3k", "run-40k")
    assert [row[2] for row in steps(tmp_path / "b", r"run-(?P<tokens>(?P<step>\d+))k")] == [3, 40]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        ("x", "no group named step"),
        ("(?P<step>x)", "no checkpoint"),
    ],
)
def test_a_pattern_that_will_not_do(pattern: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=message):
        discover(place(tmp_path, "step1"), pattern)


def test_two_of_one_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="step1 and .*step1-hf are both of step 1; choose"):
        discover(place(tmp_path, "step1", "step1-hf"))


def test_a_hub_cache_with_revisions(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    commits = {"main": "c" * 40, "step0": "a" * 40, "step512-tokens1B": "b" * 40}
    for name, commit in commits.items():
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        saved = tmp_path / name
        models.mixtral().save_pretrained(saved)
        for file in saved.iterdir():  # as the hub's own client lays a cache out
            blob = repository / "blobs" / f"{commit}{file.name}"
            blob.parent.mkdir(exist_ok=True)
            file.rename(blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    assert steps(repository) == [("step0", 0, None), ("step512-tokens1B", 512, 10**9)]
    assert load(discover(repository)[0])
    assert load(discover(repository / "snapshots" / commits["main"])[0])
    for name in ("step0", "step512-tokens1B"):
        (repository / "refs" / name).write_text("../../../../etc")
    assert [str(c.reason).split("; ")[0] for c in discover(repository)] == [
        f"{repository}/refs/{name} names no commit" for name in ("step0", "step512-tokens1B")
    ]


def test_a_pickle_is_read_by_weights_only_loading(tmp_path: Path) -> None:
    models.mixtral().save_pretrained(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / WEIGHTS).unlink()
    model = models.mixtral()
    torch.save(model.state_dict(), tmp_path / "checkpoint-3/pytorch_model.bin")
    (checkpoint,) = discover(tmp_path)
    assert checkpoint.format == "pytorch_files"
    for name, found in load(checkpoint).state_dict().items():
        assert torch.equal(found, model.state_dict()[name])


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def compressed(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**8)


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda p: torch.save({"a": Malice(p.parent / "ran")}, p), "more than tensors"),
    "old code": (lambda p: p.write_bytes(pickle.dumps(Malice(p.parent / "ran"))), "more than ten"),
    "a model": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "more than tensors"),
    "a number": (lambda p: torch.save({"a": 1}, p), "does not hold tensors by name"),
    "a list": (lambda p: torch.save([torch.zeros(1)], p), "does not hold tensors by name"),
    "a bloated view": (
        lambda p: torch.save({"a": torch.zeros(1).expand(2**40)}, p),
        "does not hold tensors by",
    ),
    "a sparse one": (lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p), "does not hold ten"),
    "nothing": (lambda p: p.write_bytes(b""), "truncated or damaged"),
    "noise": (lambda p: p.write_bytes(b"PK\3\4" + bytes(range(256))), "damaged"),
    "a bomb": (compressed, "damaged"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_more_than_tensors_is_refused(
    name: str, saved: Path, tmp_path: Path
) -> None:
    make, reason = PICKLES[name]
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    make(tmp_path / "pytorch_model.bin")
    with pytest.raises(ArchiveError, match=f"pytorch_model.bin .*{reason}"):
        load(discover(tmp_path)[0])
    assert not (tmp_path / "ran").exists()


NUMBER = st.sampled_from([0, 1, 2, 8, 2**31, 2**63 - 1, 2**63, 2**64, -1, 0.5, True, None, "8"])
HEADER = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPES, "F4", "", 1]),
            "shape": st.lists(NUMBER, max_size=3),
            "data_offsets": st.lists(NUMBER, min_size=1, max_size=3),
        }
    )
    | NUMBER,
    max_size=3,
)


@settings(max_examples=500, deadline=None)
@given(
    text=st.one_of(HEADER.map(lambda header: json.dumps(header).encode()), st.binary(max_size=60)),
    room=st.sampled_from([0, 1, 2, 8, 16]),
)
def test_whatever_a_header_says_it_is_refused_or_lies_in_the_file(text: bytes, room: int) -> None:
    try:
        places = parse_header(text, room)
    except (ValueError, ArchiveError):
        return
    sizes = [math.prod(p.shape) * DTYPES[p.dtype].itemsize for p in places.values()]
    assert sum(sizes) == room
    for at, size in zip(places.values(), sizes, strict=True):
        assert 8 + len(text) <= at.start <= at.start + size <= 8 + len(text) + room


def test_a_directory_of_many_files_is_read_one_entry_at_a_time(tmp_path: Path) -> None:
    place(tmp_path, "checkpoint-1")
    for number in range(5000):
        (tmp_path / f"shard-{number}").touch()
    tracemalloc.start()
    assert steps(tmp_path) == [("checkpoint-1", 1, None)]
    assert tracemalloc.get_traced_memory()[1] < 2**18
    tracemalloc.stop()


CONFIGS = {
    "num_hidden_layers": (10**9, "config.json has 1000000000 blocks, of which"),
    "hidden_size": (2**40, "config.json has hidden_size 1099511627776"),
    "num_attention_heads": (-1, "num_attention_heads -1|cannot be|does not know"),
    "num_experts_per_tok": (255, "cannot be measured: RuntimeError"),
    "rope_parameters": ({"rope_type": "default", "rope_theta": {}}, "cannot be measured: TypeErr"),
    "vocab_size": ("many", "model_type 'qwen3_moe'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_lies_fails_one_checkpoint(name: str, saved: Path, tmp_path: Path) -> None:
    value, reason = CONFIGS[name]
    for step in (1, 2):
        shutil.copytree(saved, tmp_path / "archive" / f"checkpoint-{step}")
    path = tmp_path / "archive/checkpoint-1/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    probe = Probe.random(models.VOCABULARY, sequences=2, length=6)
    with pytest.raises(ArchiveError, match=f"1 checkpoints failed\ncheckpoint-1: .*({reason})"):
        list(scan(tmp_path / "archive", probe=probe, run=tmp_path / "run"))
    assert Run.read(tmp_path / "run").steps == [2]


@pytest.mark.parametrize("read", ["a block at a time", "whole"])
def test_a_weight_that_claims_gigabytes_is_refused_unread(read: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1"
    models.llama().save_pretrained(path)
    tensors = load_file(path / WEIGHTS)
    name, many = "model.layers.0.self_attn.q_proj.weight", 2**40
    del tensors[name]
    (path / WEIGHTS).unlink()
    save_file(tensors, path / "rest.safetensors")
    with (path / "one.safetensors").open("wb") as file:
        file.write(file_of({name: entry(0, 4 * many, [many])}, b""))
        file.truncate(file.tell() + 4 * many)
    weight_map = dict.fromkeys(tensors, "rest.safetensors") | {name: "one.safetensors"}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (checkpoint,) = discover(tmp_path)
    probe = Probe.random(models.VOCABULARY, sequences=2, length=6)
    with pytest.raises(ArchiveError, match=r"q_proj.weight has shape \[1099511627776\]"):
        load(checkpoint) if read == "whole" else list(scan(path, probe=probe, run=tmp_path / "run"))
