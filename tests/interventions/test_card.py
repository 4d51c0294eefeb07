"""The position card: planted models in which [BOS] decides, or position, or both."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sinktrack import Probe, ProbeError, Run, measure, position_card, scan
from sinktrack.cli import app
from sinktrack.interventions import run_causal_tests
from sinktrack.interventions.card import NAMES, Several
from sinktrack.records.rows import rows
from sinktrack.signal import analyze
from sinktrack.views.story import carded, decided
from sinktrack.views.terminal import show
from tests.helpers import planted
from tests.helpers.synthetic import synthetic_records


def with_bos() -> Any:
    """Block 0 knows token 0 and writes what the others look for."""
    model = planted.dense()
    planted.neuron_writer(model, 0)
    for block in range(1, planted.BLOCKS):
        planted.reader(model, block)
    return model


def by_position() -> Any:
    """P0 is told by its unmixed value alone."""
    model = planted.dense()
    planted.unmixed(model)
    for block in range(2, planted.BLOCKS):
        planted.reader(model, block)
    return model


def rate_by_hand(model: Any, sequences: list[Tensor], start: int = 0) -> float:
    """Share of (sequence, block, head) whose mean eager attention to key 0 is above 0.3."""
    model.set_attn_implementation("eager")
    over = []
    with torch.no_grad():
        for row in sequences:
            seen = model(row[None], output_attentions=True).attentions
            over += [(one[0, :, :, 0].mean(-1) > 0.3).double() for one in seen[start:]]
    model.set_attn_implementation("sdpa")
    return float(torch.cat(over).mean())


def test_a_token_decides() -> None:
    model, probe = with_bos(), planted.probe(8)
    found: Any = position_card(model, probe)
    assert found["start_token"] == {"id": 0, "of": "probe"}
    assert found["with_start"] == found["as_is"]
    assert found["as_is"]["sink_rate"] == 0.8 and found["as_is"]["sink_rate_from_2"] == 1
    for name in ("without_start", "random_first", "repeated"):
        assert found[name]["sink_rate"] < 0.05
    assert found["answer"] == "token" and "missing" not in found
    json.dumps(found, allow_nan=False)


def test_position_decides() -> None:
    model, probe = by_position(), planted.without_bos()
    found: Any = position_card(model, probe, start_token=0)
    assert found["answer"] == "position"
    assert found["without_start"] == found["as_is"], "no sequence begins with it"
    assert found["random_first"]["sink_rate"] > 0.9 * found["as_is"]["sink_rate"] > 0.4
    assert found["repeated"]["sink_rate"] == 0, "where all tokens are equal, P0 is like the others"


@pytest.mark.parametrize("name", ["without_start", "with_start"])
def test_the_start_token_comes_and_goes(name: str) -> None:
    """Half of the sequences begin with it; each number is that of whole eager passes."""
    model, tokens = with_bos(), planted.probe(8).tokens.clone()
    tokens[4:, 0] = 7
    found: Any = position_card(model, Probe.from_tokens(tokens), start_token=0)
    before = torch.tensor([0])
    wanted = {
        "without_start": [row[1:] if int(row[0]) == 0 else row for row in tokens],
        "with_start": [
            row if int(row[0]) == 0 else torch.cat([before, row[:-1]]) for row in tokens
        ],
    }[name]
    assert found[name]["sink_rate"] == pytest.approx(rate_by_hand(model, wanted), abs=1e-9)
    later = rate_by_hand(model, wanted, 2)
    assert found[name]["sink_rate_from_2"] == pytest.approx(later, abs=1e-9)
    assert found["as_is"]["sink_rate"] == 0.4


def test_what_is_measured_is_the_same_however_it_is_batched() -> None:
    model, probe = by_position(), planted.without_bos()
    whole: Any = position_card(model, probe, measure(model, probe), start_token=3)
    parts: Any = position_card(model, probe, batch_size=5, start_token=3)
    for name in NAMES:
        assert whole[name]["sink_rate"] == parts[name]["sink_rate"]


def test_packed_documents() -> None:
    tokens = planted.probe(6).tokens.reshape(3, -1)
    documents = (torch.arange(tokens.shape[1]) >= planted.LENGTH).long().expand(3, -1)
    packed = position_card(with_bos(), Probe.from_tokens(tokens, documents))
    plain = position_card(with_bos(), planted.probe(6))
    assert packed == plain


def test_several_lengths_keep_their_places() -> None:
    rows_ = [torch.arange(length) for length in (5, 3, 5, 4, 3)]
    several = Several(rows_)
    taken = [row for batch in several.batches(2) for row in batch]
    assert [taken[place].tolist() for place in several.places] == [row.tolist() for row in rows_]


def test_what_cannot_be_had_has_a_reason() -> None:
    model = planted.dense()
    model.config.bos_token_id = None
    probe = planted.without_bos()
    found: Any = position_card(model, probe)
    assert found["start_token"] is None and found["with_start"] is None
    assert "no start token is known" in found["missing"]["without_start"]
    assert found["answer"] is None and "no sink" in found["missing"]["answer"]
    alike = Probe.from_tokens(torch.full((4, 8), 5))
    found = position_card(model, alike, start_token=5)
    assert found["random_first"] is None and "two distinct tokens" in found["missing"]["repeated"]
    two = Probe.from_tokens([[0, 1], [0, 2], [0, 3]])
    found = position_card(with_bos(), two)
    assert "no query after its P0" in found["missing"]["without_start"]
    assert "spread evenly counts as a sink" in found["missing"]["answer"]
    with pytest.raises(ProbeError, match="negative"):
        position_card(model, probe, start_token=-1)
    with pytest.raises(ProbeError, match="vocabulary"):
        position_card(model, probe, start_token=planted.VOCABULARY)


def test_the_causal_tests_make_it_too() -> None:
    model, probe = with_bos(), planted.probe(8)
    found: Any = run_causal_tests(model, probe, measure(model, probe))
    card = found["position_card"]
    assert card == position_card(model, probe)
    assert found["meaning"]["random_first"] == card["random_first"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that knows token 0, with a tokenizer whose [BOS] it is."""
    directory = tmp_path_factory.mktemp("card") / "checkpoint-5"
    model = with_bos()
    model.config.save_pretrained(directory)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    words = {f"w{number}": number for number in range(planted.VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="w0").save_pretrained(directory)
    return directory


def test_scan_and_show(checkpoint: Path, tmp_path: Path) -> None:
    """A probe without [BOS] shows no sink; the card says that the start token brings it."""
    tokens = planted.probe(8).tokens.clone()
    tokens[:, 0] = torch.arange(1, 9)
    probe = Probe.from_tokens(tokens)
    probe.save(tmp_path / "probe.safetensors")
    called = ["scan", str(checkpoint), "--run", str(tmp_path / "run")]
    plain = CliRunner().invoke(app, [*called, "--probe", str(tmp_path / "probe.safetensors")])
    assert plain.exit_code == 0, plain.output
    assert "position_card" not in Run.read(tmp_path / "run").records[-1]
    again = CliRunner().invoke(app, [*called, "--card"])
    assert again.exit_code == 0 and "1 measured" in again.output, again.output
    (record,) = Run.read(tmp_path / "run").records
    card = record["position_card"]
    assert card["start_token"] == {"id": 0, "of": "tokenizer"}
    assert card == position_card(with_bos(), probe, start_token=0) | {
        "start_token": card["start_token"]
    }
    assert card["as_is"]["sink_rate"] < 0.05 and card["with_start"]["sink_rate"] == 0.8
    third = CliRunner().invoke(app, [*called, "--card"])
    assert "0 measured, 1 already recorded" in third.output
    said = " ".join(CliRunner().invoke(app, ["show", str(tmp_path / "run")]).output.split())
    assert "A token decides, by the position card: the sink rate is 0% with random first" in said
    assert "start token 0 of the tokenizer" in said and "80.0% 100.0% with the start token" in said
    found = {row["kind"]: row for row in rows(record) if row["metric"] == "position_card.sink_rate"}
    assert found.keys() == set(NAMES) and found["with_start"]["value"] == 0.8
    refused = CliRunner().invoke(app, [*called, "--card", "--blocks", "1"])
    assert refused.exit_code == 2 and "needs all blocks" in " ".join(refused.output.split())
    with pytest.raises(ValueError, match="card needs all blocks"):
        next(scan(checkpoint, run=tmp_path / "run", card=True, blocks=1))


def test_probe_makes_one_by_itself(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "probe.safetensors"
    planted.probe(8).save(file)
    done = CliRunner().invoke(app, ["probe", str(file), "--card", str(checkpoint)])
    said = " ".join(done.output.split())
    assert done.exit_code == 0 and "A token decides, by the position card" in said, done.output
    assert "with one token repeated" in said and Probe.load(file) == planted.probe(8)
    missing = CliRunner().invoke(app, ["probe", str(tmp_path / "no"), "--card", str(checkpoint)])
    assert isinstance(missing.exception, ProbeError)


def test_sentences() -> None:
    rates = {"intervals": {"sink_rate": None, "sink_rate_from_2": None}, "sink_rate_from_2": None}
    card: dict[str, Any] = dict.fromkeys(NAMES) | {
        "start_token": None,
        "as_is": rates | {"sink_rate": 0.8},
        "random_first": rates | {"sink_rate": 0.4},
        "answer": "both",
        "missing": {"with_start": "no start token is known", "answer": "unused"},
    }
    (said,) = carded(card)
    assert said == (
        "Position and token decide together, by the position card: the sink rate is 40% with "
        "random first tokens, 80% with the probe as it is."
    )
    (untold,) = carded(card | {"answer": None, "missing": {"answer": "no sink"}})
    assert untold.endswith("cannot tell whether position or a token decides: no sink.")
    record = synthetic_records()[-1] | {"position_card": card}
    assert said in decided(record)
    console = Console(width=100, file=io.StringIO())
    show([record], analyze([record]), "run", console)
    assert isinstance(console.file, io.StringIO)
    assert "with the start token: not measured: no start token is known" in console.file.getvalue()
