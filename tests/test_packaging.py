"""What is installed, and what a checkout's root must not shadow: Hugging Face has a package named kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names of the files in the wheel, built from a copy so that the checkout stays as it is."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("ddpm", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheels_only_package_is_ddpm(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ddpm"}


def test_the_wheel_holds_the_kernels_the_loaders_and_the_demo(wheel):
    for folder, pattern in (("kernels", "*.py"), ("ddpm", "*.py"), ("ddpm/checkpoints", "*.py")):
        for path in (ROOT / folder).glob(pattern):
            name = f"ddpm/kernels/{path.name}" if folder == "kernels" else f"{folder}/{path.name}"
            assert name in wheel
    demo = ROOT / "ddpm" / "assets" / "emoji32-smileys"
    files = [p for p in demo.rglob("*") if p.is_file()]
    assert len(files) >= 4
    for path in files:
        assert path.relative_to(ROOT).as_posix() in wheel
    assert "ddpm/py.typed" in wheel


def test_the_kernels_are_refused_under_their_bare_name():
    result = python("import kernels")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "ddpm.kernels" in last


def test_diffusers_imports_from_the_checkouts_root():
    result = python("import diffusers; from diffusers import DDPMPipeline, UNet2DModel; print(UNet2DModel.__name__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "UNet2DModel"


WITHOUT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
"""


def test_the_kernels_import_without_triton(tmp_path):
    """sys.modules[...] = None makes every later import of it an ImportError."""
    code = WITHOUT.format(blocked=["triton", "triton.language"]) + (
        "import pathlib\n"
        "import torch\n"
        "from ddpm.kernels import backend\n"
        "for path in sorted(pathlib.Path('kernels').glob('*.py')):\n"
        "    if path.stem != '__init__':\n"
        "        __import__(f'ddpm.kernels.{path.stem}')\n"
        "assert not backend.HAVE_TRITON\n"
        "assert not backend.uses_triton(torch.device('cpu'))\n"
        "import ddpm\n"
        "from ddpm.cli import DEMO\n"
        "images = ddpm.load(DEMO, device='cpu', compile=False).sample(1, seeds=[0], steps=1, progress=False)\n"
        "assert images.isfinite().all()\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_sampling_needs_neither_diffusers_nor_click_nor_tqdm_nor_pillow():
    code = WITHOUT.format(blocked=["diffusers", "click", "tqdm", "PIL", "huggingface_hub"]) + (
        "import ddpm\n"
        "sampler = ddpm.load('ddpm/assets/emoji32-smileys', device='cpu', compile=False)\n"
        "assert sampler.sample(1, seeds=[0], steps=1).shape == (1, 3, 32, 32)\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_the_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from ddpm.cli import main\n"
        "assert CliRunner().invoke(main, ['sample', '--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_the_version_is_one():
    import ddpm

    assert f'version = "{ddpm.__version__}"' in (ROOT / "pyproject.toml").read_text()
