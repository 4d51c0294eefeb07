"""What names say of steps and tokens: all of a number, or nothing."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinktrack import ArchiveError
from sinktrack.archive.discover import discover
from sinktrack.archive.names import alike, at_end, count, known
from tests.helpers.archives import place, steps

POWERS = {"": 0, "k": 3, "K": 3, "m": 6, "M": 6, "b": 9, "B": 9, "t": 12, "T": 12}


@given(st.integers(0, 2**63 - 1), st.integers(0, 9), st.booleans())
def test_a_whole_number_is_read_as_it_is_written(number: int, zeros: int, grouped: bool) -> None:
    assert count(f"{number:_}" if grouped else "0" * zeros + str(number)) == number


@given(st.integers(0, 999_999), st.integers(0, 12), st.sampled_from(sorted(POWERS)))
def test_decimals_and_units_are_exact(digits: int, places: int, unit: str) -> None:
    """Against decimal arithmetic; what is no whole number is no count."""
    written = f"{Decimal(digits).scaleb(-places):f}"
    value = Decimal(written).scaleb(POWERS[unit])
    whole = value == value.to_integral_value() and value < 2**63
    assert count(written + unit) == (int(value) if whole else None)


@given(st.text(st.sampled_from("0123456789kKmMbBtT._-+eE ٣²"), max_size=12))
def test_what_is_read_holds_nothing_else(text: str) -> None:
    number = count(text)
    if number is not None:
        plain = text.replace("_", "")
        unit = plain[-1] if plain[-1] in POWERS else ""
        assert Decimal(plain.removesuffix(unit)).scaleb(POWERS[unit]) == number


@pytest.mark.parametrize(
    "text",
    ["", "k", "1.", ".5B", "1,000", "1_0", "1__000", "_1", "-1", "+1", "1e3", "1 000", "1kk", "1G",
     "٣", "²", "1.5", "1.0005k", "9223372036854775808", "10000000T", "9" * 5000, "5\n", "0x10"],
)  # fmt: skip
def test_what_is_no_count(text: str) -> None:
    assert count(text) is None


REAL = {
    "checkpoint-1000": (1000, None),
    "global_step100": (100, None),
    "iter_0005000": (5000, None),
    "step143000": (143_000, None),  # Pythia
    "step_000050": (50, None),
    "step1000-tokens4B": (1000, 4 * 10**9),  # OLMo
    "stage1-step140000-tokens294B": (140_000, 294 * 10**9),  # OLMo 2
    "stage1-step-40000": (40_000, None),  # SmolLM3
    "step-50K-105b": (50_000, 105 * 10**9),  # TinyLlama
    "step-480k-1T": (480_000, 10**12),
    "step-1195k-token-2.5T": (1_195_000, 2_500 * 10**9),
    "step500-tokens2.1B": (500, 2_100_000_000),
    "step1_000_tokens_1.5M": (1000, 1_500_000),
    "main": None,
    "ckpt_000": None,  # LLM360's number counts checkpoints
    "checkpoint_12": None,  # Accelerate's, saves
    "checkpoint-500-sft": None,
    "checkpoint-1000-7B": None,  # a size of the model?
    "step100-200": None,
    "step1_2": None,
    "step1.5": None,
    "step-480k-1T-chat": None,
    "step99999999999999999999": None,
    "step٣": None,
}


@pytest.mark.parametrize("name", REAL)
def test_names_that_people_use(name: str) -> None:
    found = known(name)
    assert (found and (found.step, found.tokens)) == REAL[name]


ENDS = {
    "TinyLlama-1.1B-intermediate-step-480k-1T": (480_000, 10**12),
    "TinyLlama-1.1B-step-50K-105b": (50_000, 105 * 10**9),
    "multiberts-seed_0-step_20k": (20_000, None),
    "name@step1000": (1000, None),
    "opt-350m-step1-sft": None,
    "timestep5": None,
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_name(name: str) -> None:
    found = at_end(name)
    assert (found and (found.step, found.tokens)) == ENDS[name]


def test_of_a_single_directory_the_state_counts_before_a_part_of_its_name(tmp_path: Path) -> None:
    state = '{"global_step": 1200, "num_input_tokens_seen": 7}'
    expected = {
        "opt-350m-step1-sft": (1200, 7),
        "checkpoint-500-sft": (1200, 7),
        "my-step5": (1200, 7),
        "TinyLlama-1.1B-intermediate-step-480k-1T": (1200, 7),
        "checkpoint-500": (500, 7),
        "step-480k-1T": (480_000, 10**12),
    }
    place(tmp_path, *expected)
    for name, found in expected.items():
        (tmp_path / name / "trainer_state.json").write_text(state)
        ((_, *numbers),) = steps(tmp_path / name)
        assert tuple(numbers) == found, name
        (tmp_path / name / "trainer_state.json").unlink()
    without = {name: steps(tmp_path / name)[0][1:] for name in expected}
    assert without["opt-350m-step1-sft"] == without["checkpoint-500-sft"] == (0, None)
    assert without["my-step5"] == (5, None)
    assert without["TinyLlama-1.1B-intermediate-step-480k-1T"] == (480_000, 10**12)


def test_a_pattern_reads_units_and_decimals(tmp_path: Path) -> None:
    place(tmp_path, "a-480k-2.1B", "a-1195k-", "a-1_000-3")
    assert steps(tmp_path, r"a-(?P<step>\w+)-(?P<tokens>[\d.]+[KMBT]?)?") == [
        ("a-1_000-3", 1000, 3),
        ("a-480k-2.1B", 480_000, 2_100_000_000),
        ("a-1195k-", 1_195_000, None),
    ]


@pytest.mark.parametrize(
    ("name", "pattern", "group", "text"),
    [
        ("step-x5", r"step-(?P<step>.*)", "step", "x5"),
        ("step-1.5", r"step-(?P<step>.*)", "step", "1.5"),
        ("step-٣", r"step-(?P<step>\d+)", "step", "٣"),
        ("last", r"step-(?P<step>\d+)|last", "step", ""),
        ("step-", r"step-(?P<step>\d*)", "step", ""),
        ("step-99999999999999999999", r"step-(?P<step>\d+)", "step", "9" * 20),
        ("step-5-2.1Q", r"step-(?P<step>\d+)-(?P<tokens>.*)", "tokens", "2.1Q"),
    ],
)
def test_a_pattern_whose_group_is_no_count(
    name: str, pattern: str, group: str, text: str, tmp_path: Path
) -> None:
    with pytest.raises(ArchiveError, match="no whole number up to") as raised:
        discover(place(tmp_path, name), pattern)
    assert f"in {name} the group {group} is {text!r}" in str(raised.value)


def test_names_that_are_passed_over_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place(tmp_path, "step1", "step-2k-chat", "ckpt_000", "notes", "tmp-checkpoint-3")
    assert [steps(tmp_path)[0][1] for _ in range(3)] == [1, 1, 1]
    assert caplog.messages == [
        f"{tmp_path}: passed over ckpt_000, notes, step-2k-chat: the names tell no step that is "
        "known; --pattern reads others"
    ]


def revisions(cache: Path, *names: str) -> Path:
    (cache / "refs").mkdir(parents=True)
    for number, name in enumerate(names):
        place(cache / "snapshots", f"{number:040x}")
        (cache / "refs" / name).write_text(f"{number:040x}")
    return cache


def test_revisions_of_unknown_names_are_not_their_main_one(tmp_path: Path) -> None:
    """LLM360's: main alone would be recorded as step 0, and the others as nothing."""
    cache = revisions(tmp_path / "models--LLM360--Amber", "ckpt_000", "ckpt_100", "main")
    with pytest.raises(ArchiveError, match="names tell no step that is known: ckpt_") as raised:
        discover(cache)
    pattern = str(raised.value).split("--pattern '")[1].split("'")[0]
    assert [row[:2] for row in steps(cache, pattern)] == [("ckpt_000", 0), ("ckpt_100", 100)]
    (one,) = discover(cache / "snapshots" / f"{2:040x}")
    assert one.step == 0
    assert discover(revisions(tmp_path / "models--a--b", "main"))[0].step == 0


UNKNOWN = (
    ("ckpt_000", "ckpt_100", "ckpt_359"),  # LLM360
    ("ckpt_0.5T", "ckpt_1T", "ckpt_1.2T"),
    ("100B-tokens", "200B-tokens", "1.5T-tokens"),
    ("step10-tokens5B-phase2", "step20-tokens10B-phase2"),
    ("lc-8to32-step-100", "lc-8to32-step-200"),
    ("intermediate-step-50k-105b", "intermediate-step-480k-1T"),  # TinyLlama
    ("fw-57M-tied-step100", "fw-57M-tied-step200"),
    ("step-1000-fp16", "step-2000-fp16"),
    ("revision_001", "revision_002"),
    ("seed1-step1", "seed1-step2"),
    ("v1.0-iters_10", "v1.0-iters_20"),
    ("checkpoint_72000", "checkpoint_144000", "v1.0"),
)


@pytest.mark.parametrize("labels", UNKNOWN, ids=lambda labels: labels[0])
@pytest.mark.parametrize("cached", [True, False])
def test_the_pattern_that_is_printed_works(
    labels: tuple[str, ...], cached: bool, tmp_path: Path
) -> None:
    """Of revisions, and of directories; in the order in which they were saved."""
    if cached:
        archive = revisions(tmp_path / "models--a--b", *labels, "main")
    else:
        archive = place(tmp_path / "a", *labels)
    with pytest.raises(ArchiveError) as raised:
        discover(archive)
    if not cached and not any(map(alike, labels)):
        return
    pattern = str(raised.value).split("--pattern '")[1].split("'")[0]
    wanted = [label for label in labels if label != "v1.0"]
    assert [row[0] for row in steps(archive, pattern)] == wanted
