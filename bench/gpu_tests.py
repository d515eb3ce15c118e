"""Runs `pytest -m gpu` in a process of its own and counts what happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.environment import ROOT

# A test file that needs one of these is left out where it is missing; any other error of a file is a failure.
OPTIONAL = (
    "click",
    "diffusers",
    "huggingface_hub",
    "jinja2",
    "jsonschema",
    "matplotlib",
    "PIL",
    "pynvml",
    "pytest_benchmark",
    "rich",
    "tqdm",
)


def run_gpu_tests(seconds: float) -> dict[str, Any]:
    """passed, failed, skipped; failures (names); not_collected (files that need a missing package); problem, or None.

    Args:
        seconds: the tests are stopped after this time, which is a problem.
    """
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        problem = run_pytest(junit, seconds)
        counts = read_junit(junit)
    if problem is None and counts is None:
        problem = "pytest left no report"
    empty = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "not_collected": []}
    return {**(counts or empty), "problem": problem}


def run_pytest(junit: Path, seconds: float) -> str | None:
    """What went wrong with pytest itself, or None; its report goes to `junit`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={junit}"]
    # Files of tests that import what is not installed must not keep the others from running.
    command.append("--continue-on-collection-errors")
    # The interpreter is for machines without a GPU.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what a test started, which would be on the GPU
        process.wait()
    # 0 to 2: tests passed, failed, or some files were not collected; 5: no test. The report tells these apart.
    return None if code in (0, 1, 2, 5) else f"pytest ended with code {code}"


def read_junit(junit: Path) -> dict[str, Any] | None:
    try:
        report = ElementTree.parse(junit)
    except (FileNotFoundError, ElementTree.ParseError):  # pytest was killed before it was written, or meanwhile
        return None
    passed, skipped = 0, 0
    failures: list[str] = []
    not_collected: list[str] = []
    for case in report.iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        error = case.find("error")
        if error is not None and error.get("message") == "collection failure":
            missing = missing_package(error.text or "")
            if missing:
                not_collected.append(f"{name} ({missing} is not installed)")
            else:
                failures.append(f"{name} (not importable)")
        elif error is not None or case.find("failure") is not None:
            failures.append(name)
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {
        "passed": passed,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
        "not_collected": not_collected,
    }


def missing_package(text: str) -> str | None:
    """The optional package whose absence a collection error reports, if that is what it reports."""
    names = re.findall(r"ModuleNotFoundError: No module named '([\w]+)", text)
    return names[-1] if names and names[-1] in OPTIONAL else None
