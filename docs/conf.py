"""How `make docs` builds the site: Sphinx reads the Markdown, runs the notebook, and warns of every broken link."""

import re
from pathlib import Path

import typer.main
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective

import openblip2
from openblip2.cli import app

project = "openblip2"
author = "The openblip2 authors"
project_copyright = "The openblip2 authors, Apache-2.0"
version = release = openblip2.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "decisions.md"]  # the latter is a lab notebook, kept in the repository only

# Markdown, as GitHub shows it too.
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell may take
nb_merge_streams = True

# Docstrings: plain sentences with code in single backticks, "Args:" and "Raises:".
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
# The types in signatures: those of other packages, and of ours that no user meets, have no page here.
nitpick_ignore_regex = [("py:class", ".*")]

html_theme = "furo"
html_title = "openblip2"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


class CommandLine(SphinxDirective):
    """Every command with the help that it prints, so that this page cannot say anything else."""

    def run(self) -> list[nodes.Node]:
        """One section for each command."""
        found: list[nodes.Node] = []
        for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
            context = command.context_class(command, info_name=f"openblip2 {name}", terminal_width=88)
            section = nodes.section(ids=[nodes.make_id(name)])
            section += nodes.title(text=name)
            section += nodes.literal_block(text=command.get_help(context), language="text")
            found.append(section)
        return found


def require_no_outside(app: Sphinx, error: Exception | None) -> None:
    """A page that a browser would fetch anything for from elsewhere ends the build."""
    outside = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')
    for page in [] if error else Path(app.outdir).rglob("*.html"):
        if found := outside.search(page.read_text(encoding="utf-8")):
            raise SphinxError(f"{page.name} fetches from elsewhere: {found[0]}")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("command-line", CommandLine)
    app.connect("build-finished", require_no_outside)
