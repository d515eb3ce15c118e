"""The README's numbers are those of bench/results, and these are of the format that is documented."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

import bench.readme
from bench.architectures import architecture
from bench.cli import main
from bench.readme import BLOCK, BLOCKS, RESULTS, filled, read, versions
from bench.roofline import roofline
from bench.rows import SCHEMA


def test_numbers_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["readme", "--check"]) == 0, capsys.readouterr().out
    assert {name for _, name, _ in BLOCK.findall(bench.readme.README.read_text())} == {*BLOCKS}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_the_format(path: Path) -> None:
    content = json.loads(path.read_text())
    if path.stem == "launches":  # counted, not run
        assert content.keys() == {"planned", "diffusers", "versions"}
        return
    jsonschema.validate(content, SCHEMA)
    assert content["environment"]["uncommitted_changes"] is False
    assert any(row["status"] == "ok" for row in content["rows"])


@pytest.mark.parametrize("name", ["cifar10-32", "demo"])
def test_launches_are_counted_as_committed(name: str) -> None:
    counted, committed = roofline(architecture(name), 1), read("launches")
    assert committed["planned"][name]["1"] == counted["planned"]["launches"]
    if committed["versions"] == versions():  # another release may do other operations
        assert committed["diffusers"][name] == counted["diffusers"]["ops"]


def test_another_number_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = bench.readme.README.read_text()
    changed = tmp_path / "README.md"
    changed.write_text(re.sub(r"(?<=\| cifar10-32 \| )\d+", "12", text))
    monkeypatch.setattr(bench.readme, "README", changed)
    assert main(["readme", "--check"]) == 1
    assert "run python -m bench readme" in capsys.readouterr().out
    monkeypatch.setattr(bench.readme, "count_launches", lambda: read("launches"))
    monkeypatch.setattr(bench.readme, "write_json", lambda path, content: None)
    assert main(["readme"]) == 0
    assert changed.read_text() == text


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="a block of numbers 'gpu'; expected one of architectures, "):
        filled("<!-- numbers: gpu -->\n<!-- end -->")


def test_a_variant_that_was_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    content = read("cpu_cifar10-32")
    for row in content["rows"]:
        if (row["batch"], row["variant"]) == (1, "ours-compiled"):
            row |= {"ms_per_step": None, "compile_s": None}
    monkeypatch.setattr(bench.readme, "read", lambda name: content)
    text = bench.readme.cpu()
    assert "| batch 1 | - |" in text
    assert "s at batch 1" not in text
    assert "s at batch 4" in text
