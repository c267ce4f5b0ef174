import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from rayalign.report.charts import (
    MAX_DOTS,
    MAX_POINTS,
    Sample,
    Series,
    axis_over,
    format_number,
    histogram,
    histogram_counts,
    histogram_edges,
    line_chart,
    scatter,
    stretch_means,
    thin,
)


def texts(figure: str) -> list[str]:
    """All texts of a figure; raises where it is not well-formed XML."""
    return list(ElementTree.fromstring(figure).itertext())


def drawn_points(figure: str) -> int:
    """Points of the longest path."""
    paths: list[str] = re.findall(r'class="line [a-z ]+" d="([^"]*)"', figure)
    return max(path.count("L") + 1 for path in paths)


def test_ticks_are_round_and_hold_the_values() -> None:
    axis = axis_over([0.13, 0.97], count=4, outward=True)
    assert [axis.label(tick) for tick in axis.ticks] == ["0", "0.25", "0.50", "0.75", "1.00"]
    assert (axis.low, axis.high) == (0.0, 1.0)


def test_an_inward_axis_ends_where_the_values_end() -> None:
    axis = axis_over([1, 300], count=6, outward=False)
    assert (axis.low, axis.high) == (1, 300)
    assert axis.ticks == (50, 100, 150, 200, 250, 300)


def test_no_ticks_stand_between_whole_numbers() -> None:
    assert axis_over([1, 2, 3], count=6, outward=False).ticks == (1, 2, 3)
    assert axis_over([1, 2.5, 3], count=6, outward=False).ticks == (1, 1.5, 2, 2.5, 3)


@pytest.mark.parametrize("value", [0.0, 5e-5, -3.0, 1e90, 1e-300])
def test_an_axis_over_one_value_has_room_around_it(value: float) -> None:
    axis = axis_over([value], count=4, outward=True)
    assert axis.low < value < axis.high
    assert len(axis.ticks) >= 2


def test_tiny_values_have_scientific_ticks() -> None:
    axis = axis_over([0, 5e-5], count=4, outward=True)
    assert [axis.label(tick) for tick in axis.ticks] == ["0", "2e-05", "4e-05", "6e-05"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (300.0, "300"),
        (10_000, "10,000"),
        (0.78123, "0.7812"),
        (-1234.56, "-1,234.6"),
        (5e-5, "5e-05"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_written_with_four_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_thinning_keeps_the_ends_and_the_spike() -> None:
    points = [(float(step), 99.0 if step == 6_543 else math.sin(step)) for step in range(10_000)]
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (6_543.0, 99.0) in kept
    assert kept == sorted(kept)


def test_a_short_series_is_not_thinned() -> None:
    points = [(float(step), 1.0) for step in range(MAX_POINTS)]
    assert thin(points) == points


def test_stretch_means_are_the_means_of_equal_parts() -> None:
    assert stretch_means([(0, 1), (1, 3), (2, 10), (3, 20)], count=2) == [(0.5, 2.0), (2.5, 15.0)]


def test_a_line_chart_is_well_formed_and_tells_its_values() -> None:
    figure = line_chart(
        "Loss", [Series("train", [(1, 0.5), (2, 0.25)], "grey"), Series("eval", [(2, 0.3)], "blue", "marked")], x_label="step"
    )
    assert "step 1\ntrain: 0.5" in texts(figure)
    assert "step 2\ntrain: 0.25\neval: 0.3" in texts(figure)


def test_a_chart_of_ten_thousand_steps_is_thinned() -> None:
    points = [(float(step), math.sin(step)) for step in range(10_000)]
    assert drawn_points(line_chart("Loss", [Series("train", points, "blue")], x_label="step")) <= MAX_POINTS


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    points = [(1, 0.5), (2, math.nan), (3, math.inf), (4, -math.inf), (5, 0.7)]
    figure = line_chart("Loss", [Series("train", points, "blue")], x_label="step")
    assert drawn_points(figure) == 2
    assert "3 not finite" in figure
    assert "NaN" not in figure.replace("not finite", "")


def test_series_of_a_single_point_are_dots() -> None:
    series = [Series("train", [(7, 0.5)], "blue"), Series("eval", [(7, 0.25)], "orange", "marked")]
    figure = line_chart("Loss", series, x_label="step")
    assert figure.count('class="dot') == 2
    assert "step 7\ntrain: 0.5\neval: 0.25" in texts(figure)


def test_a_single_value_is_said_in_words() -> None:
    points = [(7, 0.5), (8, math.nan)]
    figure = line_chart("Loss", [Series("train", points, "blue"), Series("eval", [], "orange")], x_label="step")
    assert "0.5 (train) at step 7" in figure
    assert "<svg" not in figure


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_a_series_without_values_is_skipped(points: list[tuple[float, float]]) -> None:
    assert line_chart("Loss", [Series("train", points, "blue")], x_label="step") == ""
    assert histogram("Margins", [Sample("m", [y for _, y in points], "blue")], x_label="m", y_label="pairs") == ""
    assert scatter("Length", points, [""] * len(points), x_label="x", y_label="y", sign_names=("a", "b")) == ""


def test_histogram_counts_add_up() -> None:
    values = [k * 0.37 - 11.3 for k in range(1000)] + [0.0, 358.33, -11.3]
    counts = histogram_counts(values, histogram_edges(values))
    assert sum(counts) == len(values)


def test_a_value_just_below_a_tick_is_counted() -> None:
    values = [0.0, 2.0, -1e-85]
    edges = histogram_edges(values)
    assert edges[0] <= -1e-85
    assert sum(histogram_counts(values, edges)[:2]) == 2


def test_a_histogram_bin_holds_its_lower_edge_only() -> None:
    #                         [0, 1)     [1, 2)  [2, 3)
    assert histogram_counts([0, 0.999, 1, 2, 2.5], [0, 1, 2, 3]) == [2, 1, 2]


def test_no_histogram_bin_has_zero_inside() -> None:
    edges = histogram_edges([-1.7, 0.4, 5.1])
    assert 0.0 in edges
    assert edges[0] <= -1.7
    assert edges[-1] > 5.1


def test_bars_tell_the_count_of_every_sample() -> None:
    figure = histogram(
        "Rewards",
        [Sample("chosen", [1, 1, 2, math.nan], "blue"), Sample("rejected", [1], "orange")],
        x_label="reward",
        y_label="n",
    )
    titles = [text for text in texts(figure) if " to " in text]
    assert sum(int(n) for n in re.findall(r"chosen: (\d+)", "\n".join(titles))) == 3
    assert sum(int(n) for n in re.findall(r"rejected: (\d+)", "\n".join(titles))) == 1
    assert "chosen, mean 1.333 (1 not finite)" in texts(figure)


def test_a_histogram_of_equal_values_has_one_bar() -> None:
    figure = histogram("Rewards", [Sample("chosen", [0.0] * 40, "blue")], x_label="reward", y_label="n")
    assert figure.count('class="bar blue"') == 1


def test_a_scatter_plot_draws_every_pair_until_there_are_too_many() -> None:
    def dots(number: int) -> str:
        points = [(float(k % 50), float(k)) for k in range(number)]
        return scatter("Length", points, [str(k) for k in range(number)], x_label="x", y_label="y", sign_names=("a", "b"))

    assert dots(120).count('class="point') == 120
    assert dots(4000).count('class="point') == MAX_DOTS
    assert "1,500 of 4,000 shown" in dots(4000)


def test_hostile_names_stay_text_and_the_picture_well_formed() -> None:
    hostile = "</title><script>alert(1)</script>\" onload='x' &amp;"
    figures = [
        line_chart(hostile, [Series(hostile, [(1, 1), (2, 2)], "blue")], x_label=hostile),
        histogram(hostile, [Sample(hostile, [1, 2], "blue")], x_label=hostile, y_label=hostile),
        scatter(hostile, [(1, 1), (2, 2)], [hostile] * 2, x_label=hostile, y_label=hostile, sign_names=(hostile, hostile)),
    ]
    for figure in figures:
        assert hostile in texts(figure)
        assert "<script" not in figure
