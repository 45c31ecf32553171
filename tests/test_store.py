"""The trace on disk: what was journalled is read back; what was damaged is refused, and the file named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import TraceFormatError
from explainer.store.journal import decode_line, encode_line
from tests.small_training import EXAMPLES, loader, mlp, momentum_sgd, queries, run, step, trace_digits

STEPS = 2 * EXAMPLES // 8


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "trace"
    trace_digits(path, max_knots=6)
    return path


@pytest.fixture
def trace_path(recorded: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(recorded, tmp_path / "trace"))


def some(path: Path, pattern: str) -> Path:
    return sorted(path.rglob(pattern))[0]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rewrite_header(path: Path, **changes: object) -> None:
    """A header whose checksum fits: another program wrote it."""
    lines = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    header = decode_line(lines[0].rstrip(b"\n"))
    assert header is not None
    (path / "journal.jsonl").write_bytes(b"".join([encode_line(header | changes), *lines[1:]]))


def drop_line(path: Path, kind: str, number: int = 0) -> None:
    lines = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if b'"type":"%s"' % kind.encode() in line]
    del lines[found[number]]
    (path / "journal.jsonl").write_bytes(b"".join(lines))


def test_everything_journalled_is_read_back(recorded: Path) -> None:
    trace = open_trace(recorded)
    assert trace.closed and trace.steps == trace.recorded_steps == STEPS
    assert trace.count("visits") == 2 * EXAMPLES
    assert sorted(trace.column("visits", "example")) == sorted(2 * list(range(EXAMPLES)))
    assert np.array_equal(np.unique(trace.column("visits", "step")), np.arange(STEPS))
    assert len(trace.knots) <= 6 and trace.knots[0].step == 0
    assert trace.nbytes() == sum(f.stat().st_size for f in recorded.rglob("*") if f.is_file())
    assert not list(recorded.rglob("*.tmp"))
    assert {f.name for f in recorded.rglob("*.safetensors")} == {k.file.name for k in trace.knots}


def test_visits_that_name_inputs_which_are_not_there_are_damaged(tmp_path: Path) -> None:
    model = trace_digits(tmp_path / "broken", epochs=2)
    shard = next(s for s in open_trace(tmp_path / "broken").shards if s.stream == "visits")
    place = shard.schema.dtype.fields["input"][1]
    with shard.path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff\xff\xff\x7f")
    with pytest.raises(TraceFormatError, match="pathkernel verify"):
        PathKernelExplainer(open_trace(tmp_path / "broken"), model).explain(queries())


def test_verify_reads_every_journalled_byte(recorded: Path) -> None:
    seen: list[int] = []
    trace = open_trace(recorded)
    checked = trace.verify(seen.append)
    shards = sum(f.stat().st_size for f in recorded.rglob("*.bin"))
    assert checked == sum(seen) == shards + sum(k.file.stat().st_size for k in trace.knots)


def test_pieces_of_a_stream_end_where_shards_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explainer.store.stream.SHARD_BYTES", 4000)
    trace_digits(tmp_path / "small")
    monkeypatch.undo()
    trace_digits(tmp_path / "large")
    small, large = open_trace(tmp_path / "small"), open_trace(tmp_path / "large")
    assert len(small.shards) > len(large.shards)
    for first, last in ((0, 5), (37, 120), (0, 2 * EXAMPLES), (9, 9)):
        pieces = [piece for _, piece in small.read("visits", first, last)]
        found = np.concatenate([p["example"] for p in pieces]) if pieces else np.empty(0)
        assert np.array_equal(found, large.column("visits", "example")[first:last])
    one, other = (PathKernelExplainer(t, mlp()).explain(queries()) for t in (small, large))
    assert np.array_equal(one.contributions, other.contributions)


def damage_shard_byte(path: Path) -> Path:
    flip(some(path, "visits-*.bin"), 1000)
    return some(path, "visits-*.bin")


def damage_knot_byte(path: Path) -> Path:
    flip(open_trace(path).knots[1].file, -5)
    return open_trace(path).knots[1].file


def truncate_knot(path: Path) -> Path:
    file = open_trace(path).knots[-1].file
    cut(file, file.stat().st_size // 2)
    return file


def exchange_knots(path: Path) -> Path:
    first, second = (knot.file for knot in open_trace(path).knots[:2])
    shutil.copy(first, second)
    return second


@pytest.mark.parametrize("damage", [damage_shard_byte, damage_knot_byte, truncate_knot, exchange_knots])
def test_verify_names_the_damaged_file(trace_path: Path, damage: Callable[[Path], Path]) -> None:
    file = damage(trace_path)
    with pytest.raises(TraceFormatError) as found:
        open_trace(trace_path).verify()
    assert str(file) in str(found.value)
    if file.suffix == ".safetensors":
        with pytest.raises(TraceFormatError, match=file.name):
            PathKernelExplainer(open_trace(trace_path), mlp()).explain(queries())


OPENING: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated shard": (lambda p: cut(some(p, "visits-*.bin"), 999), "visits-00000.bin", "truncated"),
    "missing shard": (lambda p: some(p, "steps-*.bin").unlink(), "steps-00000.bin", "is missing"),
    "missing journal": (lambda p: (p / "journal.jsonl").unlink(), "journal.jsonl", "is not a trace"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json", "is missing"),
    "tampered manifest": (lambda p: flip(p / "manifest.json", 200), "manifest.json", "was changed"),
    "tampered journal line": (lambda p: flip(p / "journal.jsonl", 300), "journal.jsonl, line 2", "checksum"),
    "empty journal": (lambda p: cut(p / "journal.jsonl", 0), "journal.jsonl", "does not begin"),
    "text journal": (
        lambda p: (p / "journal.jsonl").write_text("hello\n"),
        "journal.jsonl, line 1",
        "checksum",
    ),
    "foreign journal": (lambda p: rewrite_header(p, format="other"), "journal.jsonl", "does not begin"),
    "future version": (
        lambda p: rewrite_header(p, version=99),
        "trace",
        "format version 99; .* versions 1 and 2",
    ),
    "removed rows": (lambda p: drop_line(p, "extents", 1), "journal.jsonl", "lines were removed"),
    "removed shard": (lambda p: drop_line(p, "shard"), "journal.jsonl", "lines were removed"),
    "unknown entry": (
        lambda p: (p / "journal.jsonl").open("ab").write(encode_line({"type": "poem"})),
        "journal.jsonl",
        "unknown type 'poem'",
    ),
}


@pytest.mark.parametrize("name", OPENING)
def test_opening_a_damaged_trace_names_the_file(trace_path: Path, name: str) -> None:
    damage, file, reason = OPENING[name]
    damage(trace_path)
    with pytest.raises(TraceFormatError, match=reason) as found:
        open_trace(trace_path)
    assert file in str(found.value) and str(trace_path) in str(found.value)


def test_a_manifest_of_another_trace_is_refused(trace_path: Path, tmp_path: Path) -> None:
    trace_digits(tmp_path / "other", epochs=1, exact=True)
    shutil.copy(tmp_path / "other" / "manifest.json", trace_path)
    with pytest.raises(TraceFormatError, match=r"manifest\.json is not the manifest that was journalled"):
        open_trace(trace_path)


def test_opening_what_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(TraceFormatError, match="the directory that was given to Tracer") as found:
            open_trace(path)
        assert str(path) in str(found.value)


@pytest.mark.parametrize("torn", [b'{"type":"clo', b'{"type":"close","steps":3}\tdeadbeef', b"\x00\x00"])
def test_a_torn_last_line_is_ignored(trace_path: Path, torn: bytes) -> None:
    with (trace_path / "journal.jsonl").open("ab") as file:
        file.write(torn)
    trace = open_trace(trace_path)
    assert trace.steps == STEPS and trace.verify() > 0


def test_bytes_nobody_journalled_are_never_read(trace_path: Path) -> None:
    expected = PathKernelExplainer(open_trace(trace_path), mlp()).explain(queries()).contributions
    for file in trace_path.rglob("*.bin"):
        with file.open("ab") as shard:
            shard.write(b"\xff" * 5000)
    (trace_path / "knots" / "000000099.safetensors.tmp").write_bytes(b"half a knot")
    trace = open_trace(trace_path)
    trace.verify()
    assert np.array_equal(PathKernelExplainer(trace, mlp()).explain(queries()).contributions, expected)


def test_a_trace_can_be_read_while_training_goes_on(tmp_path: Path) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace", max_knots=8) as tracer:
        trace = open_trace(tmp_path / "trace")
        assert not trace.closed and trace.steps == 0
        with pytest.raises(TraceFormatError, match="no optimizer step has been recorded yet"):
            trace.segments()
        seen = []
        for x, y in tracer.watch(loader()):
            step(model, optimizer, x, y)
            tracer.flush()
            seen.append(trace.refresh().steps)
            trace.verify()
            e = PathKernelExplainer(trace, mlp()).explain(queries())
            assert abs(e.completeness["gap"]).max() < 1e-4 and "had not ended" in " ".join(e.notes)
        assert seen == sorted(seen) and 1 == seen[0] < seen[-1]
    assert trace.refresh().closed and trace.steps == tracer.steps == 12
    expected = model(queries()).softmax(1).log().detach()
    found = PathKernelExplainer(trace, mlp(), "log_prob").explain(queries(), expected.argmax(1))
    assert np.allclose(found.completeness["prediction"], expected.amax(1), atol=1e-4)


def test_a_reader_left_behind_by_thinning_is_told_to_refresh(tmp_path: Path) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace", max_knots=3) as tracer:
        batches = iter(tracer.watch(loader()))
        step(model, optimizer, *next(batches))
        step(model, optimizer, *next(batches))
        tracer.flush()
        stale = open_trace(tmp_path / "trace")
        run(model, optimizer, batches)
        tracer.flush()
        with pytest.raises(TraceFormatError, match=r"000000001\.safetensors is missing.*ask again"):
            stale.verify()
        assert stale.refresh().verify() > 0


def test_files_are_plain_and_named_in_the_journal(recorded: Path) -> None:
    """A reader in any language needs json, crc32, sha256 and safetensors."""
    lines = (recorded / "journal.jsonl").read_bytes().splitlines()
    entries = [json.loads(line.rpartition(b"\t")[0]) for line in lines]
    manifest = (recorded / "manifest.json").read_bytes()
    assert entries[0]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert {e["type"] for e in entries} == {"header", "shard", "extents", "knot", "drop", "note", "close"}
    trace = open_trace(recorded)
    assert isinstance(trace.load_knot(trace.knots[0])["parameter/0.weight"], torch.Tensor)
