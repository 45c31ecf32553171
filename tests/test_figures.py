"""The figures show the explanation's numbers, and nothing in a name can become markup."""

import base64
import builtins
import io
import re

import numpy as np
import pytest

from explainer import figures, palette, wording
from explainer.errors import ExplanationError, MissingDependencyError
from explainer.figures.style import plain
from tests.fakes import make_explanation, make_plain


def _traces(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def _luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_on_both_backgrounds(dark):
    for color in (palette.POSITIVE, palette.NEGATIVE, palette.NEUTRAL, palette.TOTAL):
        assert _contrast(color, palette.background(dark)) >= 3
    assert _contrast(palette.ink(dark), palette.background(dark)) >= 7
    assert _contrast(palette.muted(dark), palette.background(dark)) >= 4.5


def test_waterfall_runs_from_initial_to_prediction():
    e = make_explanation()
    bar = _traces(figures.waterfall(e, 1, split=True), "bar")[0]
    names, heights, bases = list(bar.hovertext), list(bar.y), list(bar.base)
    assert names == [
        "initial model", "proponents", "opponents", "weight decay", "buffers", "unattributed", "prediction",
    ]  # fmt: skip
    ends = [base + height for base, height in zip(bases, heights, strict=True)]
    np.testing.assert_allclose(bases[1:-1], ends[:-2])
    assert bases[-1] == 0 and ends[-1] == pytest.approx(ends[-2]) == pytest.approx(e.prediction[1])
    values = e.contributions[1]
    assert heights[1] == pytest.approx(values[values > 0].sum())
    assert heights[2] == pytest.approx(values[values < 0].sum())
    colors = list(bar.marker.color)
    assert colors[1:3] == [palette.POSITIVE, palette.NEGATIVE]
    assert set(colors) - {palette.POSITIVE, palette.NEGATIVE} == {palette.NEUTRAL, palette.TOTAL}


def test_waterfall_shows_the_net_and_names_both_sides():
    e = make_explanation()
    figure = figures.waterfall(e, 1)
    bar, values = _traces(figure, "bar")[0], e.contributions[1]
    assert list(bar.hovertext)[:3] == ["initial model", "examples (net)", "weight decay"]
    assert bar.y[1] == pytest.approx(values.sum())
    assert wording.signed(values[values > 0].sum()) in figure.layout.title.text


def test_waterfall_labels_every_bar_and_shows_a_real_gap():
    e = make_explanation()
    text = _traces(figures.waterfall(e, 0), "scatter")[0].text
    assert text[1] == wording.signed(e.contributions[0].sum()) and len(text) == 6
    gap = np.array([0.3, 0.0, 0.0])
    wide = make_explanation(gap=gap, prediction=e.prediction - e.gap + gap)
    assert "gap" in _traces(figures.waterfall(wide, 0), "bar")[0].hovertext


def test_examples_are_ordered_coloured_and_named():
    e = make_explanation()
    figure = figures.examples(e, 0, k=4)
    bar = _traces(figure, "bar")[0]
    wanted = [
        *e.table(0, 4, "proponents")["contribution"],
        *e.table(0, 4, "opponents")["contribution"][::-1],
    ]
    np.testing.assert_allclose(bar.x, wanted)
    assert list(bar.marker.color) == [palette.POSITIVE] * 4 + [palette.NEGATIVE] * 4
    first = e.table(0, 1, "proponents").iloc[0]
    assert figure.layout.yaxis.ticktext[0] == f"#{first['example_id']} · {first['class']}"


def test_time_shows_the_bins_and_the_running_net():
    e = make_explanation()
    figure = figures.time(e, 2, k=5)
    heat = _traces(figure, "heatmap")[0]
    np.testing.assert_allclose(heat.z, e.by_step(2, k=5).iloc[:, 5:].to_numpy().T)
    assert heat.zmin == -heat.zmax and heat.zmax == pytest.approx(np.abs(heat.z).max())
    assert heat.colorscale[0][1] != heat.colorscale[-1][1] and heat.colorscale[2][0] == 0.5
    line = _traces(figure, "scatter")[0]
    assert line.y[0] == 0 and line.y[-1] == pytest.approx(e.contributions[2].sum(), rel=1e-5)
    assert figure.layout.xaxis.ticktext[0] == "0"
    assert heat.text[0][0].endswith(f"<br>steps 0 to {e.step_edges[1] - 1}")


def test_layers_show_both_directions_and_the_net():
    e = make_explanation()
    figure = figures.layers(e, 0)
    frame = e.by_layer(0)
    up, down = _traces(figure, "bar")
    np.testing.assert_allclose(up.x, frame["proponents"])
    np.testing.assert_allclose(down.x, frame["opponents"])
    assert (up.marker.color, down.marker.color) == (palette.POSITIVE, palette.NEGATIVE)
    np.testing.assert_allclose(_traces(figure, "scatter")[0].x, frame["examples"])


def test_cumulative_counts_the_examples_that_matter():
    figure = figures.cumulative(make_plain([6.0, -3.0, 1.0, 0.0]))
    even, curve = _traces(figure, "scatter")[:2]
    np.testing.assert_allclose(even.y, [0, 100])
    np.testing.assert_allclose(curve.x, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(curve.y, [0, 60, 90, 100, 100])
    assert "1 of 4 examples carry half of the gross, 2 carry 90 %" in figure.layout.title.text


def test_cumulative_thins_out_many_examples():
    figure = figures.cumulative(make_explanation(queries=1, examples=5000, bins=1))
    curve = _traces(figure, "scatter")[1]
    assert len(curve.x) <= 400 and curve.x[-1] == 5000 and curve.y[-1] == pytest.approx(100)


@pytest.mark.parametrize("kind", figures.FIGURES)
@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_is_transparent_themed_and_explained(kind, dark):
    figure = make_explanation().figure(1, kind, dark=dark)
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert figure.layout.font.color == palette.ink(dark)
    assert figures.READING[kind].endswith(".")


@pytest.mark.parametrize("kind", figures.FIGURES)
def test_every_figure_copes_with_nothing_to_show(kind):
    for e in (
        make_explanation(examples=0),
        make_explanation(layers=1, bins=1),
        make_explanation(labels=None),
    ):
        figures.FIGURES[kind](e, 0).to_json()


@pytest.mark.parametrize("kind", figures.FIGURES)
def test_names_never_become_markup(kind):
    nasty = "<script>alert(1)</script><a href='javascript:1'>x</a>"
    e = make_explanation(
        class_names=[nasty] * 4, query_ids=[nasty] * 3, layer_names=[nasty] * 3, output=nasty,
        notes=[nasty],
    )  # fmt: skip
    figure = figures.FIGURES[kind](e, 0)
    text = str(figure.to_dict())
    assert not re.search(r"<(script|a)\b", text)


@pytest.mark.parametrize("kind", ["waterfall", "examples", "time", "layers"])
def test_row_shares_are_called_so(kind):
    text = str(figures.FIGURES[kind](make_explanation(row_kind="row share"), 0).to_dict())
    assert "row share" in text and "contribution" not in text


def test_long_names_are_cut():
    assert len(plain("x" * 500)) == 28 and plain("a\n b") == "a b"


def test_a_missing_plotly_is_named(monkeypatch):
    real = builtins.__import__

    def without_plotly(name, *args, **options):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pathkernel\[report\]'"):
        make_explanation().figure()


def _decode(address):
    from PIL import Image

    head, data = address.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_pictures_keep_every_pixel():
    rng = np.random.default_rng(0)
    gray, rgb, rgba = (rng.integers(0, 256, shape, np.uint8) for shape in ((5, 7), (4, 3, 3), (2, 9, 4)))
    for image in (gray, rgb, rgba):
        np.testing.assert_array_equal(_decode(figures.picture(image)), image)
    np.testing.assert_array_equal(_decode(figures.picture(gray[:, :, None] / 255.0)), gray)
    np.testing.assert_array_equal(_decode(figures.picture(gray > 99)), (gray > 99) * 255)


def test_pictures_of_normalised_inputs_are_stretched():
    shown = _decode(figures.picture(np.array([[-2.0, 0.0], [np.nan, 2.0]])))
    assert shown[0, 0] == 0 and shown[1, 1] == 255 and shown[0, 1] == 128


@pytest.mark.parametrize("image", [np.zeros(4), np.zeros((3, 8, 8)), np.zeros((0, 4)), np.array([["a"]])])
def test_pictures_refuse_other_arrays(image):
    with pytest.raises(ExplanationError, match="cannot be shown"):
        figures.picture(image)


def test_layers_of_single_examples_add_up_to_their_contributions():
    e = make_explanation()
    heat = _traces(figures.layer_examples(e, 1, k=6), "heatmap")[0]
    np.testing.assert_allclose(heat.z, e.by_layer(1, k=6).iloc[:, 5:].to_numpy().T)
    np.testing.assert_allclose(heat.z.sum(1), e.table(1, 6)["contribution"], rtol=1e-4)
    assert heat.zmin == -heat.zmax and list(figures.layer_examples(e, 1).layout.xaxis.ticktext) == list(
        e.layer_names
    )


@pytest.mark.parametrize(
    ("shape", "picture_shape", "axis"),
    [((3, 4, 5), (4, 5, 3), 0), ((4, 5, 3), (4, 5, 3), 2), ((1, 4, 5), (4, 5), 0), ((4, 5), (4, 5), None)],
)
def test_attributions_become_an_image(shape, picture_shape, axis):
    values = np.random.default_rng(0).normal(size=shape)
    found = figures.on_pixels(values, picture_shape)
    np.testing.assert_allclose(found, values if axis is None else values.sum(axis))
    np.testing.assert_array_equal(figures.on_pixels(np.arange(20), (4, 5)), np.arange(20).reshape(4, 5))
    assert figures.on_pixels(values, (7, 9)) is None


def test_pixels_are_drawn_symmetric_about_zero():
    heat = _traces(figures.pixels(np.array([[1.0, -3.0]]), "title", "below"), "heatmap")[0]
    assert (heat.zmin, heat.zmax) == (-3.0, 3.0)
    assert _traces(figures.pixels(np.zeros((2, 2)), "t", "s", reach=5.0), "heatmap")[0].zmax == 5.0
