import numpy as np
import pytest

from gptjax import show, tokenizers
from gptjax.errors import UserError

BYTES = tokenizers.load("bytes")


def test_every_token_is_shown_with_its_id_and_nothing_of_it_is_read_as_html():
    text = show.tokens(BYTES, BYTES.encode("a <b>\n"))._repr_html_()
    assert [f'title="{i}"' in text for i in b"a <b>\n"] == [True] * 6
    assert "<b>" not in text and "&lt;</span>" in text and "&nbsp;</span>" in text and "&crarr;<br></span>" in text


def test_tokens_by_value_go_from_white_to_red():
    text = show.tokens(BYTES, BYTES.encode("abc"), values=[0.0, 0.5, 1.0])._repr_html_()
    positions = [text.index(color) for color in ("#ffffff", "#ffb2b2", "#ff6464")]
    assert positions == sorted(positions)
    assert "98: 0.5" in text
    assert show.tokens(BYTES, [97, 98], values=[2, 2])._repr_html_().count("#ffffff") == 2


def test_a_value_for_each_token():
    with pytest.raises(UserError, match=r"expected 2 numbers, .* got shape \(3,\)"):
        show.tokens(BYTES, [97, 98], values=[1, 2, 3])


def test_maps_have_one_scale_of_colours_and_their_numbers():
    picture = show.maps({"low": [[0.0, 1.0]], "high": [[2.0, np.nan]]}, columns=["one", "two"], rows=["r"], x="key")
    low, high = picture.figure.axes[:2]
    assert low.images[0].get_clim() == high.images[0].get_clim() == (0, 2)
    assert [t.get_text() for t in low.texts + high.texts] == ["0", "1", "2"]
    halves = show.maps({"halves": [[0.5, 1.0]]}).figure.axes[0].texts
    assert [t.get_text() for t in halves] == ["0.50", "1.00"]
    assert [t.get_text() for t in low.get_xticklabels()] == ["one", "two"]
    assert (low.get_title(), low.get_xlabel()) == ("low", "key")
    centred = show.maps({"a": [[-1.0, 3.0]]}, centred=True)
    assert centred.figure.axes[0].images[0].get_clim() == (-3, 3)


def test_more_maps_than_fit_in_a_row():
    picture = show.maps({str(i): np.ones((20, 20)) * i for i in range(5)}, per_row=3)
    assert [axis.axison for axis in picture.figure.axes[:6]] == [True] * 5 + [False]
    assert not picture.figure.axes[0].texts


@pytest.mark.parametrize("images", [{}, {"a": [1.0, 2.0]}, {"a": np.zeros((0, 3))}])
def test_maps_of_something_else(images):
    with pytest.raises(UserError, match="expected matrices"):
        show.maps(images)


def test_curves_and_the_picture_of_them(tmp_path):
    picture = show.curves({"train": ([0, 1, 2], [3.0, 2.0, 1.0]), "val": ([0, 2], [3.0, 2.5])}, x="step", log_y=True)
    (axis,) = picture.figure.axes
    assert [line.get_label() for line in axis.lines] == ["train", "val"]
    assert (axis.get_xlabel(), axis.get_yscale()) == ("step", "log")
    assert len(axis.get_legend().get_texts()) == 2
    assert picture._repr_png_().startswith(b"\x89PNG")
    picture.save(tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text(encoding="utf-8")
    picture.figure.canvas.draw()
    pixels = np.asarray(picture.figure.canvas.buffer_rgba())[..., :3]
    assert [(pixels == colour).all(-1).sum() > 200 for colour in ((31, 119, 180), (255, 127, 14))] == [True, True]


def test_places_on_the_axis_are_named_where_they_are():
    def labels(**options):
        picture = show.curves({"a": ([256, 512, 4096], [1, 2, 3])}, **options)
        picture.figure.canvas.draw()
        return [t.get_text() for t in picture.figure.axes[0].get_xticklabels(which="both")]

    assert labels(log_x=True) == ["256", "512", "4096"]
    steps = show.curves({"a": (range(3), [1, 2, 3])}).figure
    steps.canvas.draw()
    assert {float(place).is_integer() for place in steps.axes[0].get_xticks()} == {True}


def test_no_curve():
    with pytest.raises(UserError, match="expected at least one"):
        show.curves({})


@pytest.mark.parametrize(("low", "high"), [(0.7, 6.0), (0.03, 5.0), (1e-4, 1e3)])
def test_a_logarithmic_axis_has_numbers_as_they_are_written(low, high):
    picture = show.curves({"a": (range(2), [low, high])}, log_y=True)
    picture.figure.canvas.draw()
    (axis,) = picture.figure.axes
    inside = [t.get_text() for t in axis.get_yticklabels(which="both") if low / 2 <= t.get_position()[1] <= high * 2]
    assert len(inside) >= 3 and all(float(text) > 0 for text in inside)  # plain decimals such as 0.5, not 5 x 10^-1


def test_the_rates_of_a_sweep_are_on_a_logarithmic_axis_and_their_labels_apart(tmp_path, monkeypatch):
    from gptjax.training import plot

    kept = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: kept.append(figure))
    rates = [0.001, 0.00101, 0.00125, 0.0015, 0.002, 0.003, 0.004, 0.006]
    rows = [{"optim.lr": rate, "val/loss": 1.0, "val/loss/high": 1.1} for rate in rates]
    plot.draw_sweep(rows, rows, ["optim.lr"], {(r,): [np.ones(40)] for r in rates}, tmp_path / "x.png")
    (figure,) = kept
    left = figure.axes[0]
    figure.canvas.draw()
    assert left.get_xscale() == "log"
    texts = left.get_xticklabels(which="both")
    assert [t.get_text() for t in texts] == [f"{r:g}" for r in rates if r != 0.00101]
    starts = [t.get_window_extent().x1 for t in texts]  # rotated labels, right-aligned at their ticks
    assert np.diff(starts).min() > 10
