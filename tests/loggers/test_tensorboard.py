"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sinktrack import Run
from sinktrack.cli import app
from sinktrack.errors import RecordError
from sinktrack.loggers.tensorboard_events import publish
from tests.helpers.synthetic import synthetic_records

pytest.importorskip("tensorboard")


def read(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kinds = ("scalars", "images", "tensors")
    found = EventAccumulator(str(directory), size_guidance=dict.fromkeys(kinds, 0))
    return found.Reload()


def curve(events: Any, tag: str) -> dict[int, float]:
    points = [(event.step, event.value) for event in events.Scalars(tag)]
    assert len(points) == len(dict(points)), "each step once"
    return dict(points)


def test_all_curves_at_their_steps(run: Run) -> None:
    result = CliRunner().invoke(app, ["publish", str(run.directory), "--to", "tensorboard"])
    assert result.exit_code == 0, result.output
    events = read(run.directory / "tensorboard")
    records = {record["step"]: record for record in run.records}
    for name in ("sink_rate", "first_two_share", "first_two_gain", "reference_block", "depth"):
        found = curve(events, f"sinktrack/{name}")
        assert set(found) == {s for s, r in records.items() if r[name] is not None}
        for step, value in found.items():
            assert value == pytest.approx(records[step][name], rel=1e-6)
    for step, record in records.items():
        for block in range(4):
            for name in ("concentration", "norm_ratio"):
                found = curve(events, f"sinktrack/{name}/block_{block:02d}")
                assert found[step] == pytest.approx(record[name][block], rel=1e-6)
    assert curve(events, "sinktrack/sink_rate/low")[1900] == pytest.approx(
        records[1900]["intervals"]["sink_rate"][0], rel=1e-6
    )


def test_heads_are_a_picture_with_a_slider_over_steps(run: Run) -> None:
    from PIL import Image

    records = run.records
    publish(run, run.directory / "tb")
    pictures = read(run.directory / "tb").Images("sinktrack/heads")
    assert [picture.step for picture in pictures] == [record["step"] for record in records]
    pixels = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
    cell = 37
    pixels = pixels[34 : 34 + 4 * cell, 58 : 58 + 4 * cell]
    brightness = pixels[cell // 2 :: cell, cell // 2].sum(-1)
    attention = [heads[0] for heads in records[-1]["p0_attention"]]
    assert (
        np.argsort(-brightness.astype(int), kind="stable").tolist()
        == np.argsort(attention).tolist()
    )


def test_charts_and_table(run: Run) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    publish(run, run.directory / "tb")
    events = read(run.directory / "tb")
    [written] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["P0 sink", "P0 sink by block"]
    assert [chart.title for chart in layout.category[0].chart][:2] == [
        "sink_rate",
        "sink_rate_from_2",
    ]
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert list(charts["first_sink_block"].multiline.tag) == ["^sinktrack/first_sink_block$"]
    assert list(charts["concentration"].multiline.tag) == [r"sinktrack/concentration/block_\d+"]
    series = charts["sink_rate"].margin.series[0]
    tags = set(events.Tags()["scalars"])
    assert {series.value, series.lower, series.upper} <= tags
    text = events.Tensors("sinktrack/top_components/text_summary")[-1].tensor_proto.string_val[0]
    largest = run.records[-1]["top_components"][0]
    assert f"| {largest['kind']} | 0 | 5 | {largest['share']:.4f} | 0.8000 |" in text.decode()


def test_what_is_there_is_not_written_again(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "tb"
    assert publish(run, directory) == 20
    run.append(synthetic_records(steps=[5000])[0])
    assert publish(run, directory) == 1
    assert publish(run, directory) == 0
    partial = synthetic_records(steps=[6000])[0] | {"sink_rate": None, "reference_block": None}
    run.append(partial)
    assert [publish(run, directory), publish(run, directory)] == [1, 0]
    assert list(curve(read(directory), "sinktrack/depth"))[-3:] == [1900, 5000, 6000]


def test_gaps_have_no_event(run: Run, tmp_path: Path) -> None:
    record = synthetic_records(steps=[5000])[0]
    record["sink_rate"] = record["intervals"]["sink_rate"] = record["concentration"][2] = None
    record["p0_attention"][2] = [None] * 4
    run.append(record)
    publish(run, tmp_path / "tb")
    events = read(tmp_path / "tb")
    for tag in ("sink_rate", "sink_rate/low", "concentration/block_02"):
        assert 5000 not in curve(events, f"sinktrack/{tag}")
    assert 5000 in curve(events, "sinktrack/concentration/block_01")


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no records"):
        publish(Run.open(tmp_path / "run"), tmp_path / "tb")
