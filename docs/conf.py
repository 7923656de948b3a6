"""Settings of the documentation site; `make docs` builds it.

The source is the whole repository, of which `include_patterns` names the pages, so that links
between Markdown files are the same here and on GitHub. The address of the repository is not written
here: `REPOSITORY` in the environment, owner/name or its whole address on GitHub, gives pages their
link to it, and notebooks theirs to Colab.
"""

import importlib.metadata
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import docstrings  # noqa: E402
import notebook_pages  # noqa: E402

REPOSITORY = notebook_pages.name_of(os.environ.get("REPOSITORY", ""))

project = "dicode_jax"
author = copyright = "dicode_jax contributors"
version = release = importlib.metadata.version("dicode-jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".py": "notebook"}
root_doc = "docs/index"
include_patterns = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("docs/*.md", "docs/api/*.rst", "notebooks/*.py", "dicode_jax/assets/*/README.md"),
]
exclude_patterns = [".*", "build"]
templates_path = ["_templates"]

# Markdown. Headings are linked to as GitHub names them.
myst_heading_anchors = 4

# Docstrings are Google's, with Markdown's backticks; `docstrings` makes them reStructuredText.
default_role = "literal"
add_module_names = False
autodoc_default_options = {
    "members": True,
    "special-members": "__call__",
    "exclude-members": "PyTree",  # jaxtyping's
}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_attr_annotations = False  # the signature has them
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 90

suppress_warnings = ["ref.python"]  # letters of shapes, `Float[Array, "b x"]`, are no names

html_theme = "furo"
html_title = "dicode_jax"
html_copy_source = html_show_sourcelink = False
html_additional_pages = {"index": "redirect.html"}  # from the top to the root of the pages
html_theme_options = {}
if REPOSITORY:
    html_theme_options = {
        "source_repository": f"https://github.com/{REPOSITORY}/",
        "source_branch": "main",
        "source_directory": "",
    }


def add_modules(app, name, source):
    """Puts a section for each module in the place of `.. modules:: PACKAGE ...`."""
    source[0] = re.sub(r"^\.\. modules:: (.+)$", _sections, source[0], flags=re.MULTILINE)


def _sections(match):
    names = [name for listed in match[1].split() for name in docstrings.modules(ROOT, listed)]
    return "\n\n".join(
        f"{name}\n{'-' * len(name)}\n\n.. automodule:: dicode_jax.{name}" for name in names
    )


def shorten(app, what, name, obj, options, signature, returns):
    """Array, and not where jax keeps it."""
    return tuple(text and text.replace("jaxlib._jax.", "") for text in (signature, returns))


def setup(app):
    app.add_source_parser(notebook_pages.parser(REPOSITORY))
    app.connect("source-read", add_modules)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", docstrings.process, priority=400)  # before napoleon
