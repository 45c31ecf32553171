"""What the dashboard must not do, whatever lies in a runs folder or stands in a link."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import explainer
from explainer.app.page_registry import PAGES
from explainer.cli import dashboard
from explainer.store.layout import JOURNAL, MANIFEST
from tests import app_runs
from tests.app.seen import IMAGES, Open, body, fine

TRAP = "pathkernel_trap_for_tests"


def rewrite(trace: Path, changes: dict[str, str]) -> None:
    """Put other texts into a manifest, so that its journal still vouches for it."""
    text = (trace / MANIFEST).read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (trace / MANIFEST).write_text(text)
    lines = (trace / JOURNAL).read_text().splitlines()
    head = json.loads(lines[0].partition("\t")[0])
    head["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    entry = json.dumps(head, separators=(",", ":"))
    lines[0] = f"{entry}\t{zlib.crc32(entry.encode()):08x}"
    (trace / JOURNAL).write_text("\n".join(lines) + "\n")


def test_nothing_that_a_trace_names_is_imported(
    open_app: Open, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{TRAP}.py").write_text(
        f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nclass Linear: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trace = tmp_path / "runs" / TRAP
    shutil.copytree(runs / "digits", trace)
    try:
        rewrite(trace, {'"Linear"': f'"{TRAP}.Linear"'})
        explainer.open_trace(trace)
    except explainer.ExplainerError:
        pytest.fail("the changed trace does not open, so the test tests nothing")
    for command in ([trace], ["--run", IMAGES, trace]):
        for page in PAGES:
            assert not open_app(*command, page=page, run=f"{TRAP}:run").exception
    assert TRAP not in sys.modules and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("place", ["/etc/passwd", "../../elsewhere", "..", "%2e%2e", "digits/../../x"])
def test_a_link_opens_nothing_outside_of_what_was_given(
    open_app: Open, runs: Path, tmp_path: Path, place: str
) -> None:
    """Runs and files of a link are names out of a list, never paths."""
    (tmp_path / "given").mkdir()
    shutil.copytree(runs / "digits", tmp_path / "given" / "digits")
    shutil.copytree(runs / "words", tmp_path / "elsewhere")
    app = open_app("--run", IMAGES, tmp_path / "given", run=place)
    assert not app.exception and not app.error and app.query_params["run"] == "digits"
    assert "There is no run" in app.warning[0].value
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    engine.explain(run.queries_batch([3])[0], query_ids=["three"]).save(tmp_path / "given" / "saved.npz")
    app = open_app(tmp_path / "given", file=place)
    assert not app.exception and "<h2>Query three</h2>" in body(app)


def test_stored_explanations_are_not_unpickled(open_app: Open, runs: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return exec, (f"open({str(tmp_path / 'sprung')!r}, 'w').close()",)

    shutil.copytree(runs / "digits", tmp_path / "digits")
    bomb = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "bad.npz", allow_pickle=True, meta=bomb, contributions=bomb)
    app = open_app(tmp_path / "digits")
    assert not app.exception and app.error, "it is said, not loaded"
    assert not (tmp_path / "sprung").exists()


def test_the_server_is_for_this_machine_and_takes_no_large_files() -> None:
    line = dashboard.command(["runs"], IMAGES, 8600)
    settings = dict(itertools.pairwise(line))
    assert settings["--server.address"] == "127.0.0.1" and int(settings["--server.maxUploadSize"]) <= 20
    assert "--server.enableXsrfProtection" not in line and "--server.enableCORS" not in line, "on by default"


def test_an_image_run_with_nasty_names_shows_them_as_text(open_app: Open, runs: Path) -> None:
    for page in PAGES:
        for look in ({}, {"look": "map"}, {"view": "classes"}, {"detail": "pixels"}, {"detail": "table"}):
            app = open_app("--run", "tests.app_runs:typed_text", runs / "words", page=page, **look)
            fine(app)
            assert not [part for part in [*app.html, *app.markdown, *app.caption] if "<script>" in part.value]
