"""OLMo-core's checkpoints against the model whose weights they hold."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Olmo2Config, Olmo3Config

from sinktrack import ArchiveError, Probe, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import lack
from sinktrack.archive.huggingface import load
from sinktrack.archive.layouts import olmo_core_config
from sinktrack.archive.source import Source
from sinktrack.archive.source import open as open_source
from sinktrack.archive.storage.files import Files
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers import olmo_core_checkpoints as olmo
from tests.helpers.olmo_core_checkpoints import flex_olmo
from tests.helpers.reference import check_slices

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12)
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]


def olmo2(**changes: Any) -> Any:
    return models.build(Olmo2Config(**models.small() | changes))


def olmo3(base: float = 5e5) -> Any:
    shared = models.small(sliding_window=5, layer_types=WINDOWS)
    rope = {"rope_type": "default", "rope_theta": base}
    config = Olmo3Config(**shared, rope_parameters={kind: dict(rope) for kind in set(WINDOWS)})
    if "rope_theta" in config.rope_parameters:  # transformers 5.12 has one for all blocks
        config = Olmo3Config(**shared, rope_parameters=rope)
    return models.build(config)


FAMILIES: dict[str, Callable[..., Any]] = {
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmo3 of another base": lambda: olmo3(12345.0),
    "flex_olmo": flex_olmo,
    "flex_olmo with normalized scores": lambda: flex_olmo(norm_topk_prob=True),
}


def saved(model: Any, archive: Path) -> Path:
    olmo.save(olmo.weights(model), olmo.experiment(model), archive / "step7")
    return archive


def source(archive: Path, **options: Any) -> Source:
    (checkpoint,) = discover(archive, **options)
    assert (checkpoint.format, checkpoint.step, checkpoint.name) == ("olmo_core", 7, "step7")
    return open_source(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_as_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    archive = saved(model, tmp_path / "archive")
    (record,) = scan(archive, probe=PROBE, run=tmp_path / "run")
    live = to_json(measure(model, PROBE).to_record(7, "step7", record["versions"]))
    assert record | {"seconds": 0} == live | {"seconds": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_given_by_hand(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    olmo.save(olmo.weights(model), None, tmp_path / "archive" / "step7")
    with pytest.raises(ArchiveError, match=r"no config.json that .*--hf-config"):
        source(tmp_path / "archive")
    model.config.save_pretrained(tmp_path / "hf")
    found = load(discover(tmp_path / "archive", hf_config=tmp_path / "hf")[0])
    weights = found.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert source(saved(model, tmp_path / "both"), hf_config=tmp_path / "hf").names()


def test_a_configuration_that_contradicts_the_experiment(tmp_path: Path) -> None:
    model = FAMILIES["olmo2"]()
    archive = saved(model, tmp_path / "archive")
    for changes, says in (
        ({"rms_norm_eps": 0.5}, "rms_norm_eps is .* there, 0.5 in yours"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_parameters is"),
    ):
        other = copy.deepcopy(model.config)
        for name, value in changes.items():
            setattr(other, name, value)
        other.save_pretrained(tmp_path / "hf")
        with pytest.raises(ArchiveError, match=says):
            source(archive, hf_config=tmp_path / "hf")


@pytest.mark.parametrize("family", FAMILIES)
def test_slices(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    found = source(saved(model, tmp_path / "archive"))
    model.save_pretrained(tmp_path / "plain")
    plain = open_source(discover(tmp_path / "plain")[0])
    check_slices(found, plain)


def test_steps_of_an_archive(tmp_path: Path) -> None:
    """One whose weights are still being written has no ``.metadata`` yet."""
    archive = saved(olmo2(), tmp_path)
    for step in (900, 10000, 11000):
        shutil.copytree(archive / "step7", archive / f"step{step}")
    (archive / "step11000" / "model_and_optim" / ".metadata").unlink()
    (archive / "step11000" / "config.json").unlink()
    *whole, last = discover(archive)
    assert [checkpoint.step for checkpoint in whole] == [7, 900, 10000]
    assert not any(map(lack, whole))
    assert last.step == 11000 and "model_and_optim/) without .metadata" in str(last.reason)


def changed(model: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *above, name = path.split(".")
    part = model
    for step in above:
        part = part.setdefault(step, {})
    part[name] = value
    return model


TOLD = olmo.experiment(olmo3())
MIXER, MOE = "block.sequence_mixer", "block.feed_forward_moe"


@pytest.mark.parametrize(
    ("family", "path", "value", "message"),
    [
        ("olmo2", "n_layers", 5, "has no blocks.4.attention_norm.weight"),
        ("olmo2", "n_layers", 3, "holds blocks.3.attention.k_norm.weight, and 10 more"),
        ("olmo2", "n_layers", 2**40, "n_layers=1099511627776"),
        ("olmo2", "vocab_size", 64, "embeddings.weight has shape"),
        ("olmo2", "d_model", "32", "d_model='32'"),
        ("olmo2", "block.name", "default", "block.name='default', which is not known"),
        ("olmo2", "name", "moe", "a 'moe' model of 'reordered_norm' blocks"),
        ("olmo2", "name", "normalized", "name='normalized'"),
        ("olmo2", "block_overrides.0.name", "default", "block_overrides.0.name='default'"),
        ("olmo2", "embed_scale", 2.0, "embed_scale=2.0"),
        ("olmo2", f"{MIXER}.rope.scaling.factor", 8, "rope.scaling.factor=8"),
        ("olmo2", f"{MIXER}.rope", None, "rope.theta=None"),
        ("olmo2", f"{MIXER}.clip_qkv", 8.0, "clip_qkv=8.0"),
        ("olmo2", f"{MIXER}.bias", True, "attention.bias=True"),
        ("olmo2", f"{MIXER}.use_head_qk_norm", True, "use_head_qk_norm=True"),
        ("olmo2", f"{MIXER}.attention_sinks", True, "attention_sinks=True"),
        ("olmo2", f"{MIXER}.gate", {"granularity": "headwise"}, "gate.granularity='headwise'"),
        ("olmo2", f"{MIXER}.type", "gated_delta_net", "type='gated_delta_net'"),
        ("olmo2", f"{MIXER}.qk_norm", None, "qk_norm.eps=None"),
        ("olmo2", f"{MIXER}.n_kv_heads", 4, "w_k.weight has shape"),
        ("olmo2", "block.feed_forward.activation", "gelu", "activation='gelu'"),
        ("olmo2", "lm_head.layer_norm", {"name": "rms", "eps": 1e-3}, "epsilons"),
        ("olmo3", f"{MIXER}.sliding_window.pattern", [4, 5], "one width of windows"),
        ("olmo3", f"{MIXER}.sliding_window.pattern", "all", "pattern='all'"),
        ("olmo3", f"{MIXER}.sliding_window.pattern", [], "pattern="),
        ("flex_olmo", f"{MOE}.name", "default", "feed_forward_moe.name='default'"),
        ("flex_olmo", f"{MOE}.num_experts", 9, "router.weight has shape"),
        ("flex_olmo", f"{MOE}.hidden_size", 8, "mlp.w1 has shape"),
        ("flex_olmo", f"{MOE}.shared_mlp.hidden_size", 8, "shared_mlp.hidden_size=8"),
        ("flex_olmo", f"{MOE}.router.bias_gamma", 0.1, "bias_gamma=0.1"),
        ("flex_olmo", f"{MOE}.router.gating_function", "sigmoid", "gating_function='sigmoid'"),
        ("flex_olmo", f"{MOE}.router.normalize_expert_weights", 2.0, "expert_weights=2.0"),
        ("flex_olmo", f"{MIXER}.sliding_window.pattern", [4, -1], "windows"),
    ],
)
def test_what_does_not_fit_is_refused(
    family: str, path: str, value: Any, message: str, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    told = changed(olmo.experiment(model), path, value)
    olmo.save(olmo.weights(model), told, tmp_path / "step7")
    with pytest.raises(ArchiveError, match=message):
        source(tmp_path)


NAMES = st.sampled_from(
    ["block", "attention", "rope", "scaling", "name", "eps", "n_heads", "pattern", "qk_norm", "0"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), VALUES), min_size=1, max_size=3))
def test_whatever_an_experiment_says(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, Any]]
) -> None:
    """A configuration, or an error that names the file."""

    def paths(tree: dict[str, Any], above: str = "") -> list[str]:
        inner = [paths(v, f"{above}{name}.") for name, v in tree.items() if isinstance(v, dict)]
        return [f"{above}{name}" for name in tree] + [path for found in inner for path in found]

    told = copy.deepcopy(TOLD)
    for number, value in changes:
        known = paths(told)
        told = changed(told, known[number % len(known)], value)
    place = tmp_path_factory.getbasetemp() / "experiment"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({"model": told}))
    try:
        assert olmo_core_config.read(Files(place)).model_type in ("olmo2", "olmo3", "flex_olmo")
    except ArchiveError as error:
        assert "config.json" in str(error)


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True), (True, True)])
def test_windows(first: bool, last: bool, tmp_path: Path) -> None:
    """The pattern begins after a first block that was taken out of it."""
    model = olmo3()
    told = olmo.experiment(model)
    told["block"]["sequence_mixer"]["sliding_window"] = {
        "pattern": [5, -1],
        "force_full_attention_on_first_layer": first,
        "force_full_attention_on_last_layer": last,
    }
    olmo.save(olmo.weights(model), told, tmp_path / "step7")
    config = source(tmp_path).config
    narrow = {(True, False): [1, 3], (False, True): [0, 2], (True, True): [1]}[first, last]
    assert [b for b, kind in enumerate(config.layer_types) if kind != "full_attention"] == narrow
    assert config.sliding_window == 5


def test_names_of_releases_before_3(tmp_path: Path) -> None:
    model = olmo2()
    told = olmo.experiment(model)
    attention = told["block"]["attention"] = told["block"].pop("sequence_mixer")
    del attention["type"], told["tie_word_embeddings"]
    attention["use_flash"] = True
    olmo.save(olmo.weights(model), told, tmp_path / "old" / "step7")
    new = source(saved(model, tmp_path / "new")).config
    assert source(tmp_path / "old").config.to_dict() == new.to_dict()


def test_tensors_that_are_missing_or_unknown(tmp_path: Path) -> None:
    model = olmo2()
    state = olmo.weights(model)
    value = state.pop("blocks.2.feed_forward.w3.weight")
    olmo.save(state, olmo.experiment(model), tmp_path / "less" / "step7")
    with pytest.raises(ArchiveError, match="has no blocks.2.feed_forward.w3.weight"):
        source(tmp_path / "less")
    state |= {"blocks.2.feed_forward.w3.weight": value, "blocks.2.sinks": value}
    olmo.save(state, olmo.experiment(model), tmp_path / "more" / "step7")
    with pytest.raises(ArchiveError, match="holds blocks.2.sinks that"):
        source(tmp_path / "more")


def test_another_family_or_experiment(tmp_path: Path) -> None:
    archive = saved(olmo2(), tmp_path / "archive")
    models.llama().config.save_pretrained(tmp_path / "hf")
    with pytest.raises(ArchiveError, match="of llama; checkpoints of OLMo-core are read as"):
        source(archive, hf_config=tmp_path / "hf")
    (archive / "step7" / "config.json").write_text('{"models": {}}')
    with pytest.raises(ArchiveError, match="no config.json that describes the model"):
        source(archive)


def test_experts_that_may_lie_either_way(tmp_path: Path) -> None:
    """Those of limited capacity are of the same shape where width and stream agree."""
    model = flex_olmo(intermediate_size=32)
    archive = saved(model, tmp_path / "archive")
    assert source(archive).names()
    model.config.save_pretrained(tmp_path / "hf")
    with pytest.raises(ArchiveError, match="whether they are dropless; scan without"):
        source(archive, hf_config=tmp_path / "hf")


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    archive = saved(flex_olmo(), tmp_path)
    (file,) = (archive / "step7" / "model_and_optim").glob("*.distcp")
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    assert lack(discover(archive)[0])
    with pytest.raises(ArchiveError, match=file.name):
        load(discover(archive)[0])


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "called",))

    archive = saved(olmo2(), tmp_path)
    (archive / "step7" / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ArchiveError, match="pathlib"):
        source(archive)
    assert not (tmp_path / "called").exists()
