"""The page's colours for the two arrows, whose gap is the loss: told apart in light and dark, whatever eyes see."""

import re

import numpy as np
import pytest

from tutorials.playground.page import PARTS

# What people with protanopia, deuteranopia and tritanopia see of linear RGB (Machado, Oliveira and Fernandes, 2009)
VISION = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = XYZ @ rgb.clip(0, 1) / XYZ.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(a: str, b: str) -> float:
    """As WCAG has it."""
    dark, light = sorted(XYZ[1] @ linear(colour) + 0.05 for colour in (a, b))
    return light / dark


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_two_arrows_are_told_apart_with_every_vision(scheme, vision):
    """They once were brown and green, 33 apart in CIELAB for a protanope, and the brown 10 from the red lines."""
    css = (PARTS / "page.css").read_text().split("prefers-color-scheme")[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w+);", css))
    colours = {k: "#" + "".join(2 * c for c in v[1:]) if len(v) == 4 else v for k, v in colours.items()}
    seen = {name: lab(VISION[vision] @ linear(colours[name])) for name in ("df", "u", "error", "dot", "start")}
    assert np.linalg.norm(seen["df"] - seen["u"]) > 45
    for arrow in ("df", "u"):
        for other, least in (("error", 30), ("start", 25), ("dot", 5)):
            assert np.linalg.norm(seen[arrow] - seen[other]) > least, (arrow, other)
        for behind in ("page", "card"):
            assert contrast(colours[arrow], colours[behind]) >= 4.5  # they are words, too
