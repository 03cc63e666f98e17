"""The contrast of text and signs in the style sheet, by WCAG 2.2: 4.5 for text, 3 for signs."""

import re
from pathlib import Path

import pytest

import trans_peft.ui

CSS = (Path(trans_peft.ui.__file__).parent / "static" / "style.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
)
BACKS = ("page", "surface", "good-back", "bad-back", "open-back")
TEXTS = ("text", "quiet", "link", "good", "bad", "open")


def luminance(color):
    """Return the relative luminance as WCAG defines it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_formula_has_the_known_ratios():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("back", BACKS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_can_be_read_on_every_background(colors, back, text):
    assert contrast(colors[text], colors[back]) >= 4.5


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_buttons_and_bars_can_be_seen(colors):
    assert contrast(colors["on-accent"], colors["accent"]) >= 4.5
    assert contrast(colors["accent"], colors["page"]) >= 3
    assert contrast(colors["accent"], colors["track"]) >= 3


def test_both_schemes_have_the_same_colors_and_rules_name_no_others():
    assert LIGHT.keys() == DARK.keys()
    rules = re.sub(r":root \{.*?\}", "", CSS, flags=re.DOTALL)
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?![^{]*\{)|rgb\(|hsl\(", rules)
    assert set(re.findall(r"var\(--([a-z-]+)\)", rules)) == LIGHT.keys()


def test_text_colors_are_those_that_are_checked():
    used = set(re.findall(r"(?<![-a-z])color: var\(--([a-z-]+)\)", CSS))
    assert used <= {*TEXTS, "on-accent"}
    backgrounds = set(re.findall(r"background: var\(--([a-z-]+)\)", CSS))
    assert backgrounds <= {*BACKS, "accent"}
    opacity = re.findall(r"opacity", CSS)
    assert not opacity
