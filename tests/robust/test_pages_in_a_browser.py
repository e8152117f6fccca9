"""Every kind of page in a real browser: by day and by night, on a desk and on a phone, without the network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from robust.comparison import Line
from robust.comparison_folder import write_comparison
from robust.judged_run import judged_runs
from robust.report_folder import write_report
from robust.runs_page import write_runs_page
from tests.robust.browser import needs_browser, screenshot, seen
from tests.robust.test_plots import report
from tests.robust.test_report_folder import images
from tests.robust.test_runs_page import three_runs

DESK, PHONE = 1100, 390

pytestmark = needs_browser


def single(folder: Path) -> Path:
    return write_report(report(), folder / "run", images=images())


def several(folder: Path) -> Path:
    return write_runs_page(judged_runs(three_runs(folder)), folder / "runs.html")


def attacked(folder: Path) -> Path:
    line = Line("a_run_with_quite_a_long_name", "best", "autoattack", 10, 0.9, 0.8, 0.5, 0.2, "class", 0.1, -0.1)
    return write_comparison([line], {"a_run_with_quite_a_long_name": [(1.0, 0.4), (2.0, 0.5)]}, folder)


@pytest.mark.parametrize("make", [single, several, attacked])
def test_a_page_fits_the_screen_turns_dark_and_asks_for_nothing(make: Callable[[Path], Path], tmp_path: Path) -> None:
    page = make(tmp_path)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", re.sub(r'"data:[^"]*"', "", page.read_text()))
    day, night = (seen(page, (DESK, PHONE), dark, tmp_path) for dark in (False, True))
    for look in (day, night):
        for width in (DESK, PHONE):
            assert look[width].scroll_width <= width, "the page scrolls to the side"
            assert look[width].images == look[width].drawn > 0, "a picture is broken"
            assert look[width].outside == 0, "the page asks for something outside itself"
    for width in (DESK, PHONE):
        assert luminance(day[width].background) > 0.9 > 0.2 > luminance(day[width].text)
        assert luminance(night[width].background) < 0.2 < 0.8 < luminance(night[width].text)


@pytest.mark.slow
def test_screenshots_show_a_light_and_a_dark_page_with_something_on_it(tmp_path: Path) -> None:
    page = several(tmp_path)
    for width in (DESK, PHONE):
        day, night = (imread(screenshot(page, width, dark, tmp_path))[..., :3] for dark in (False, True))
        assert day.shape == night.shape and day.shape[1] == width
        assert np.median(day) > 0.9 and np.median(night) < 0.2
        for shot in (day, night):
            grey = shot.mean(axis=2)
            assert (abs(grey - np.median(grey)) > 0.3).mean() > 0.01, "nothing is to be seen on the page"
            # Pictures drawn for the other appearance would be large bright or dark panels.
            assert (abs(grey - np.median(grey)) > 0.3).mean() < 0.25


def test_the_measurement_sees_what_it_is_to_find(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    wide = '<div style="width:700px">x</div>'
    broken.write_text(f'<html><body>{wide}<img src="http://example.org/x.png"></body></html>')
    look = seen(broken, (PHONE,), False, tmp_path)[PHONE]
    assert look.scroll_width > PHONE and look.outside == 1 and look.drawn == 0


def luminance(colour: str) -> float:
    """Mean of the channels of rgb(r, g, b), in [0, 1]."""
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765
