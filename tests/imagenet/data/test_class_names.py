"""Classes by name, and `from imagenet import load_generator`."""

import subprocess
import sys
from dataclasses import replace

import pytest

from imagenet.config import Config
from imagenet.data.class_names import class_names, class_number

DIGITS = Config()
IMAGENET = replace(DIGITS, data="latents", classes=1000)


def test_imagenet_s_names_have_the_numbers_of_the_data_set():
    """Facts about ILSVRC 2012 in its usual order; torchvision lists them."""
    names = class_names(IMAGENET)
    assert len(set(names)) == 1000
    known = {"tench": 0, "goldfish": 1, "golden retriever": 207, "Tabby": 281, "tiger cat": 282, "toilet tissue": 999}
    assert {name: class_number(name, IMAGENET) for name in known} == known
    assert class_number("282", IMAGENET) == class_number(282, IMAGENET) == 282


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("golden retreiver", IMAGENET, "close are golden retriever"),
        ("retriever", IMAGENET, "close are .*labrador retriever"),
        ("1000", IMAGENET, "must lie in 0 to 999, got 1000"),
        ("cat", replace(DIGITS, data="latents", classes=7), "have no names: say --classes by numbers"),
        ("ten", DIGITS, "no class is named 'ten'"),
    ],
)
def test_a_class_that_is_not_there_is_refused_with_advice(name, config, message):
    with pytest.raises(ValueError, match=message):
        class_number(name, config)


def test_classes_of_a_folder_have_the_names_of_its_folders():
    """A model of shoes once drew "golden retriever", and one of ten classes refused their names."""
    shoes = replace(DIGITS, data="latents", classes=3)
    assert [class_number(name, shoes, ("Bag", "Boot", "Coat")) for name in ("coat", "Bag", "1")] == [2, 0, 1]
    many = [f"shoe {i}" for i in range(1000)]
    with pytest.raises(ValueError, match="no class is named 'golden retriever'"):
        class_number("golden retriever", IMAGENET, many)
    assert class_number("golden retriever", IMAGENET, [f"n{i:08d}" for i in range(1000)]) == 207


def test_without_torchvision_names_are_refused_and_numbers_serve(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need torchvision"):
        class_number("tabby", IMAGENET)
    assert class_number(281, IMAGENET) == 281


def test_the_package_is_light_until_something_is_asked_of_it():
    code = "import imagenet, sys; assert 'torch' not in sys.modules; imagenet.no_such_thing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'no_such_thing'" in done.stderr, done.stderr
