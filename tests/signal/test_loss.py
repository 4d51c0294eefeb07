"""Sink rate beside the loss: against scipy and plain loops, and on curves of known truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import sinktrack as st
from sinktrack.signal import analyze
from sinktrack.signal.loss import Relation, read_losses, relate
from sinktrack.signal.robust import Interval
from tests.helpers.curves import CLEAR, curve


def beside(written: list[dict[str, Any]], share: float, shift: int = 0) -> dict[int, float]:
    """A loss that falls as the root of the step, and takes a share of the rate's wiggles."""
    rates = np.array([record["sink_rate"] for record in written])
    wiggles = rates - np.array([CLEAR.rate(np.array(record["step"])) for record in written])
    rng = np.random.default_rng(9)
    other = 0.03 * rng.normal(size=len(rates))
    moves = share * np.roll(wiggles, shift) + (1 - share) * other
    steps = [record["step"] for record in written]
    return {
        step: float(2 + 9 / np.sqrt(step / 100 + 3) - move)
        for step, move in zip(steps, moves, strict=True)
    }


def test_a_loss_of_its_own_gets_nothing_from_the_rate() -> None:
    written = curve()
    relation = analyze(written, loss=beside(written, 0.0)).loss
    assert relation is not None and relation.records == 101
    assert relation.correlation.value < -0.5, "both follow the step"
    assert not relation.adds
    small = max(map(abs, relation.beyond_step)) <= 0.2
    words = "nothing that the step count does not say" if small else "cannot be told yet"
    assert words in relation.lines()[1]


def test_a_loss_that_goes_with_the_rate() -> None:
    written = curve()
    relation = analyze(written, loss=beside(written, 0.9)).loss
    assert relation is not None and relation.adds and relation.beyond_step.high < -0.3
    assert "the rate moves with the loss" in relation.lines()[1]


def test_too_few_losses_are_counted() -> None:
    signal = analyze(curve(), loss={0: 4.0, 500: 3.0, 1000: 2.5})
    assert signal.loss is None
    assert signal.missing[-1] == "loss: 9 more records at steps with a loss (11 of 20)"


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (
            dict.fromkeys(range(0, 10_001, 100), float("nan")),
            "loss: none of the losses is a number",
        ),
        (
            dict.fromkeys(range(0, 10_001, 100), 2.0),
            "loss: the sink rate or the loss is the same at every record",
        ),
    ],
)
def test_losses_that_say_nothing(loss: dict[int, float], says: str) -> None:
    signal = analyze(curve(), loss=loss)
    assert signal.loss is None and signal.missing[-1] == says


def test_losses_are_read_from_what_trainers_write(tmp_path: Path, demo: tuple[Path, str]) -> None:
    (newest,) = (demo[0] / "checkpoints").glob("checkpoint-400")
    found = read_losses(newest)
    assert found == read_losses(newest / "trainer_state.json")
    assert sorted(found) == list(range(50, 401, 50)) and found[50] > found[400]
    exported = tmp_path / "wandb.csv"
    exported.write_text("\ufeffStep,train/global_step,train/loss\n1,50,4.5\n2,,\n3,100,nan\n")
    assert read_losses(exported) == {50: 4.5}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("loss.csv", "step,accuracy\n1,2\n", "no loss in"),
        ("state.json", "[1, 2]", "no log_history in it"),
        ("state.json", '{"log_history": 3}', "no loss in"),
        (
            "missing.csv",
            None,
            r"cannot read losses from .*missing\.csv: No such file or directory$",
        ),
        (
            "loss.csv",
            b"step,loss\n1,\xff\n",
            r"loss.csv.* line 2",
        ),
        ("loss.csv", "step,loss\n1," + 200_000 * "2", "is no CSV: field larger than"),
        ("loss.csv", "step,loss\n1,\x00\n", "NUL, so it is no text"),
    ],
)
def test_what_holds_no_loss_is_named(
    tmp_path: Path, name: str, content: str | bytes | None, says: str
) -> None:
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(st.RecordError, match=says):
        read_losses(tmp_path / name)


def pearson(one: Any, other: Any) -> float:
    return 0.0 if np.ptp(one) == 0 or np.ptp(other) == 0 else float(np.corrcoef(one, other)[0, 1])


def resampled(count: int) -> list[Any]:
    """500 draws of runs of a fifth of the records each."""
    size = max(2, count // 5)
    each = int(np.ceil(count / size))
    starts = np.random.default_rng(0).integers(0, count - size + 1, (500, each))
    return [np.concatenate([np.arange(s, s + size) for s in row])[:count] for row in starts]


def interval(value: float, drawn: list[float]) -> list[float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [value, min(low, value), max(high, value)]


def beyond_step(x: Any, y: Any) -> Any:
    """What is left of the ranks by Legendre's polynomials of place and logarithm to the third."""
    place, logs = np.arange(len(x)), np.log(1 + x - x[0])
    terms = [
        np.polynomial.legendre.legvander(2 * (v - v[0]) / (v[-1] - v[0]) - 1, 3)
        for v in (place, logs)
    ]
    design = np.concatenate([terms[0], terms[1][:, 1:]], 1)
    ranks = stats.rankdata(y)
    return ranks - design @ (np.linalg.pinv(design) @ ranks)


def relation(x: Any, rate: Any, loss: Any) -> dict[str, Any]:
    """The definitions of `docs/signal.md`, one resample after the other."""
    ranks = [stats.rankdata(rate), stats.rankdata(loss)]
    plain = [pearson(ranks[0][rows], ranks[1][rows]) for rows in resampled(len(x))]
    one, other = (beyond_step(x[1:], np.diff(y)) for y in (rate, loss))
    count = len(one)
    rest = interval(
        pearson(one, other), [pearson(one[rows], other[rows]) for rows in resampled(count)]
    )
    turns = range(count // 8, count - count // 8)
    turned = [abs(pearson(np.roll(one, turn), other)) for turn in turns]
    sure = rest[1] > 0 or rest[2] < 0
    return {
        "correlation": interval(float(stats.spearmanr(rate, loss).statistic), plain),
        "beyond": rest,
        "adds": sure and abs(rest[0]) > np.quantile(turned, 0.95),
    }


def beside_each_other(seed: int, share: float, shift: int) -> tuple[Any, Any, dict[int, float]]:
    """Uneven steps; losses are logged from the second to the last but one.

    A rate of 0 for most of the run where ``share`` is 0.
    """
    draw = np.random.default_rng(seed)
    count = int(draw.integers(24, 50))
    steps = np.sort(draw.choice(100 * count, count, replace=False))
    white, own = draw.normal(size=(2, count))
    rate = np.linspace(0, 0.7, count) + 0.05 * white
    if share == 0:
        rate[: -count // 5] = 0.0
    moves = share * np.roll(white, shift) + (1 - abs(share)) * own
    logged = np.sort(np.unique(np.concatenate([steps[1:-1], draw.choice(100 * count, 40)])))
    logged = logged[(logged >= steps[1]) & (logged <= steps[-2])]
    losses = {
        int(step): float(loss)
        for step, loss in zip(logged, np.interp(logged, steps, 0.05 * moves + 4), strict=True)
    }
    losses[int(logged[3]) + 1] = float("nan")
    return steps, rate, losses


@pytest.mark.parametrize(
    ("seed", "share", "shift"),
    [
        (0, 0.0, 0), (1, 0.6, 0), (2, 0.9, 2), (3, 0.9, -2), (4, -0.6, 0), (6, 0.9, 6), (9, 0.3, 0),
        (11, 0.3, 0), (23, 0.9, 4),
    ],
)  # fmt: skip
def test_the_relation_is_its_definition(seed: int, share: float, shift: int) -> None:
    steps, rate, losses = beside_each_other(seed, share, shift)
    known = sorted(step for step, loss in losses.items() if loss == loss)
    found = relate(steps.tolist(), rate.tolist(), losses)
    x, y = steps[1:-1].astype(float), rate[1:-1]
    loss = np.interp(x, known, [losses[step] for step in known])
    wanted = relation(x, y, loss)
    assert isinstance(found, Relation) and found.records == len(steps) - 2
    assert list(found.correlation) == pytest.approx(wanted["correlation"])
    assert list(found.beyond_step) == pytest.approx(wanted["beyond"], abs=1e-7)
    assert found.adds == wanted["adds"]


def test_what_is_said_of_rate_and_loss() -> None:
    relation = Relation(40, Interval(-0.9, -0.95, -0.8), Interval(0.1, -0.05, 0.2), False)
    rank = (
        "rank correlation of sink rate and loss -0.90 (95 %: -0.95 to -0.80); two curves that both "
        "follow the step correlate by that alone"
    )
    beyond = "beyond the step count +0.10 (95 %: -0.05 to +0.20): "
    assert relation.lines() == [rank, beyond + "nothing that the step count does not say"]
    wide = replace(relation, beyond_step=Interval(0.1, -0.05, 0.21))
    assert wide.lines()[1] == (
        "beyond the step count +0.10 (95 %: -0.05 to +0.21): whether the rate says more than the "
        "step count cannot be told yet"
    )
    adds = replace(relation, adds=True)
    assert adds.lines()[1] == beyond + "the rate moves with the loss where the step does not say so"


@pytest.mark.parametrize("step", ["step", "global_step", "train/global_step", "_step"])
@pytest.mark.parametrize("loss", ["loss", "train/loss", "train_loss"])
def test_the_names_of_steps_and_losses(tmp_path: Path, step: str, loss: str) -> None:
    rows = [
        {"epoch": 1},
        {step: 5, loss: 2.5},
        7,
        {loss: 3},
        {step: 6, loss: "inf"},
        {step: 7, loss: None},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert read_losses(tmp_path) == {5: 2.5}
    table = tmp_path / "losses.csv"
    table.write_text(f"{loss},{step},other\n2.5,5,1\n,6,\n\n3.5,8.0,\n")
    assert read_losses(str(table)) == {5: 2.5, 8: 3.5}


def test_a_chart_exported_by_wandb(tmp_path: Path) -> None:
    """Columns after their run's name; its own ``Step`` counts calls and is no step of training."""
    table = tmp_path / "losses.csv"
    table.write_text(
        '"train/global_step","a - b - train/loss","a - b - train/loss__MIN"\n5,2.5,1\n'
    )
    assert read_losses(table) == {5: 2.5}
    table.write_text('"Step","a - train/loss"\n1,2.5\n')
    with pytest.raises(st.RecordError, match="under step, global_step, .*holds Step, train/loss$"):
        read_losses(table)
    table.write_text('"step","a - train/loss","b - train/loss"\n1,2.5,3\n')
    with pytest.raises(st.RecordError, match=r"losses.csv holds losses of 2 runs; export one"):
        read_losses(table)


def test_of_two_losses_of_a_row_the_first_name_counts(tmp_path: Path) -> None:
    table = tmp_path / "losses.csv"
    table.write_text("_step,train_loss,step,loss\n1,9,2,3\n1,9,,4\n")
    assert read_losses(table) == {2: 3.0, 1: 4.0}


def test_a_file_too_large_for_losses_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "losses.csv"
    row = "x" * (2**16 - 1) + "\n"
    table.write_text(1024 * row)
    with pytest.raises(st.RecordError, match="no loss in"):
        read_losses(table)
    with table.open("a") as file:
        file.write("\n")
    with pytest.raises(st.RecordError, match=r"losses\.csv is larger than 64 MiB"):
        read_losses(table)


def test_as_many_losses_as_are_needed() -> None:
    written = curve()[:20]
    enough = analyze(written, loss={record["step"]: 1 / (1 + record["step"]) for record in written})
    assert enough.loss is not None
    short = analyze(written[:19], loss={0: 2.0, 3000: 1.0})
    assert short.missing[-1] == "loss: 1 more record at steps with a loss (19 of 20)"
    still = [record | {"sink_rate": 0.5} for record in written]
    assert analyze(still, loss={0: 2.0, 3000: 1.0}).missing[-1] == (
        "loss: the sink rate or the loss is the same at every record"
    )


def test_losses_are_read_as_utf8_or_refused_at_the_byte(tmp_path: Path) -> None:
    table, state = tmp_path / "loss.csv", tmp_path / "trainer_state.json"
    rows = 'step,note,loss\n1,"a\u2028b\x0cc\x85d\ne",2.5\n2,f,1.5\n'
    for written in (rows, rows.replace("\n", "\r\n"), "\ufeff" + rows):
        table.write_bytes(written.encode())
        assert read_losses(table) == {1: 2.5, 2: 1.5}
    history = json.dumps({"log_history": [{"step": 1, "loss": 2.5}]}).encode()
    state.write_bytes(b"\xef\xbb\xbf" + history)
    assert read_losses(tmp_path) == {1: 2.5}
    for path, content in ((table, rows.encode()), (state, history + b"\n")):
        path.write_bytes(content + b" caf\xe9\n")
        line, at = content.count(b"\n") + 1, len(content) + 4
        told = f"{path}, line {line}: byte {at} .* 0xe9, is not UTF-8"
        with pytest.raises(st.RecordError, match=told):
            read_losses(path)
        path.write_text(content.decode(), encoding="utf-16")
        with pytest.raises(st.RecordError, match=f"{path} is UTF-16LE text"):
            read_losses(path)
