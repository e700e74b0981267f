"""The names at the top of the package, after every module of it has been imported."""

import pkgutil
from importlib import import_module
from types import ModuleType

import dpsb


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    for module in pkgutil.walk_packages(dpsb.__path__, "dpsb."):
        if not module.name.endswith("__main__"):  # that one runs the command line
            import_module(module.name)
    for name in dpsb.__all__:
        assert not isinstance(getattr(dpsb, name), ModuleType), name
