"""The shape of the project: arrows between its parts, packages in the wheel, what an import does, style."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import pip._vendor.tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kernels", "recipes", "eval")
# Which parts a part may import; `cli` alone may import everything.
ARROWS = {
    "kernels": {"kernels"},
    "spikelm": {"kernels", "spikelm"},
    "recipes": {"kernels", "spikelm", "recipes"},
    "eval": {"kernels", "spikelm", "eval"},
}


def sources(part):
    return [path for path in sorted((ROOT / part).rglob("*.py")) if path != ROOT / "spikelm" / "cli.py"]


def imported(path):
    """The parts that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "spikelm":
                part = rest.split(".")[0]
                yield part if part in PARTS else "spikelm"
            elif first in PARTS:
                pytest.fail(f"{path}: {first}/ is imported as spikelm.{first}, never as {first}")


@pytest.mark.parametrize("part", ["kernels", "spikelm", "recipes", "eval"])
def test_arrows_point_one_way(part):
    for path in sources(part):
        strangers = set(imported(path)) - ARROWS[part]
        assert not strangers, f"{path.relative_to(ROOT)} imports {', '.join(strangers)}"


def test_mapped_folders_are_flat_and_no_packages():
    for part in PARTS:
        assert not (ROOT / part / "__init__.py").exists(), part
        assert all(path.parent == ROOT / part for path in (ROOT / part).rglob("*.py")), part


def test_wheel_holds_every_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "spikelm").rglob("__init__.py")}
    mapped = {f"spikelm.{part}" for part in PARTS if list((ROOT / part).glob("*.py"))}
    assert listed == packages | mapped


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options)


def test_import_defines_no_kernel_and_registers_the_auto_classes():
    # torch itself looks for triton; what must not happen is that kernels are defined, or pictures drawn.
    code = (
        "import sys, spikelm; from transformers import AutoConfig;"
        "assert not [m for m in sys.modules if m.endswith('_triton') and m.startswith('spikelm')];"
        "assert 'matplotlib' not in sys.modules;"
        "print(type(AutoConfig.for_model('spikelm')).__name__)"
    )
    done = run(code)
    assert done.stdout.strip() == "SpikeLMConfig", done.stderr


def test_a_package_called_kernels_is_left_alone(tmp_path):
    """Hugging Face's `kernels` library wins over the folder of the same name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("HERE = 'theirs'\n")
    done = run(f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.HERE); import spikelm")
    assert done.stdout.strip() == "theirs" and done.returncode == 0, done.stderr


def test_whoever_forgets_the_import_is_told(tmp_path):
    from small_models import small_config

    small_config().save_pretrained(tmp_path)
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path)!r})"
    done = run(code, stdin=subprocess.DEVNULL)
    assert done.returncode and "import spikelm" in done.stderr


def test_no_machine_paths_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    files = [ROOT / name for name in listed if name.endswith((".py", ".md", ".toml", ".yaml", ".yml"))]
    found = [f"{path.name}: {line}" for path in files for line in path.read_text(encoding="utf-8").splitlines()
             if re.search(r"(^|[^\w.])/(home|root|tmp|Users)/\w", line)]  # fmt: skip
    assert not found


@pytest.mark.parametrize("arguments", [["check", "."], ["format", "--check", "."]], ids=["lint", "format"])
def test_ruff(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_types():
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "spikelm", "eval", "kernels", "recipes"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
