"""What the packages export is public, documented, and all of it is listed."""

from __future__ import annotations

import importlib
import inspect

import pytest


@pytest.mark.parametrize("package", ["latentrt.runtime", "latentrt.export"])
def test_all_is_what_the_package_offers(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert not name.startswith("_")
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
            assert value.__module__.startswith("latentrt."), f"{package}.{name} is not ours"


def test_the_runtime_offers_the_names_of_the_readme() -> None:
    import latentrt.runtime

    assert {"Pipeline", "open_bundle", "LatentrtError"} <= set(latentrt.runtime.__all__)
