"""Lays out the files that a release is built from, and looks at what was built.

    python scripts/release_tree.py lay outputs/release --repository https://github.com/OWNER/NAME
    pyproject-build --outdir dist outputs/release
    python scripts/release_tree.py check outputs/release dist

The tree holds what git tracks. On PyPI a link within the repository leads nowhere, and this
repository does not know its own address: with `--repository` the links of README.md are written
out, and `[project.urls]` gets the address too. docs/releasing.md says how a release is made.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
ADDRESS = re.compile(r"https://[\w.-]+(/[\w.~-]+)+")


class Wrong(Exception):
    """What keeps a release from being built, as one line."""


def absolute_links(text: str, repository: str, ref: str, files: set[str]) -> str:
    """The text of README.md with links that can be followed from anywhere.

    Args:
      text: What stands in fences stays as it is.
      repository: Its address, such as https://github.com/OWNER/NAME.
      ref: The branch, tag or commit that links lead to.
      files: What there is, as paths from the root.

    Raises:
      Wrong: A link leads to no file.
    """

    def written_out(match: re.Match) -> str:
        mark, label, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        path = path or "README.md"
        if path not in files and not any(file.startswith(f"{path.rstrip('/')}/") for file in files):
            raise Wrong(f"README.md links to {target}, which is not there")
        kind = "raw" if mark else "blob"  # a picture itself, not the page that shows it
        return f"{mark}[{label}]({repository}/{kind}/{ref}/{path}{hash_sign}{anchor})"

    parts = FENCED.split(text)  # every second one is a fence
    return "".join(x if i % 2 else LINK.sub(written_out, x) for i, x in enumerate(parts))


def with_urls(pyproject: str, repository: str, ref: str) -> str:
    """pyproject.toml with the addresses of the repository, in place of those that it may have."""
    urls = {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{ref}/docs",
        "Changelog": f"{repository}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    head, table, rest = pyproject.partition("[project.urls]\n")
    if not table:
        raise Wrong("pyproject.toml has no [project.urls]")
    own, bracket, rest = rest.partition("\n[")
    own = re.sub(rf"^({'|'.join(urls)}) *=.*\n?", "", own, flags=re.MULTILINE)
    return head + table + lines + own + bracket + rest


def check_tag(tag: str, version: str, changelog: str) -> None:
    """Raises `Wrong` unless a tag is that of the version and the changelog tells of it."""
    if tag != f"v{version}":
        raise Wrong(f"the tag is {tag}, and pyproject.toml has version {version}")
    if f"\n## [{version}]" not in changelog:
        raise Wrong(f"CHANGELOG.md has no section [{version}]; call [Unreleased] so")


def tracked(root: pathlib.Path) -> list[str]:
    """What git tracks, as paths from the root."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, check=False
    )
    if listed.returncode:
        raise Wrong(f"a release is built from a clone: {listed.stderr.decode().strip()}")
    names = listed.stdout.decode().split("\0")
    return [name for name in names if name and (root / name).is_file()]


def lay(out: pathlib.Path, repository: str | None, tag: str | None) -> None:
    """Writes the tree, in place of one that was laid before."""
    files, project = tracked(ROOT), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if tag is not None:
        check_tag(tag, project["version"], (ROOT / "CHANGELOG.md").read_text("utf-8"))
    if repository is not None and not ADDRESS.fullmatch(repository):
        raise Wrong(f"want an address as https://HOST/OWNER/NAME, got {repository}")
    shutil.rmtree(out, ignore_errors=True)
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, out / name)
    if repository is None:
        print("note: no --repository: links of README.md lead nowhere on PyPI")
        return
    ref = tag or "main"
    readme, pyproject = out / "README.md", out / "pyproject.toml"
    readme.write_text(
        absolute_links(readme.read_text("utf-8"), repository, ref, set(files)), "utf-8"
    )
    pyproject.write_text(with_urls(pyproject.read_text("utf-8"), repository, ref), "utf-8")


def check(tree: pathlib.Path, dist: pathlib.Path) -> None:
    """Raises `Wrong` unless there is one wheel and one sdist, and the latter holds the tree."""
    built = sorted(path.name for path in dist.iterdir())
    sdists = list(dist.glob("*.tar.gz"))
    if len(sdists) != 1 or len(list(dist.glob("*.whl"))) != 1 or len(built) != 2:
        raise Wrong(f"want one sdist and one wheel in {dist}, got {', '.join(built) or 'nothing'}")
    with tarfile.open(sdists[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    laid = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    laid = {name for name in laid if not re.search(r"\.egg-info/|(^|/)__pycache__/", name)}
    if missing := sorted(laid - held):
        raise Wrong(
            f"{sdists[0].name} lacks {len(missing)} files, such as {missing[0]}: MANIFEST.in"
        )
    print(f"{', '.join(built)}: {len(laid)} files in the sdist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    sub = actions.add_parser("lay", help="write the tree")
    sub.add_argument("out", type=pathlib.Path)
    sub.add_argument("--repository", metavar="URL", help="its address, without a slash at the end")
    sub.add_argument("--tag", help="of the release, v and the version; links lead to it, else main")
    sub = actions.add_parser("check", help="compare what was built with the tree")
    sub.add_argument("tree", type=pathlib.Path)
    sub.add_argument("dist", type=pathlib.Path)
    args = parser.parse_args()
    try:
        if args.action == "lay":
            lay(args.out, args.repository or None, args.tag or None)
        else:
            check(args.tree, args.dist)
    except Wrong as wrong:
        sys.exit(f"error: {wrong}")


if __name__ == "__main__":
    main()
