"""What the package promises as a whole: what it imports and what it ships."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from source_tree import ROOT, imports, python_files

OUTER = ("train", "convert", "configs")  # run from a checkout, not shipped
MAX_LINES = 520  # 500 is the aim; a little room, so that a docstring never has to go

# Import name -> distribution name, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "protobuf",
    "scenedetect": "scenedetect-headless",
    "orbax": "orbax-checkpoint",
    "tensorboardX": "tensorboardx",
    "yaml": "pyyaml",
}


def names(requirements):
    """Distribution names of a list of requirements, lower case, without versions and extras."""
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout with one more asset and some litter in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("dicode_jax", *OUTER):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for litter in ("outputs/demo/x.py", "runs/y.py", "tests/z.py", "scripts/w.py"):
        (tree / litter).parent.mkdir(parents=True)
        (tree / litter).touch()
    asset = tree / "dicode_jax/assets/some_model/part/model.safetensors"
    asset.parent.mkdir(parents=True)
    asset.touch()
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tree)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = tree.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_the_library_its_assets_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"dicode_jax"}
    assert "dicode_jax/assets/some_model/part/model.safetensors" in files
    assert "dicode_jax/py.typed" in files
    modules = {str(path.relative_to(ROOT)) for path in python_files("dicode_jax")}
    assert modules <= files, f"left out: {modules - files}"


def test_wheel_carries_licence_notice_and_command(wheel):
    info = {name.split(".dist-info/")[1] for name in wheel.namelist() if ".dist-info/" in name}
    assert {"licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"} <= info
    (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "dicode = dicode_jax.cli:main" in wheel.read(points).decode()


def test_core_install_has_no_torch(project):
    assert not {"torch", "torchvision", "open-clip-torch"} & names(project["dependencies"])
    extras = project["optional-dependencies"]
    with_torch = {name for name, wanted in extras.items() if "torch" in names(wanted)}
    assert with_torch == {"convert"}


def test_version_is_the_installed_one():
    import dicode_jax

    try:
        installed = importlib.metadata.version("dicode-jax")
    except importlib.metadata.PackageNotFoundError:  # tests run from a tree that is not installed
        installed = "0+unknown"
    assert dicode_jax.__version__ == installed


def test_version_is_written_once(project):
    version = re.compile(rf"""["']{re.escape(project["version"])}["']""")
    found = [
        path.name for path in python_files("dicode_jax", *OUTER) if version.search(path.read_text())
    ]
    assert not found, f"the version is written in {found}; it belongs in pyproject.toml only"


def test_import_of_the_package_is_light():
    code = (
        "import sys, dicode_jax; dicode_jax.__version__; dir(dicode_jax)\n"
        "heavy = {'jax', 'flax', 'torch', 'numpy', 'av', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'import dicode_jax also imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_unknown_public_name_is_an_attribute_error():
    import dicode_jax

    with pytest.raises(AttributeError, match="no attribute 'DiCoDePipelin'"):
        dicode_jax.DiCoDePipelin  # noqa: B018


def test_library_knows_neither_torch_nor_what_lies_outside():
    forbidden = {"torch", "torchvision", "open_clip", "transformers", "tests", *OUTER}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files("dicode_jax")
        for module in imports(path)
        if module.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_is_imported_only_where_checkpoints_are_converted():
    at_home = tuple(ROOT / "tests" / name for name in ("convert", "parity", "fuzz/doors.py"))
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files("train", "configs", "tests")
        for module in imports(path)
        if module.split(".")[0] == "torch" and not any(map(path.is_relative_to, at_home))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_import_is_declared(project):
    declared = names(project["dependencies"])
    extras = project["optional-dependencies"]
    # beartype is imported by `typing.py` when tests switch shape checks on.
    allowed = {
        "dicode_jax": declared
        | {"beartype"}
        | set().union(*(names(extras[name]) for name in ("data", "wandb", "app"))),
        "train": declared,
        "configs": declared,
        "convert": declared | names(extras["convert"]),
    }
    own = {"dicode_jax", "train", "convert", "configs"}
    wrong = []
    for folder, known in allowed.items():
        for path in python_files(folder):
            for module in imports(path):
                top = module.split(".")[0]
                name = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
                if top not in own | set(sys.stdlib_module_names) and name not in known:
                    wrong.append(f"{path.relative_to(ROOT)} imports {top}: not in pyproject.toml")
    assert not wrong, "\n".join(wrong)


def test_every_core_dependency_is_imported(project):
    tops = {
        module.split(".")[0]
        for path in python_files("dicode_jax", "train", "convert")
        for module in imports(path)
    }
    imported = {DISTRIBUTIONS.get(top, top).lower().replace("_", "-") for top in tops}
    assert names(project["dependencies"]) <= imported


def test_readme_names_every_extra_and_no_other(project):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"Extras: (.*?)\n\n", readme, re.DOTALL)
    assert re.findall(r"`([\w-]+)`", listed) == list(project["optional-dependencies"])


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in python_files("dicode_jax", *OUTER, "tests")
    }
    long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"split these files (over {MAX_LINES} lines): {long}"
