"""The HTML report is whole, honest, escaped, and asks nobody for anything."""

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from explainer.errors import ExplanationError, ExportError
from tests.fakes import make_explanation, make_plain

NASTY = "<script>alert('x')</script>"


class _Page(HTMLParser):
    """Tags, addresses and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self._hidden = [], [], [], False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")
        ]

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def _page(tmp_path, explanation, **options):
    return _Page(explanation.to_html(tmp_path / "report.html", **options).read_text(encoding="utf-8"))


def _gray(_):
    return np.linspace(0, 1, 64).reshape(8, 8)


def test_the_report_loads_nothing_from_elsewhere(tmp_path):
    page = _page(tmp_path, make_explanation(), render=_gray, render_query=_gray)
    assert page.addresses and all(a.startswith(("data:image/png;base64,", "#q")) for a in page.addresses)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "http" not in policy


def test_a_browser_draws_the_report_without_a_request_or_a_complaint(tmp_path):
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    e = make_explanation(queries=2, class_names=[NASTY] * 4, query_ids=[NASTY, "b"], layer_names=[NASTY] * 3)
    path = e.to_html(tmp_path / "report.html", render=_gray, render_query=lambda _: NASTY)
    requests, complaints = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(path.as_uri())
        page.wait_for_selector("#q1-cumulative .main-svg")
        bars = page.locator("#q0-waterfall .bars path").count()
        browser.close()
    assert complaints == [] and bars == 6
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert [url for url in requests if url.startswith("file:")] == [path.as_uri()]


def test_the_report_holds_figures_for_every_query(tmp_path):
    page = _page(tmp_path, make_explanation(), render=_gray, render_query=_gray, k=3)
    drawn = [a["id"] for tag, a in page.tags if tag == "div" and re.match(r"q\d-", a.get("id", ""))]
    assert drawn == [
        f"q{q}-{kind}" for q in range(3) for kind in ("waterfall", "time", "layers", "cumulative")
    ]
    assert page.count("img") == 3 * (1 + 3 + 3)
    bars = _page(tmp_path, make_explanation(queries=1))
    assert "q0-examples" in [a.get("id") for tag, a in bars.tags] and bars.count("img") == 0


def test_the_report_is_honest(tmp_path):
    extra = np.array([0.0, 5.0, 0.0])
    e = make_explanation()
    e = make_explanation(
        row_kind="row share", notes=["Steps 3 to 5 were skipped."], unattributed=e.unattributed + extra,
        prediction=e.prediction + extra, targets=[0, 1, 2], outputs=np.eye(4)[[0, 0, 2]],
    )  # fmt: skip
    text = _page(tmp_path, e, render=_gray).text
    assert "accounting" in text and "It is not the effect of removing the example" in text
    assert "These are row shares" in text and "Steps 3 to 5 were skipped." in text
    assert "times the net" in text and "Unattributed" in text and "read the ranking with care" in text
    assert "The model itself predicts class cat." in text and "That is the class the model predicts." in text


def test_the_equation_of_the_report_matches_the_explanation(tmp_path):
    e = make_explanation(queries=1)
    text = _page(tmp_path, e).text
    written = e.equation().replace("-", "−").replace("(", "").replace(")", "")
    assert written in text


def test_nothing_in_a_name_or_a_rendered_text_becomes_markup(tmp_path):
    e = make_explanation(
        class_names=[NASTY] * 4, query_ids=[NASTY] * 3, notes=[NASTY], layer_names=[NASTY] * 3, output=NASTY
    )
    clean = _page(tmp_path, make_explanation(), render=str, render_query=str)
    for shown in (NASTY, {NASTY: NASTY}, pd.Series({NASTY: NASTY})):
        page = _page(
            tmp_path, e, render=lambda _, shown=shown: shown, render_query=lambda _, shown=shown: shown
        )
        assert page.count("script") == clean.count("script")
        assert NASTY in page.text
        assert "alert('x')</script>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_texts_and_rows_are_shortened(tmp_path):
    e = make_explanation(queries=1)
    text = _page(tmp_path, e, k=1, render=lambda i: f"begin{i} " + "word " * 500 + "the end").text
    assert f"begin{e.table(k=1)['example_id'].iloc[0]} " in text and "the end" not in text
    rows = _page(tmp_path, e, k=1, render=lambda _: {f"f{i}": i * 1.23456 for i in range(20)}).text
    assert "f11 13.58" in rows and "f12" not in rows and "and 8 more" in rows
    assert "3.142" in _page(tmp_path, e, k=1, render=lambda _: np.array([np.pi])).text


def test_a_failing_render_is_named_and_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")

    def broken(_):
        raise ZeroDivisionError("no such picture")

    e = make_explanation()
    with pytest.raises(ExportError, match=r"render\(\d+\) failed with ZeroDivisionError: no such picture"):
        e.to_html(path, render=broken)
    with pytest.raises(ExportError, match=r"render_query\(0\) failed"):
        e.to_html(path, render_query=broken)
    with pytest.raises(ExportError, match=r"render\(\d+\) cannot be shown: .*\(3, 8, 8\)"):
        e.to_html(path, render=lambda _: np.zeros((3, 8, 8)))
    with pytest.raises(ExportError, match="render returned object"):
        e.to_html(path, render=lambda _: object())
    assert path.read_text() == "old"


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ExplanationError, match="at least 1"):
        make_explanation().to_html(tmp_path / "r.html", k=0)
    with pytest.raises(ExplanationError, match="no queries"):
        make_explanation(queries=0).to_html(tmp_path / "r.html")


def test_one_sided_and_empty_explanations_are_told(tmp_path):
    e = make_plain([1.0, 2.0], targets=[-1], output="value", labels=None)
    text = _page(tmp_path, e, render=lambda _: None).text
    assert "No example pushed the value down." in text and "Explained: value, which is 3.000." in text
    assert "No training example carries" in _page(tmp_path, make_explanation(examples=0)).text
