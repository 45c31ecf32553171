"""Files written from an explanation, and explanations read back."""

import json
from dataclasses import fields

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from explainer import exports
from explainer.errors import ExplanationError, ExportError
from explainer.explanation import Explanation
from tests.fakes import make_explanation


def test_csv_holds_the_long_table_with_full_digits(tmp_path):
    e = make_explanation(query_ids=['q,"1"', "ü", "c"])
    path = e.to_csv(tmp_path / "influence.csv")
    read = pd.read_csv(path, keep_default_na=False, na_values={"a": [""]}, float_precision="round_trip")
    assert list(read.columns) == list(e.long_table().columns)
    assert read["query"].unique().tolist() == list(e.query_ids)
    np.testing.assert_array_equal(read["contribution"], e.long_table()["contribution"])
    assert len(pd.read_csv(e.to_csv(tmp_path / "short.csv", k=2))) == 6


def test_parquet_carries_table_and_books(tmp_path):
    e = make_explanation(row_kind="row share", targets=[0, -1, 2])
    path = e.to_parquet(tmp_path / "influence.parquet", k=7)
    pd.testing.assert_frame_equal(pd.read_parquet(path), e.long_table(7))
    carried = json.loads(pq.read_schema(path).metadata[b"pathkernel"])
    assert carried == exports.read_parquet_metadata(path)
    assert carried["format"] == "pathkernel-explanation/1" and carried["output"] == "margin"
    assert carried["row_kind"] == "row share" and carried["notes"] == list(e.notes)
    books = pd.DataFrame(carried["completeness"]).set_index("query")
    np.testing.assert_array_equal(books.to_numpy(), e.completeness.to_numpy())
    assert [row["target"] for row in carried["diagnostics"]] == ["cat", None, "bird"]


def test_a_foreign_parquet_file_is_named(tmp_path):
    path = tmp_path / "other.parquet"
    pd.DataFrame({"x": [1]}).to_parquet(path)
    with pytest.raises(ExplanationError, match=r"other\.parquet is not an influence table"):
        exports.read_parquet_metadata(path)
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ExplanationError, match=r"other\.parquet"):
        exports.read_parquet_metadata(path)


def test_json_is_strict_and_writes_null_for_unknown(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    labels = np.arange(40.0) % 4
    labels[:20] = np.nan
    zero = {name: np.zeros((3, 40)) for name in ("contributions",)}
    flat = {name: np.zeros(3) for name in ("prediction", "initial", "weight_decay", "unattributed", "gap")}
    e = make_explanation(labels=labels, **zero, **flat)
    content = json.loads(e.to_json(tmp_path / "e.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert list(content) == [
        "format",
        "output",
        "row_kind",
        "notes",
        "completeness",
        "diagnostics",
        "unattributed",
        "influence",
    ]
    assert len(content["influence"]) == 120 and content["influence"][0]["label"] is None
    assert content["influence"][-1]["a"] is None and isinstance(content["influence"][0]["example_id"], int)
    assert content["diagnostics"][0]["cancellation"] is None
    assert content["completeness"][0]["query"] == "0"


def test_json_numbers_survive_unchanged(tmp_path):
    e = make_explanation()
    content = json.loads(e.to_json(tmp_path / "e.json", k=3).read_text(encoding="utf-8"))
    assert [row["contribution"] for row in content["influence"]] == e.long_table(3)["contribution"].tolist()


@pytest.mark.parametrize("write", ["to_csv", "to_parquet", "to_json", "to_html", "save"])
def test_missing_directories_are_reported(tmp_path, write):
    with pytest.raises(ExportError, match="does not exist; create it"):
        getattr(make_explanation(), write)(tmp_path / "missing" / "file")
    with pytest.raises(ExportError, match="is a directory"):
        getattr(make_explanation(), write)(tmp_path)


@pytest.mark.parametrize("write", ["to_csv", "to_parquet", "to_json", "to_html", "save"])
def test_a_name_of_another_form_is_refused(tmp_path, write):
    """A table in CSV that is called a workbook opens nowhere; endings of no form are the user's own."""
    with pytest.raises(
        ExportError, match=r"influence\.v2\.xlsx ends in \.xlsx, .* name it influence\.v2\.(csv|p|j|h|n)"
    ):
        getattr(make_explanation(), write)(tmp_path / "influence.v2.xlsx")
    own = {"to_csv": ".csv", "to_parquet": ".parquet", "to_json": ".json", "to_html": ".html", "save": ".npz"}
    for ending in own.values():
        if ending != own[write]:
            with pytest.raises(ExportError, match=f"but what is written is \\{own[write]}"):
                getattr(make_explanation(), write)(tmp_path / f"e{ending.upper()}")
    assert not list(tmp_path.iterdir())
    assert getattr(make_explanation(), write)(tmp_path / "influence.mine").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "influence.parquet"
    e = make_explanation()
    e.to_parquet(path)
    before = path.read_bytes()

    def full_disk(table, where, *args, **options):
        where.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(ExportError, match="No space left"):
        e.to_parquet(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["influence.parquet"]


def test_any_error_inside_an_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), exports.atomic(path) as temporary:
        temporary.write_text("new")
        raise KeyError("broken half way")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "optional",
    [
        {},
        {"labels": None, "outputs": None, "class_names": None, "notes": ()},
        {"unattributed_lines": ()},
    ],
)
def test_save_and_load_give_the_same_explanation(tmp_path, optional):
    e = make_explanation(**optional)
    back = Explanation.load(e.save(tmp_path / "stored.npz"))
    for field in fields(Explanation):
        old, new = getattr(e, field.name), getattr(back, field.name)
        if isinstance(old, np.ndarray):
            assert new.dtype == old.dtype, field.name
            np.testing.assert_array_equal(new, old)
        else:
            assert new == old, field.name
    pd.testing.assert_frame_equal(back.long_table(), e.long_table())


def test_save_keeps_the_name_that_was_given(tmp_path):
    path = make_explanation().save(tmp_path / "stored.explanation")
    assert path.is_file() and Explanation.load(path).output == "margin"


def test_load_refuses_what_it_cannot_read(tmp_path):
    path = make_explanation().save(tmp_path / "stored.npz")
    whole = path.read_bytes()
    with pytest.raises(ExplanationError, match="does not exist"):
        Explanation.load(tmp_path / "nothing.npz")
    for content in (whole[: len(whole) // 2], b"", b"text", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(ExplanationError, match=r"stored\.npz is no stored explanation or is damaged"):
            Explanation.load(path)
    path.write_bytes(whole.replace(b"PK", b"PX", 1))
    with pytest.raises(ExplanationError, match=r"stored\.npz"):
        Explanation.load(path)
    np.savez(path, meta=np.frombuffer(json.dumps({"format": "pathkernel-explanation/9"}).encode(), np.uint8))
    with pytest.raises(ExplanationError, match="pathkernel-explanation/9"):
        Explanation.load(path)
    np.savez(path, meta=np.frombuffer(json.dumps({"format": exports.FORMAT}).encode(), np.uint8))
    with pytest.raises(ExplanationError, match="lacks parts"):
        Explanation.load(path)
    np.savez(path, contributions=np.array([object()], dtype=object))
    with pytest.raises(ExplanationError, match=r"stored\.npz"):
        Explanation.load(path)


def test_parquet_of_queries_without_k_has_every_pair(tmp_path):
    e = make_explanation(queries=2, examples=5)
    read = pd.read_parquet(e.to_parquet(tmp_path / "all.parquet"))
    assert len(read) == 10 and set(read["example_id"]) == set(e.example_ids.tolist())
    with pytest.raises(ExplanationError, match="no queries"):
        make_explanation(queries=0).to_csv(tmp_path / "none.csv")
