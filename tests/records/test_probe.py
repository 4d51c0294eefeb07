"""The probe: what it accepts, what it refuses, and that it comes back from disk as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

import sinktrack
from sinktrack import Probe, ProbeError
from sinktrack.cli import app
from tests.helpers import models


@given(st.integers(1, 5), st.integers(2, 9), st.integers(1, 70000), st.integers(0, 99))
def test_round_trip(sequences: int, length: int, vocabulary: int, seed: int) -> None:
    import tempfile

    probe = Probe.random(vocabulary, sequences, length, seed)
    assert probe == Probe.random(vocabulary, sequences, length, seed)
    with tempfile.TemporaryDirectory() as directory:
        probe.save(Path(directory) / "p")
        back = Probe.load(Path(directory) / "p")
        assert [path.name for path in Path(directory).iterdir()] == ["p"]
    assert torch.equal(back.tokens, probe.tokens) and back.tokens.dtype == torch.int64
    assert back.digest == probe.digest and hash(back) == hash(probe)


def test_the_digest_is_of_shape_and_ids() -> None:
    one = Probe.from_tokens([[1, 2, 3, 4]])
    assert one == Probe.from_tokens(np.array([[1, 2, 3, 4]], dtype=np.int32))
    assert one != Probe.from_tokens([[1, 2], [3, 4]])
    assert one != Probe.from_tokens([[1, 2, 3, 5]])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3], r"shape \(3,\)"),
        ([[1, 2], [3]], "rectangle"),
        ([[1.0, 2.0]], "float32"),
        ([[True, False]], "bool"),
        (torch.zeros(0, 4, dtype=torch.long), "0 sequences"),
        ([[5], [6]], "1 token per sequence"),
        ([[1, 2], [3, -7]], "-7 at sequence 1, position 1"),
    ],
)
def test_refusals(ids: object, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Probe.from_tokens(ids)


def test_texts() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(letter) for letter in text)]}

    probe = Probe.from_texts(tokenizer, ["abcdef", "ab", "xyzxyz"], length=4)
    assert probe.tokens.tolist() == [[1, 97, 98, 99], [1, 120, 121, 122]]
    with pytest.raises(ProbeError, match="none of 1 texts has 9 tokens .the longest has 3"):
        Probe.from_texts(tokenizer, ["ab"], length=9)
    with pytest.raises(ProbeError, match="one string"):
        Probe.from_texts(tokenizer, "abc", length=2)


def test_texts_through_a_fast_tokenizer_without_its_padding() -> None:
    tokenizer = letters()
    texts = ["abcabc", "ab", "cabcab"]
    probe = Probe.from_texts(tokenizer, texts, length=4)
    assert probe.tokens.tolist() == [[0, 1, 2, 0], [2, 0, 1, 2]]
    for direction in ("left", "right"):
        tokenizer.enable_padding(direction=direction, pad_id=3, length=9)
        assert Probe.from_texts(tokenizer, texts, length=4) == probe


def letters() -> Any:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return tokenizer


def test_texts_through_tiktoken() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )
    probe = Probe.from_texts(encoding, ["abcab", "<|endoftext|>"], length=3)
    assert probe.tokens.tolist() == [[256, 99, 256], [*b"<|e"]]


def test_many_texts_make_no_more_sequences_than_asked(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["abc", *(["a"] * 3), *(["abcd"] * 20_000)]
    probe = Probe.from_texts(letters(), texts, length=3)
    assert probe.sequences == 256
    (told, _) = [entry.getMessage() for entry in caplog.records]  # all begin alike
    assert "the first 256 texts of 3 tokens or more; 19,745 later ones are left out" in told
    caplog.clear()
    assert Probe.from_texts(letters(), texts, length=3, sequences=300).sequences == 300
    assert Probe.from_texts(letters(), texts[:100], length=3).sequences == 97
    assert all("begin with token id 0" in message for message in caplog.messages)
    with pytest.raises(ProbeError, match="sequences=0"):
        Probe.from_texts(letters(), texts, sequences=0)


def test_no_tokenizer_is_refused_by_its_type() -> None:
    with pytest.raises(ProbeError, match="int is no tokenizer that is known"):
        Probe.from_texts(3, ["abc"])


@pytest.mark.parametrize(
    ("ids", "documents", "said"),
    [
        ([[7, 7, 7], [7, 7, 7]], None, "repeats one token"),
        ([[7, 7, 7], [8, 8, 8]], None, "repeats one token"),
        ([[7, 7, 8, 8]], [[0, 0, 1, 1]], "repeats one token"),
        ([[7, 1, 2], [7, 3, 4]], None, "all 2 sequences of the probe begin with token id 7"),
        ([[7, 1, 7, 2]], [[0, 0, 1, 1]], "all 2 sequences of the probe begin with token id 7"),
        ([[7, 1, 2]], None, "the probe has one sequence"),
        ([[7, 7, 7], [7, 7, 8]], None, "all 2 sequences of the probe begin with token id 7"),
        ([[7, 1, 2], [8, 1, 2]], None, None),
        ([[7, 7, 7], [8, 8, 7]], None, None),
        ([[7, 1, 8, 2]], [[0, 0, 1, 1]], None),
    ],
)
def test_what_cannot_be_measured_is_said_when_a_probe_is_made(
    ids: Any, documents: Any, said: str | None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    probe = Probe.from_tokens(ids, documents)
    assert len(caplog.messages) == (said is not None)
    assert said is None or said in caplog.messages[0]
    caplog.clear()
    probe.save(tmp_path / "p")
    assert Probe.load(tmp_path / "p").weakness == probe.weakness
    assert not caplog.messages


def test_texts_and_random_tokens_say_it_too(caplog: pytest.LogCaptureFixture) -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(letter) for letter in text)]}

    Probe.from_texts(tokenizer, ["abcdef", "fedcba"], length=4)
    Probe.random(65, sequences=3, length=8, first_token=4)
    Probe.random(1, sequences=3, length=8)
    Probe.random(65, sequences=3, length=8)
    said = ("begin with token id 1", "begin with token id 4", "repeats one token")
    assert len(caplog.messages) == 3
    for message, part in zip(caplog.messages, said, strict=True):
        assert part in message


def test_random_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    Probe.random(9)
    assert torch.equal(state, torch.get_rng_state())


def test_first_tokens_are_distinct_and_bounded() -> None:
    probe = Probe.from_tokens([[5, 3, 5], [9, 3, 0]])
    assert probe.first_tokens().tolist() == [0, 3, 5, 9]
    many = Probe.from_tokens(torch.arange(1000).view(2, 500)).first_tokens()
    assert len(many.unique()) == 64 and many[0] == 0 and many[-1] == 999


def test_damaged_files(tmp_path: Path) -> None:
    good = tmp_path / "good"
    Probe.random(9).save(good)
    data = good.read_bytes()
    with pytest.raises(ProbeError, match="no probe file"):
        Probe.load(tmp_path / "none")
    for name, content in {
        "cut": data[:-9],
        "header": data[:20],
        "text": b"hello",
        "empty": b"",
        "huge": b"\xff" * 8 + data[8:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProbeError, match=f"{name} is not a readable safetensors"):
            Probe.load(tmp_path / name)
    (tmp_path / "flipped").write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    with pytest.raises(ProbeError, match="damaged"):
        Probe.load(tmp_path / "flipped")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ProbeError, match="not a sinktrack probe"):
        Probe.load(tmp_path / "other")


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="cannot write the probe .*No such file"):
        Probe.random(9).save(tmp_path / "missing" / "p")


def test_packed_rows(tmp_path: Path) -> None:
    """P0 is the first token of each document; the digest tells packed rows from plain ones."""
    ids, documents = [[1, 2, 3, 4, 5]], [[7, 7, 7, 2, 2]]
    probe = Probe.from_tokens(ids, documents)
    assert probe.sequences == 2
    assert [batch.tolist() for batch in probe.batches(8)] == [[[1, 2, 3]], [[4, 5]]]
    assert probe != Probe.from_tokens(ids)
    probe.save(tmp_path / "p")
    assert Probe.load(tmp_path / "p") == probe and Probe.load(tmp_path / "p").sequences == 2
    with pytest.raises(ProbeError, match=r"documents have shape \(1, 4\), the token ids \(1, 5\)"):
        Probe.from_tokens(ids, [[0, 0, 1, 1]])
    with pytest.raises(ProbeError, match="a document has 1 token"):
        Probe.from_tokens(ids, [[0, 0, 1, 2, 2]])


def test_no_random_probe_of_nothing() -> None:
    for vocabulary, sequences in ((0, 4), (9, 0)):
        with pytest.raises(ProbeError, match="no probe"):
            Probe.random(vocabulary, sequences)


def test_the_command_makes_random_probes(tmp_path: Path) -> None:
    path = tmp_path / "p"
    given = ["--vocab-size", "50", "--sequences", "3", "--length", "8", "--seed", "5"]
    done = CliRunner().invoke(app, ["probe", str(path), *given])
    assert done.exit_code == 0 and "3 x 8 tokens" in done.output
    assert Probe.load(path) == Probe.random(50, 3, 8, 5)
    for wrong in ([], [*given, "--texts", "t"], [*given, "--texts", "t", "--tokenizer", "t"]):
        refused = CliRunner().invoke(app, ["probe", str(tmp_path / "q"), *wrong])
        assert isinstance(refused.exception, ProbeError)
        assert "give --tokenizer with --texts, or --vocab-size" in str(refused.exception)
    assert CliRunner().invoke(app, ["probe", str(path), *given]).exit_code == 0  # the same
    refused = CliRunner().invoke(app, ["probe", str(path), *given[:-1], "6"])
    assert isinstance(refused.exception, ProbeError)
    assert f"{path} holds another probe; remove it" in str(refused.exception)
    assert Probe.load(path) == Probe.random(50, 3, 8, 5)


def test_random_sequences_with_a_first_token(tmp_path: Path) -> None:
    plain, begun = Probe.random(50, 3, 8), Probe.random(50, 3, 8, first_token=7)
    assert begun.tokens[:, 0].tolist() == [7, 7, 7]
    assert torch.equal(begun.tokens[:, 1:], plain.tokens[:, 1:])
    with pytest.raises(ProbeError, match="first token 50 in a vocabulary of 50"):
        Probe.random(50, 3, 8, first_token=50)
    given = ["--vocab-size", "50", "--sequences", "3", "--length", "8", "--first-token", "7"]
    done = CliRunner().invoke(app, ["probe", str(tmp_path / "p"), *given])
    assert done.exit_code == 0 and Probe.load(tmp_path / "p") == begun


def test_the_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output == f"sinktrack {sinktrack.__version__}\n"


def test_the_command_makes_probes_of_texts(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_text("to be or not\ntoo short\nnot to be at all\n")
    words = ["?", "to", "be", "or", "not", "at", "all"]
    models.save_tokenizer(words, tmp_path / "tokenizer")
    given = ["--tokenizer", str(tmp_path / "tokenizer"), "--texts", str(texts), "--length", "4"]
    done = CliRunner().invoke(app, ["probe", str(tmp_path / "p"), *given])
    assert done.exit_code == 0, done.output
    assert "1 of 3 lines are shorter" in done.output
    assert Probe.load(tmp_path / "p").tokens.tolist() == [[1, 2, 3, 4], [4, 1, 2, 5]]
    done = CliRunner().invoke(app, ["probe", str(tmp_path / "one"), *given, "--sequences", "1"])
    assert Probe.load(tmp_path / "one").tokens.tolist() == [[1, 2, 3, 4]]

    given[1] = str(tmp_path / "none")
    refused = CliRunner().invoke(app, ["probe", str(tmp_path / "q"), *given])
    assert isinstance(refused.exception, ProbeError)
    assert "no tokenizer.json in" in str(refused.exception)
    given[1], given[3] = str(tmp_path / "tokenizer"), str(tmp_path / "none")
    refused = CliRunner().invoke(app, ["probe", str(tmp_path / "q"), *given])
    assert isinstance(refused.exception, ProbeError)
    assert "cannot read" in str(refused.exception) and not (tmp_path / "q").exists()


def of_texts(content: bytes, directory: Path, length: int = 2) -> Probe:
    """By the command, with a word a token."""
    words = ["?", "to", "be", "or", "caf\xe9"]
    models.save_tokenizer(words, directory / "tokenizer")
    (directory / "texts").write_bytes(content)
    (directory / "p").unlink(missing_ok=True)
    done = CliRunner().invoke(
        app,
        ["probe", str(directory / "p"), "--tokenizer", str(directory / "tokenizer"),
         "--texts", str(directory / "texts"), "--length", str(length)],
    )  # fmt: skip
    if done.exception is not None:
        raise done.exception
    return Probe.load(directory / "p")


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        (b"to be\nbe or\n", [[1, 2], [2, 3]]),
        (b"to be\r\nbe or", [[1, 2], [2, 3]]),
        (b"\n\nto be\n\nbe or\n\n", [[1, 2], [2, 3]]),
        (b"\xef\xbb\xbfto be\nbe or\n", [[1, 2], [2, 3]]),
        (b"to be\n\xef\xbb\xbfbe or\n", [[1, 2], [2, 3]]),  # of two files that were joined
        ("to \u2028 be\nto \x0c be\nto \x85 be\n".encode(), [[1, 2]] * 3),
        ("to caf\xe9\n".encode(), [[1, 4]]),
    ],
)  # fmt: skip
def test_sequences_end_at_newlines_alone(
    content: bytes, tokens: list[list[int]], tmp_path: Path
) -> None:
    assert of_texts(content, tmp_path, len(tokens[0])).tokens.tolist() == tokens
    for between in ("\x0b", "\x1c", "\x1d", "\x1e", "\u2029", "\r"):  # no token of their own
        joined = content.strip() + f"{between}to\n".encode()
        lines = len(of_texts(joined, tmp_path, len(tokens[0])).tokens)
        assert lines == len(tokens), repr(between)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"to be\nto caf\xe9\n", "texts, line 2: byte 12 of the file, 0xe9, is not UTF-8"),
        (b"\xef\xbb\xbfto be\nto \xff", "texts, line 2: byte 12 of the file, 0xff, is not"),
        (b"to be \xed\xa0\x80\n", "texts, line 1: byte 6 of the file, 0xed, is not UTF-8"),
        ("to be\n".encode("utf-16"), "texts is UTF-16LE text, .* iconv -f UTF-16 -t UTF-8"),
        ("to be\n".encode("utf-32"), "texts is UTF-32LE text"),
        (b"\xfe\xff" + "to be".encode("utf-16-be"), "texts is UTF-16BE text"),
        ("to be\n".encode("utf-16-le"), "texts, line 1: byte 1 of the file is NUL"),
        (b"to be\nto \0be\n", "texts, line 2: byte 9 of the file is NUL"),
    ],
)
def test_what_is_not_utf8_is_named_by_line_and_byte(
    content: bytes, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ProbeError, match=told):
        of_texts(content, tmp_path)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\ufeffto be", "text 1 begins with a byte order mark, which would be its P0"),
        ("to \ud83d be", r"text 1 holds half of a character .*'.ud83d'.* at position 3"),
        (b"to be", "text 1 is bytes, wanted a string"),
        (None, "text 1 is NoneType, wanted a string"),
    ],
)
def test_texts_that_are_none(text: Any, told: str) -> None:
    with pytest.raises(ProbeError, match=told):
        Probe.from_texts(lambda text: {"input_ids": [*text.encode()]}, ["to be", text], length=2)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\r\n"])
def test_a_file_without_text_is_told(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="texts holds no text"):
        of_texts(content, tmp_path)
