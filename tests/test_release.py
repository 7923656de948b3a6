"""What a release is made of: tree, links, workflows, templates and images."""

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest
import yaml
from source_tree import ROOT

from scripts import release_tree
from scripts.release_tree import Wrong

ADDRESS = "https://example.org/owner/name"
FLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def files():
    made = {"build", "dist", "outputs", "runs"}
    tops = [path for path in ROOT.iterdir() if path.name[0] != "." and path.name not in made]
    paths = [p for top in tops for p in ([top] if top.is_file() else top.rglob("*"))]
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file()}


def test_every_link_of_the_readme_can_be_followed_from_anywhere():
    text = (ROOT / "README.md").read_text("utf-8")
    if "](docs/" not in text:
        pytest.skip("the README of an sdist, whose links are written out")
    found = release_tree.absolute_links(text, ADDRESS, "v1.2.3", files())
    targets = [target for *_, target in release_tree.LINK.findall(found)]
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets)
    assert f"]({ADDRESS}/raw/v1.2.3/docs/images/sample.png)" in found
    assert f"({ADDRESS}/blob/v1.2.3/README.md#conversion-and-parity)" in found
    fences = [release_tree.FENCED.findall(x) for x in (text, found)]
    assert fences[0] == fences[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[a](docs)", f"[a]({ADDRESS}/blob/main/docs)"),
        ("[`a`](docs/b.md#c)", f"[`a`]({ADDRESS}/blob/main/docs/b.md#c)"),
        ("![a](docs/b.md)", f"![a]({ADDRESS}/raw/main/docs/b.md)"),
        ("[a](https://x.org/docs/b.md)", "[a](https://x.org/docs/b.md)"),
        ("```\n[a](b)\n```\n", "```\n[a](b)\n```\n"),
    ],
)
def test_links_are_written_out(text, wanted):
    assert release_tree.absolute_links(text, ADDRESS, "main", {"docs/b.md"}) == wanted


def test_a_link_that_leads_nowhere_stops_a_release():
    with pytest.raises(Wrong, match=r"links to docs/c\.md, which is not there"):
        release_tree.absolute_links("[a](docs/c.md)", ADDRESS, "main", {"docs/b.md"})


def test_the_address_is_added_to_the_urls_or_takes_the_place_of_another():
    before = (ROOT / "pyproject.toml").read_text()
    paper = tomllib.loads(before)["project"]["urls"]["Paper"]
    other = release_tree.with_urls(before, "https://example.org/other", "v0")
    after = tomllib.loads(release_tree.with_urls(other, ADDRESS, "v1"))
    assert after | {"project": None} == tomllib.loads(before) | {"project": None}
    assert after["project"]["urls"] == {
        "Paper": paper,
        "Repository": ADDRESS,
        "Documentation": f"{ADDRESS}/tree/v1/docs",
        "Changelog": f"{ADDRESS}/blob/v1/CHANGELOG.md",
        "Issues": f"{ADDRESS}/issues",
    }


def test_a_tag_must_be_that_of_the_version_and_told_of():
    release_tree.check_tag("v1.2.3", "1.2.3", "# Changelog\n\n## [1.2.3] - 2030-01-01\n")
    with pytest.raises(Wrong, match=r"the tag is v1\.2\.4"):
        release_tree.check_tag("v1.2.4", "1.2.3", "")
    with pytest.raises(Wrong, match=r"no section \[1\.2\.3\]"):
        release_tree.check_tag("v1.2.3", "1.2.3", "\n## [1.2.30]\n")


def test_an_sdist_that_lacks_a_file_is_refused(tmp_path):
    tree, dist = tmp_path / "tree", tmp_path / "dist"
    dist.mkdir()
    for name in ("tests/a.py", "x.egg-info/SOURCES.txt", "README.md"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    with pytest.raises(Wrong, match="one sdist and one wheel"):
        release_tree.check(tree, dist)
    (dist / "x-1.whl").touch()
    for names in (["README.md"], ["README.md", "tests/a.py"]):
        with tarfile.open(dist / "x-1.tar.gz", "w:gz") as archive:
            for name in names:
                archive.add(tree / name, f"x-1/{name}")
        if len(names) == 1:
            with pytest.raises(Wrong, match=r"lacks 1 files, such as tests/a\.py"):
                release_tree.check(tree, dist)
    release_tree.check(tree, dist)


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_tree_is_laid_of_what_git_tracks(tmp_path):
    root = tmp_path / "clone"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/release_tree.py", root / "scripts")
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root)
    (root / "README.md").write_text("[a](LICENSE)\n")
    (root / "LICENSE").touch()
    command = [sys.executable, "scripts/release_tree.py", "lay", "out", "--repository", ADDRESS]

    def run(*argv):
        return subprocess.run(argv, cwd=root, capture_output=True, text=True)

    assert "error: a release is built from a clone" in run(*command).stderr
    run("git", "init", "-q")
    run("git", "add", ".")
    (root / "litter").touch()
    assert run(*command).returncode == 0
    laid = {str(x.relative_to(root / "out")) for x in (root / "out").rglob("*") if x.is_file()}
    listed = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "scripts/release_tree.py"}
    assert laid == listed
    assert (root / "out/README.md").read_text() == f"[a]({ADDRESS}/blob/main/LICENSE)\n"
    said = run(*command[:-1], "example.org").stderr
    assert said == "error: want an address as https://HOST/OWNER/NAME, got example.org\n"
    assert f"pyproject.toml has version {VERSION}" in run(*command, "--tag", "v0").stderr


def test_the_manifest_names_all_that_is_tracked():
    manifest = (ROOT / "MANIFEST.in").read_text()
    grafted = set(re.findall(r"^graft (\S+)", manifest, re.MULTILINE))
    single = {name for line in re.findall(r"^include (.*)", manifest, re.MULTILINE)
              for name in line.split()}  # fmt: skip
    assert all((ROOT / name).is_dir() for name in grafted)
    assert all(list(ROOT.glob(name)) for name in single)
    if (ROOT / ".git").exists():
        tops = {name.split("/")[0] for name in release_tree.tracked(ROOT)} - {"MANIFEST.in"}
        left = tops - grafted
        assert not [x for x in left if not any(pathlib.PurePath(x).match(y) for y in single)]


@pytest.mark.parametrize("path", FLOWS, ids=lambda path: path.name)
def test_a_workflow_is_bounded_and_may_do_little(path):
    flow = load(path)
    assert "permissions" in flow
    for job in flow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))


def test_ci_runs_what_people_run_and_a_release_publishes_without_a_password():
    steps = load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert " dist " in (ROOT / ".ci/run").read_text()
    text = (ROOT / ".github/workflows/release.yml").read_text()
    jobs = load(ROOT / ".github/workflows/release.yml")["jobs"]
    assert jobs["build"]["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert (jobs["publish"]["needs"], jobs["publish"]["environment"]) == ("build", "pypi")
    assert "secrets." not in text
    assert "make dist REPOSITORY=" in text


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_asks_something(path):
    form = load(path)
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    asked = [item for item in form["body"] if item["type"] != "markdown"]
    assert len({item["id"] for item in asked}) == len(asked) > 0
    assert all(item["attributes"]["label"] for item in asked)


def test_versions_that_stand_in_two_places_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ruff,) = re.findall(r"ruff~=([\d.]+)", " ".join(project["optional-dependencies"]["test"]))
    hooks = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [x["rev"] for x in hooks if "ruff" in x["repo"]] == [f"v{ruff}"]
    cited = load(ROOT / "CITATION.cff")
    assert cited["license"] == project["license"]
    assert cited.get("version", VERSION) == VERSION
    assert [x["name"] for x in cited["authors"]] == [x["name"] for x in project["authors"]]
    pythons = [x.rpartition(" ")[2] for x in project["classifiers"] if "Python :: 3." in x]
    assert pythons[0] == project["requires-python"].removeprefix(">=")
    (base,) = re.findall(r"^FROM python:(\d+\.\d+)\.", (ROOT / "Dockerfile").read_text(), re.M)
    assert base in pythons
    extras = project["optional-dependencies"]
    assert set(extras["data"]) <= set(extras["test"])  # whose tests would be skipped else


def test_images_are_pinned_run_as_nobody_special_and_hold_what_they_need():
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    assert [name for _, name in stages] == ["base", "cpu", "cuda"]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-[\w-]+", stages[0][0])
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[2:]:
        assert stage.index("RUN pip install") < stage.index("USER 1000") < stage.index("CMD")
    wanted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines()
              if line.startswith("!")}  # fmt: skip
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "dicode_jax"} <= wanted
    assert all((ROOT / name).exists() for name in wanted)


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint", path=str(pathlib.Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
