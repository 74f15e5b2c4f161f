"""Optional C++: never required, never silent about a compiler that fails."""

import pytest

from spikelm.kernels import cpp


@pytest.fixture(autouse=True)
def forget(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpp.library.cache_clear()
    yield
    cpp.library.cache_clear()


@pytest.mark.parametrize(("name", "value"), [("SPIKELM_CPP", "0"), ("CXX", "no-such-compiler")])
def test_it_can_be_missing(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert cpp.library("egru") is None


def test_a_compiler_that_fails_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="egru.cpp could not be compiled; torch is used"):
        assert cpp.library("egru") is None


@pytest.mark.parametrize("error", [RuntimeError("no home"), PermissionError("read only")], ids=["none", "read-only"])
def test_a_home_that_keeps_nothing_is_told(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setenv("CXX", "true")  # a compiler is there
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cpp.Path, "home" if isinstance(error, RuntimeError) else "mkdir", fail)
    with pytest.warns(UserWarning, match=str(error)):
        assert cpp.library("egru") is None


def test_it_is_compiled_once(tmp_path):
    if cpp.library("egru") is None:
        pytest.skip("needs a C++ compiler")
    (built,) = (tmp_path / "spikelm").iterdir()
    changed = built.stat().st_mtime_ns
    cpp.library.cache_clear()
    assert cpp.library("egru") and built.stat().st_mtime_ns == changed
