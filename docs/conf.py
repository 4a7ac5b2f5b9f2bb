"""How Sphinx builds the site: ``make docs`` writes it to docs/_build/html. Nothing is fetched while it is built."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import rasteret_dask

DOCS = Path(__file__).parent
ROOT = DOCS.parent
MADE = DOCS / "_made"
"""What a build makes from the demo's world and from files beside ``docs``; not in the repository."""

project = "rasteret_dask"
author = "The rasteret_dask developers"
project_copyright = "The rasteret_dask developers. Apache-2.0"
version = release = rasteret_dask.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_made/looking", "_made/world", "_templates"]
templates_path = ["_templates"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests run every block and every notebook

autosummary_generate = True
autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_mock_imports = ["torch", "lightning"]  # the same pages, with and without it
numpydoc_show_class_members = False  # the template of a class lists them
numpydoc_class_members_toctree = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80  # of longer ones, an argument a line
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

nitpicky = True
OTHERS = (
    "affine collections dask datetime distributed ds geopandas matplotlib multiprocessing np numpy odc os pa pandas "
    "pathlib pd pds pyarrow pyproj pystac rasterio shapely stackstac torch typing xarray xr zarr"
)
"""Packages whose names stand in signatures: their inventories are on the network, which a build does not use."""

BUILTIN = "bool bytes dict float frozenset int list object str tuple type property abc.ABC None NoneType"

nitpick_ignore_regex = [
    (r"py:.*", rf"({'|'.join(OTHERS.split())})\..*"),
    (r"py:.*", rf"({'|'.join(BUILTIN.split())})"),
    (r"py:exc", r"[A-Z]\w+"),  # Python's own errors
    # Types of this package that are written only in signatures: they have no page of their own.
    (r"py:.*", r"rasteret_dask\..*"),
    # Words of types, as they stand in signatures of another module than the one that defines them.
    (r"py:(class|obj|data)", r"[A-Z_]\w*"),
]

html_theme = "pydata_sphinx_theme"
html_title = "rasteret_dask"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "rasteret_dask"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "use_edit_page_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "getting-started": [], "ideas": [], "benchmarks": [], "comparison": []}


def beside(name: str) -> Any:
    """Return a module of this folder."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(app: Sphinx) -> None:
    """Draw the home page's pictures from the demo's world, and bring in the notebooks."""
    MADE.mkdir(exist_ok=True)
    pictures = beside("pictures")
    drawn = [(MADE / "demo-light.png", pictures.LIGHT), (MADE / "demo-dark.png", pictures.DARK)]
    chips = pictures.demo_of(MADE / "world")
    for path, page in drawn:
        if not path.is_file():
            pictures.draw(chips, path, page)
    pictures.draw_looking(MADE / "looking", MADE / "world")
    (MADE / "notebooks").mkdir(exist_ok=True)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copyfile(notebook, MADE / "notebooks" / notebook.name)


ROOT_PAGES = {
    "architecture": "ARCHITECTURE.md",
    "changes": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "kubernetes": "deploy/README.md",
}
"""Pages that lie where readers of the repository look for them, such as beside README.md."""


def from_root(app: Sphinx, docname: str, source: list[str]) -> None:
    """Show a page that lies elsewhere, its links to others like it turned to their pages here."""
    if docname in ROOT_PAGES:
        app.env.note_dependency(str(ROOT / ROOT_PAGES[docname]))
        source[0] = (ROOT / ROOT_PAGES[docname]).read_text()
        for page, name in ROOT_PAGES.items():
            source[0] = source[0].replace(f"({name})", f"({page}.md)")
        source[0] = source[0].replace("](docs/", "](").replace("](../docs/", "](")


def public(app: Sphinx, env: Any, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """Return the link to a public name that is written in another way.

    As in signatures, with the module that defines it; without its package; on the page of a class, without its class.
    """
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    names = [f"rasteret_dask.{target}", f"{node['refdoc'].removeprefix('api/')}.{target}"]
    name = target.rpartition(".")[2]
    if name in rasteret_dask.__all__ and target == f"{getattr(rasteret_dask, name).__module__}.{name}":
        names.append(f"rasteret_dask.{name}")
    domain = env.get_domain("py")
    for known in names:
        link = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", known, node, content)
        if link is not None:
            return link
    return None


def skip_inherited(
    app: Sphinx, what: str, name: str, value: object, skip: bool, options: object
) -> bool | None:
    """Leave out what a class has from Python or another library: its documentation is theirs."""
    module = getattr(inspect.unwrap(value), "__module__", None) if callable(value) else None
    if module is not None and not module.startswith("rasteret_dask"):
        return True
    return None


def setup(app: Sphinx) -> None:
    """Tell Sphinx of the functions above; pages of names that are gone go, too."""
    shutil.rmtree(DOCS / "api", ignore_errors=True)
    app.connect("builder-inited", make)
    app.connect("source-read", from_root)
    app.connect("missing-reference", public)
    app.connect("autodoc-skip-member", skip_inherited)
