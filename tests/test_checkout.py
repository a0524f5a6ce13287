"""Our names beside Hugging Face's package `kernels`: in a checkout, in wheels, and whatever is first on the path."""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import venv
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from looped import checkout

ROOT = Path(__file__).parents[1]
SITE = Path(torch.__file__).parents[1]
INSTALLED = [entry for entry in sys.path if entry.startswith((sys.prefix, sys.base_prefix))]

# Hugging Face's package in small: a version from its metadata, a submodule imported by its full name, a function.
HUGGING_FACE = {
    "kernels/__init__.py": """
        import importlib.metadata
        __version__ = importlib.metadata.version("kernels")
        from kernels.load import get_kernel
        __all__ = ["__version__", "get_kernel"]
    """,
    "kernels/load.py": "def get_kernel(name): return name",
    "kernels/layer/__init__.py": "class LayerRepository: pass",
    "kernels-0.17.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.9\n",
    "kernels-0.17.9.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}

BOTH = """
    import importlib.metadata, importlib.util
    assert importlib.util.find_spec("kernels") is not None
    {first}
    from kernels import get_kernel, looped_cross_entropy
    from kernels.layer import LayerRepository
    import kernels, kernels.load, looped.kernels
    from looped.kernels import radial_gradient
    assert get_kernel("a") == "a" and kernels.load.get_kernel is get_kernel
    assert kernels.__version__ == importlib.metadata.version("kernels") == "0.17.9"
    assert kernels.__spec__.name == "kernels" and list(kernels.__path__) == [{directory!r}], kernels.__path__
    for name in looped.kernels.__all__:
        assert getattr(kernels, name) is getattr(looped.kernels, name)
    assert looped_cross_entropy.__module__ == "looped.kernels.looped_cross_entropy"
    print(looped.kernels.__file__)
"""


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return directory


def run(program: str, *path: Path, cwd: Path) -> str:
    """Run a program as ``python -c`` does, with a PYTHONPATH and a directory. Returns what it has printed.

    Its process is the fork of one that has loaded nothing but PyTorch, which takes long and knows nothing of us.
    """
    with tempfile.NamedTemporaryFile("r") as printed:
        beginning = f"""
            import os, sys
            sys.stdout = sys.stderr = open({printed.name!r}, "w")
            sys.path = {["", *map(str, path), *INSTALLED]}
            os.chdir({str(cwd)!r})
        """
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo"])
        process = context.Process(target=exec, args=(textwrap.dedent(beginning) + textwrap.dedent(program), {}))
        process.start()
        process.join()
        assert process.exitcode == 0, printed.read()[-4000:]
        return printed.read()


# In a checkout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["import looped", "import kernels", "from kernels import get_kernel"])
def test_both_packages_are_served_by_the_shared_name(tmp_path, first):
    stub = write(tmp_path / "site", HUGGING_FACE)
    program = BOTH.format(first=first, directory=str(stub / "kernels"))
    run(program, stub, cwd=ROOT)  # the current directory, a checkout, is first on the path
    run(program, ROOT, stub, cwd=tmp_path)


def test_our_own_name_needs_no_place_on_the_path(tmp_path):
    stub = write(tmp_path / "site", HUGGING_FACE)
    program = """
        from looped.kernels import looped_cross_entropy
        import kernels
        print(kernels.__file__)
    """
    assert run(program, stub, ROOT, cwd=tmp_path) == f"{stub / 'kernels' / '__init__.py'}\n"


@pytest.mark.skipif(checkout.hugging_face() is not None, reason="Hugging Face's package is installed")
@pytest.mark.parametrize("first", ["kernels", "looped.kernels"])
def test_alone_the_shared_name_is_ours(tmp_path, first):
    program = f"""
        import importlib, importlib.util, sys
        from pathlib import Path
        assert importlib.util.find_spec("kernels") is not None
        import {first}
        import kernels, looped.kernels
        assert not hasattr(kernels, "__version__")  # by which transformers tells Hugging Face's
        assert sorted(kernels.__all__) == sorted(looped.kernels.__all__)
        for name in kernels.__all__:
            assert getattr(kernels, name) is getattr(looped.kernels, name)
        assert sys.modules["kernels.rms_norm"] is sys.modules["looped.kernels.rms_norm"]
        for path in Path({str(ROOT)!r}, "kernels").glob("[!_]*.py"):
            for package in ("kernels.", "looped.kernels."):  # what is loaded later has the second name alone
                try:
                    importlib.import_module(package + path.stem)
                except ModuleNotFoundError:
                    assert package == "kernels."
        here = Path({str(ROOT)!r}, "kernels").resolve()
        modules = {{id(m): Path(m.__file__).resolve() for m in sys.modules.values() if getattr(m, "__file__", None)}}
        files = [file for file in modules.values() if file.parent == here and file.name != "__init__.py"]
        assert len(set(files)) == len(files) > 10  # none is loaded twice
    """
    run(program, ROOT, cwd=tmp_path)


def test_which_package_is_hugging_faces(tmp_path, monkeypatch):
    stub = write(tmp_path / "site", HUGGING_FACE)
    second = tmp_path / "second"
    shutil.copytree(ROOT / "kernels", second / "kernels")
    (tmp_path / "data" / "kernels").mkdir(parents=True)

    def found(*path: str | Path) -> str | None:
        monkeypatch.setattr(sys, "path", [str(entry) for entry in path])
        spec = checkout.hugging_face()
        return None if spec is None else spec.origin

    monkeypatch.chdir(ROOT)
    assert found("", ROOT, second, tmp_path / "data") is None
    assert found("", second, stub) == str(stub / "kernels" / "__init__.py")
    assert found(stub, ROOT) == str(stub / "kernels" / "__init__.py")


def test_a_checkout_without_links(tmp_path):
    """As git leaves it on Windows: a file with the link's target in the link's place."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    shutil.copytree(ROOT / "looped", tmp_path / "looped", ignore=lambda *_: ["kernels"])
    (tmp_path / "looped" / "kernels").write_text("../kernels")
    program = """
        import looped.kernels.radial, kernels
        print(looped.kernels.__file__, kernels.radial is looped.kernels.radial)
    """
    assert run(program, cwd=tmp_path) == f"{tmp_path / 'kernels' / '__init__.py'} True\n"


def test_the_trainer_uses_its_own_checkout(tmp_path):
    """From elsewhere, with other packages of all our names first on the path."""
    others = write(
        tmp_path, {f"{name}/__init__.py": "raise OSError('not ours')" for name in ("kernels", "looped", "train")}
    )
    program = str(ROOT / "train" / "run.py")
    as_python_runs_it = f"""
        import runpy, sys
        sys.path[0], sys.argv = {os.path.dirname(program)!r}, [{program!r}, "--help"]
        runpy.run_path({program!r}, run_name="__main__")
    """
    assert "usage: train/run.py" in run(as_python_runs_it, others, cwd=tmp_path)


# Installed ------------------------------------------------------------------------------------------------------------


def build(source: Path, directory: Path) -> Path:
    """The wheel of a source directory or a source archive."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that nothing is built in the checkout."""
    directory = tmp_path_factory.mktemp("source")
    for name in ("kernels", "looped", "train"):
        shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


def modules_of(archive: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(archive).namelist() if ".dist-info/" not in name}


def test_a_wheel_has_every_module_and_nothing_under_kernels(wheel):
    expected = {
        ("looped/" if package == "kernels" else "") + path.relative_to(ROOT).as_posix()
        for package in ("kernels", "looped", "train")
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules_of(wheel) == {name for name in expected if not name.startswith("kernels/")}
    assert "looped/kernels/__init__.py" in modules_of(wheel)


def test_a_source_archive_makes_the_same_wheel(source, wheel, tmp_path):
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert modules_of(build(archive, tmp_path)) == modules_of(wheel)


def hugging_face_wheel(directory: Path) -> Path:
    path = directory / "kernels-0.17.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in HUGGING_FACE.items():
            archive.writestr(name, textwrap.dedent(text))
        record = "kernels-0.17.9.dist-info/RECORD"
        archive.writestr(record, "".join(f"{name},,\n" for name in [*HUGGING_FACE, record]))
    return path


def test_installed_in_either_order_both_are_whole(wheel, tmp_path):
    theirs = hugging_face_wheel(tmp_path)
    for order in ((theirs, wheel), (wheel, theirs)):
        venv.create(tmp_path / "env", with_pip=False, clear=True)
        python = str(tmp_path / "env" / "bin" / "python")
        for each in order:
            options = ["--no-deps", "--no-index", "--quiet", "--no-compile"]
            command = [sys.executable, "-m", "pip", "--python", python, "install", *options, str(each)]
            subprocess.run(command, check=True)
        (site,) = (tmp_path / "env" / "lib").glob("*/site-packages")
        for each in order:
            archive = zipfile.ZipFile(each)
            for name in modules_of(each):
                digest = hashlib.sha256((site / name).read_bytes()).hexdigest()
                assert digest == hashlib.sha256(archive.read(name)).hexdigest(), name
    # The files are the same in either order, so one of the two is run.
    (site / "dependencies.pth").write_text(f"{SITE}\n")  # after the environment's own, and without its .pth files
    program = """
import kernels, looped.kernels
from kernels.layer import LayerRepository
from looped.kernels import looped_cross_entropy
assert kernels.__version__ == "0.17.9" and not hasattr(kernels, "looped_cross_entropy")
print(looped.kernels.__file__)
"""
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{site / 'looped' / 'kernels' / '__init__.py'}\n", done.stderr[-4000:]


def test_no_other_distribution_is_named_as_ours_is(wheel):
    """importlib.metadata.version("kernels") is Hugging Face's or nobody's."""
    assert wheel.name.startswith("looped_lm-")
    assert importlib.metadata.version("looped-lm")
    top_level = zipfile.ZipFile(wheel).read(f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/top_level.txt")
    assert top_level.decode().split() == ["looped", "train"]
