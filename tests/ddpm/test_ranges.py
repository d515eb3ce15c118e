"""Named ranges, for torch's profiler and NVIDIA's tools."""

from __future__ import annotations

import pytest
import torch

from ddpm.ranges import named_range

CUDA = torch.device("cuda", 0)


class FakeNvtx:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def range_push(self, name: str) -> None:
        self.calls.append(name)

    def range_pop(self) -> None:
        self.calls.append("pop")


def test_a_range_of_a_gpu_is_closed_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    with pytest.raises(KeyError), named_range("ddpm step 3", CUDA):
        {}["nothing"]
    with named_range("ddpm step 4", torch.device("cpu")):
        fake.calls.append("on the CPU")
    assert fake.calls == ["ddpm step 3", "pop", "on the CPU"]


def test_a_build_without_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise RuntimeError("NVTX functions not installed")

    fake = FakeNvtx()
    fake.range_push = absent
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    with named_range("ddpm step 0", CUDA):
        fake.calls.append("inside")
    assert fake.calls == ["inside"]


def test_a_profiler_records_it() -> None:
    with torch.profiler.profile() as profiler, named_range("ddpm step 7", torch.device("cpu")):
        torch.ones(2).sum()
    (event,) = [event for event in profiler.events() if event.name == "ddpm step 7"]
    assert {child.name for child in event.cpu_children} >= {"aten::ones", "aten::sum"}
