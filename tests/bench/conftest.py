"""A tiny checkpoint; and contestants in this process, where tests can reach them, and start at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.limits
import bench.measure
import bench.report
from bench.contestant import Contestant, Failed, reason
from bench.gpu_state import GpuState
from bench.limits import Demand
from bench.measure import Comparison, Plan, expected_images
from bench.rows import Row
from bench.setting import Setting, chain_timesteps
from bench.source import Source
from bench.variant import Make

CPU = torch.device("cpu")
LITTLE = Demand(1, 1)


class Here:
    """A Contestant whose errors are Failed, as those from another process are."""

    def __init__(self, make: Make, setting: Setting, plan: Plan):
        self.contestant = Contestant(make, setting)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            try:
                return getattr(self.contestant, name)(*arguments)
            except Exception as error:
                raise Failed(reason(error)) from error

        return call


def compared(
    setting: Setting,
    plan: Plan,
    needs: Demand = LITTLE,
    ceilings: Sequence[dict[str, Any]] = (),
    gpu: torch.device = CPU,
) -> list[Row]:
    """Rows of one comparison, while the state of `gpu` is read."""
    rows: list[Row] = []
    with GpuState(gpu) as state:
        Comparison(setting, plan, state, needs, ceilings).run(expected_images(setting, plan), rows.append)
    return rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers import save_tiny  # needs diffusers, which other tests of this folder do not

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_setting(tiny: Path) -> Setting:
    """Two images, two steps, one round."""
    source = Source("tiny", str(tiny), stock=str(tiny))
    chain = chain_timesteps(source.load(), 2)
    return Setting(source, torch.device("cpu"), "fp32", batch=2, timesteps=chain, rounds=1)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants in this process, and ceilings measured in no time."""
    monkeypatch.setattr(bench.measure, "enter", Here)
    monkeypatch.setattr(bench.limits, "SIZES", {"cpu": (64, 1, 2**16), "cuda": (64, 1, 2**16)})
    monkeypatch.setattr(bench.limits, "WINDOW_S", 1e-3)


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages take a second each, and have tests of their own."""
    monkeypatch.setattr(bench.report, "write_page_of", lambda *_: [])
