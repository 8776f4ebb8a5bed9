"""What the pictures show: where points are, and how large."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from comparisons import settings, write_config
from made_up import write_results

from qadapter.compare import read_config, read_results
from qadapter.compare.drawing import MARKERS, marker_size, size_of
from qadapter.compare.pictures import draw_all, draw_frontier, draw_old_margins, draw_razor


@pytest.fixture
def comparison(tmp_path):
    """Three trained rows and two controls, all with the same numbers."""
    methods = {name: settings()["methods"][name] for name in ("sft", "dpo", "q", "asked", "back")}
    config = read_config(write_config(tmp_path, methods=methods, sweeps={}))
    write_results(config, tmp_path / "out")
    return read_results(config, tmp_path / "out", "validation")


def lines(axes) -> list:
    """Those that show something."""
    return [line for line in axes.lines if len(line.get_xdata())]


def points(axes, marker: str) -> list:
    return [line for line in lines(axes) if line.get_marker() == marker]


def test_a_point_grows_with_what_its_training_took(comparison):
    rows = {r.row.name: r for r in comparison.results}
    for name, seconds in (("sft", 3.0), ("dpo", 48.0), ("q", 768.0)):
        rows[name].trainings[0]["processor_seconds"] = seconds
    figure = draw_frontier(comparison)
    found = [
        max(line.get_markersize() for line in points(figure.axes[0], MARKERS[number]))
        / marker_size(number, 1) for number in range(3)
    ]
    assert found == pytest.approx([size_of(3), 2 * size_of(3), 4 * size_of(3)])
    told = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert {"3", "30", "1,000", "training, processor seconds:"} <= set(told)


def test_a_dial_that_was_not_trained_is_a_curve_and_no_cross(comparison):
    """Weights of base and tuned mixed are a row with a dial and without a training."""
    untrained = [
        dataclasses.replace(r, trainings=[]) if r.row.name == "q" else r for r in comparison.results
    ]
    names = [
        line.get_label() for figure in (
            draw_frontier(dataclasses.replace(comparison, results=untrained)),
            draw_razor(dataclasses.replace(comparison, results=untrained)),
        ) for line in figure.axes[0].lines if line.get_linestyle() != "None"
    ]
    assert names.count("q") == 2


def test_what_is_forgotten_stands_over_what_is_moved(comparison):
    [base, sft, *_] = comparison.results
    settings_of = zip(sft.runs[0]["dial"], (0.02, 0.5), (0.001, 0.01), strict=True)
    for point, moved, forgotten in settings_of:
        point["answers"]["new"]["kl_on_base_answers"] = moved
        point["retention"]["texts"]["kl_per_token"] = forgotten
    [axes] = draw_razor(dataclasses.replace(comparison, results=[base, sft])).axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    shown = {(*line.get_xdata(), *line.get_ydata()) for line in points(axes, MARKERS[0])}
    assert shown == {(0.02, 0.001), (0.5, 0.01)}


def test_margins_of_old_pairs_change_by_quarters_of_the_base(comparison):
    base, dpo = comparison.results[0], comparison.reference
    margins = np.array([3.0, -1.0, np.nan, 2.0, 0.0, 1.0, -2.0, 4.0, 5.0])
    changes = np.array([0.5, -0.1, 9.0, 0.5, 0.2, 0.4, -0.3, 0.6, 0.8])
    base.runs[0]["preferences"]["old"]["policy_margins"] = margins.tolist()
    dpo.runs[0]["preferences"]["old"]["policy_margins"] = (margins + changes).tolist()
    [axes] = draw_old_margins(dataclasses.replace(comparison, results=[base, dpo])).axes
    [curve] = points(axes, MARKERS[0])
    assert list(curve.get_ydata()) == pytest.approx([-0.2, 0.3, 0.5, 0.7])
    assert [x.get_text().split()[-1] for x in axes.get_xticklabels()] == [
        "-1.50", "0.50", "2.50", "4.50",
    ]


def test_pictures_without_what_they_show_are_left_out(comparison):
    assert {"razor", "old_margins"} <= {picture.name for picture in draw_all(comparison)}
    # Results of before the margins were kept; a preference that nothing was learned before.
    del comparison.results[0].runs[0]["preferences"]["old"]["policy_margins"]
    assert draw_old_margins(comparison) is None
    del comparison.results[0].runs[0]["preferences"]["old"]
    assert draw_old_margins(comparison) is None
    unasked = dataclasses.replace(comparison, judges={"new": {}, "old": {}})
    assert draw_razor(unasked) is None


def test_every_name_fits_on_the_picture(comparison):
    """Many rows, and names as long as a label may be."""
    [base, sft, *_] = comparison.results
    many = [
        dataclasses.replace(sft, row=dataclasses.replace(sft.row, name=f"{i} {'long name ' * 4}"))
        for i in range(26)
    ]
    for draw in (draw_frontier, draw_razor, draw_old_margins):
        figure = draw(dataclasses.replace(comparison, results=[base, *many]))
        figure.draw_without_rendering()
        names = figure.legends[0].get_window_extent()
        assert len(figure.legends[0].get_texts()) == 26
        assert 0 <= names.x0 and names.x1 <= figure.bbox.width
        assert figure.axes[0].get_window_extent().height > 300
