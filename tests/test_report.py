"""What a report promises: a file that needs nothing beside it, the same picture for the same data, readable numbers."""

import base64
import io

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.image import imread

from wmengine.report import html, pictures


def panel(**changes):
    values = {
        "title": "bits",
        "total": 64,
        "chance": 0.5,
        "threshold": 55,
        "suspects": [("copy", 64, "owned"), ("stranger", 30, "not_proven"), ("broken", 0, "error")],
        "others": [28, 30, 33],
    }
    return pictures.MatchRates(**{**values, **changes})


def test_the_same_data_gives_the_same_picture_byte_for_byte():
    first, second = (pictures.svg(pictures.match_rates([panel(), panel(title="labels")])) for _ in range(2))
    assert first == second
    assert first != pictures.svg(pictures.match_rates([panel(), panel(title="labels", others=[28, 30, 34])]))


def test_match_rates_show_every_suspect_the_bar_and_chance():
    (axis,) = pictures.match_rates([panel()]).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "copy",
        "stranger",
        "broken",
        "other keys' marks (3)",
    ]
    verticals = {
        float(line.get_xdata()[0]) for line in axis.lines if list(line.get_xdata()) == [line.get_xdata()[0]] * 2
    }
    assert {0.5, 55 / 64} <= verticals
    points = [float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"]
    assert points == [1.0, 30 / 64, 0.0]


def test_a_mark_that_no_number_of_matches_proves_has_no_bar():
    (axis,) = pictures.match_rates([panel(threshold=None, others=())]).axes
    assert not any("owned from" in text.get_text() for text in axis.texts)
    assert len(axis.get_yticklabels()) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_sheet_shows_each_image_over_its_own_range(channels):
    images = np.linspace(-1, 1, 5 * channels * 16).reshape(5, channels, 4, 4)
    figure = pictures.image_sheet(images, ["a", "b", "c", "d", "e"], columns=3)
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(shown) == 5
    assert all(float(np.min(pixels)) == 0.0 and float(np.max(pixels)) == 1.0 for pixels in shown)
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["a", "b", "c", "d", "e"]
    assert imread(io.BytesIO(pictures.png(figure))).shape[2] in (3, 4)


def test_inputs_that_are_no_images_have_no_sheet():
    with pytest.raises(ValueError, match=r"images must be \[N, 1 or 3, H, W\]"):
        pictures.image_sheet(np.zeros((4, 64)), range(4))
    with pytest.raises(ValueError, match="a caption each"):
        pictures.image_sheet(np.zeros((4, 1, 8, 8)), range(3))


def test_a_constant_image_is_shown_without_a_division_by_zero():
    pictures.png(pictures.image_sheet(np.full((1, 1, 4, 4), 7), ["flat"]))


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (html.percent, 0.98667, "98.7 %"),
        (html.percent, 1.0, "100.0 %"),
        (html.points, 0.0167, "+1.7"),
        (html.points, -0.005, "−0.5"),
        (html.points, -0.0001, "0.0"),
        (html.log10_p, -77.063, "−77.1"),
        (html.log10_p, -0.01, "0.0"),
        (html.log10_p, 0.0, "0.0"),
        (html.log10_p, -12345.67, "−12345.7"),
        (html.level, 1e-9, "10⁻⁹"),
        (html.level, 2.5e-12, "2.5 · 10⁻¹²"),
        (html.level, 0.002, "0.002"),
    ],
)
def test_numbers_are_written_as_people_read_them(function, value, text):
    assert function(value) == text


def test_an_image_travels_inside_the_page():
    uri = html.data_uri(b"\x89PNG", "image/png")
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.partition(",")[2]) == b"\x89PNG"


def test_a_value_that_the_template_needs_and_lacks_raises():
    with pytest.raises(UndefinedError):
        html.render("demo.html.j2")


def test_a_page_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "report.html"
    html.write(path, "<p>old</p>")
    html.write(path, "<p>new ✓</p>")
    assert path.read_text(encoding="utf-8") == "<p>new ✓</p>"
    assert list(tmp_path.iterdir()) == [path]
