"""A small GPU for the interpreter: fewer, longer programs, which it runs faster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ddpm.kernels import backend


@pytest.fixture(autouse=True)
def _small_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two multiprocessors: small networks then have layers of every form, with and without parts of K."""
    if request.node.get_closest_marker("interpret"):
        monkeypatch.setattr(backend, "H100", replace(backend.H100, name="small", sms=2))
