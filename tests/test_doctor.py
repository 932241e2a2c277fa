"""The check of an installation tells what is wrong, and nothing of a sound one."""

import importlib
import importlib.metadata
import sys

import jax
import pytest

from jaxmed import doctor


def test_this_installation_is_sound(capsys):
    assert doctor.main() == 0
    told = capsys.readouterr().out
    assert f"jax {jax.__version__}" in told and "all is well" in told
    assert told.count("a convolution and its gradient take") == len(jax.local_devices())


def test_a_missing_package_and_one_of_another_version_are_told(monkeypatch, capsys):
    version = importlib.metadata.version

    def changed(name):
        if name == "optax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "nibabel" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", changed)
    monkeypatch.setattr(doctor, "find_devices", lambda: iter(()))
    assert doctor.main() == 1
    told = capsys.readouterr().out
    assert "wrong  optax is missing; install it" in told
    assert "wrong  nibabel is 0.1; jaxmed works with" in told
    assert "wrong in 2 places" in told


def test_what_the_check_itself_needs_may_be_missing(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "jaxmed.doctor")
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    fresh = importlib.import_module("jaxmed.doctor")
    monkeypatch.setattr(fresh, "find_devices", lambda: iter(()))
    assert fresh.main() == 1
    assert "wrong  packaging.requirements is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("problem", ["fails", "differs"])
def test_a_device_that_computes_wrongly_is_told(monkeypatch, problem):
    def try_convolution(device):
        if problem == "fails":
            raise RuntimeError("no kernel image is available")
        return 0.1, 0.5

    monkeypatch.setattr(doctor, "_try_convolution", try_convolution)
    found = [told for kind, told in doctor.find_devices() if kind == "wrong"]
    assert len(found) == len(jax.local_devices())
    assert {"fails": "no kernel image", "differs": "off by 0.5"}[problem] in found[0]
