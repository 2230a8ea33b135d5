"""The documentation site. `make docs` has Sphinx read this file: it writes the sources of all pages into build/docs, those of
the reference from the docstrings, and Sphinx makes build/site of them.

A page of docs/ stands in PAGES, a public module in REFERENCE; a static page, in a folder of docs/ of its own, in STATIC.
"""

import ast
import functools
import importlib
import inspect
import itertools
import os
import pathlib
import pkgutil
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any, TypeVar

ROOT = pathlib.Path(__file__).parents[1]
HOME = "README.md"
PAGES = {
    "Use it": [
        "docs/install.md", "docs/choosing_lambda.md", "docs/your_model.md", "docs/samplers.md", "docs/diffusers.md",
        "docs/comfyui.md", "docs/stacks.md", "docs/step.md",
    ],
    "Exposure bias": ["docs/corrections.md", "docs/exposure.md", "docs/exposure_method.md", "docs/exposure_tables.md"],
    "In production": [
        "docs/production.md", "docs/production_compile.md", "docs/production_export.md", "docs/production_serving.md",
        "docs/platforms.md", "docs/benchmarks.md",
    ],
    "Background": ["docs/glossary.md", "docs/architecture.md", "CONTRIBUTING.md", "CHANGELOG.md"],
}  # fmt: skip
# The names of each module that are told, or None for its __all__.
REFERENCE: dict[str, tuple[str, dict[str, str | None]]] = {
    "step": ("Steps and sampling", {"epskernels": "step sample normal as_seeds moments guidance_rescale dynamic_threshold "
                                                  "use_backend pfgmpp_prior"}),
    "samplers": ("Samplers", {"epskernels.samplers": None}),
    "schedules": ("Schedules", {"epskernels.schedule": None}),
    "scaling": ("Epsilon Scaling", {"epskernels.scaling": None, "epskernels": "published"}),
    "corrections": ("Corrections and time shift", {"epskernels.corrections": None, "epskernels.time_shift": None}),
    "table": ("Tables", {"epskernels.table": None}),
    "graphs": ("CUDA graphs", {"epskernels": "GraphedSampler"}),
    "diffusers": ("diffusers", {"epskernels.diffusers": None}),
    "k_diffusion": ("k-diffusion and ComfyUI", {"epskernels.k_diffusion": None}),
    "exposure": ("Exposure bias and quality", {"epskernels.exposure": None, "epskernels.calibrate": None,
                                               "epskernels.quality": None, "epskernels.features": None}),
    "data": ("Models and images", {"epskernels.models": None, "epskernels.images": None}),
    "types": ("Types and the build", {"epskernels.typing": None, "epskernels.build": None}),
}  # fmt: skip
# Static pages, as they are, above the navigation: {"explore/index.html": "title"}.
STATIC: dict[str, str] = {"explore/index.html": "See the effect"}
# Where files that are no pages are linked to, such as https://.../blob/main; without it their names stand alone.
REPOSITORY = os.environ.get("EPSKERNELS_REPOSITORY", "")


# ---- what Sphinx reads ----

project, author = "epskernels", "epskernels developers"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc, source_suffix = "index", {".md": "markdown", ".rst": "restructuredtext"}
html_theme, html_title, html_show_sphinx, html_copy_source = "furo", "epskernels", False, False
html_theme_options = {"light_css_variables": {"font-stack": "system-ui, sans-serif"}, "top_of_page_buttons": []}
highlight_language, smartquotes, nitpicky = "none", False, True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!epskernels\b).*")
]  # of other packages, which no inventory tells without a network
myst_heading_anchors, myst_enable_extensions = 4, ["html_image"]
toc_object_entries_show_parents = "hide"
html_css_files = ["site.css"]
html_static_path = [str(ROOT / "build" / "docs" / "static")]
html_favicon = str(ROOT / "build" / "docs" / "static" / "icon.svg")
python_use_unqualified_type_names, python_maximum_signature_line_length = True, 90
autodoc_inherit_docstrings, autodoc_member_order = False, "bysource"
autodoc_typehints = "none"  # they are `signature`'s
exclude_patterns = ["sidebar"]
templates_path = [str(ROOT / "build" / "docs")]
html_sidebars = {
    "**": [
        f"sidebar/{part}.html"
        for part in ("brand", "search", "scroll-start", *(["static"] if STATIC else []), "navigation", "scroll-end")
    ]
}


_STYLE = """
.content { width: 50em; max-width: 100%; }
.table-wrapper { font-size: 0.85em; }
.table-wrapper td, .table-wrapper th { text-align: left; }
"""
_ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><text x="3" y="13" font-size="18">ε</text></svg>'


def setup(app: Any) -> None:
    from sphinx.errors import ConfigError

    try:
        write_sources(pathlib.Path(app.srcdir))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    app.connect("autodoc-process-signature", lambda app, what, name, obj, options, *shown: signature(obj))
    app.connect("autodoc-process-docstring", _restructured)
    app.connect("doctree-read", _refuse_emphasis)
    app.connect("build-finished", lambda app, error: error or _copy_static(pathlib.Path(app.outdir)))


def _copy_static(site: pathlib.Path) -> None:
    for page in STATIC:
        folder = page.split("/")[0]
        shutil.copytree(ROOT / "docs" / folder, site / folder, dirs_exist_ok=True)
        (site / page).write_text(static_page(page))


def static_page(page: str) -> str:
    """Its text with its links to pages as the site has them. Raises ValueError for a link to a file that is no page."""

    def link(found: re.Match[str]) -> str:
        name = (ROOT / "docs" / page).parent.joinpath(found[1]).resolve().relative_to(ROOT).as_posix()
        if name not in pages():
            raise ValueError(f"docs/{page}: {found[1]}: expected a page of the site")
        return f'href="../{pages()[name]}.html"'

    return re.sub(r'href="(\.\./[^"]*)"', link, (ROOT / "docs" / page).read_text())


# ---- the pages ----


def pages() -> dict[str, str]:
    """The site's name of each page, by its path."""
    listed = [HOME, *(page for group in PAGES.values() for page in group)]
    return {page: "index" if page == HOME else pathlib.Path(page).stem.lower() for page in listed}


def write_sources(to: pathlib.Path) -> None:
    """All pages, with the files that they show, and the reference. What an earlier build wrote there is deleted first; raises
    ValueError for a folder that holds something else, such as docs/ itself."""
    if to.is_dir() and any(to.iterdir()) and not (to / "reference").is_dir():
        raise ValueError(
            f"{to}: expected a folder of this build's own, such as build/docs: its content is deleted. Use make docs"
        )
    shutil.rmtree(to, ignore_errors=True)
    (to / "reference").mkdir(parents=True)
    for page, name in pages().items():
        text = relinked((ROOT / page).read_text(), page, to)
        (to / f"{name}.md").write_text(text + (_navigation() if page == HOME else ""))
    for name, text in reference().items():
        (to / "reference" / f"{name}.rst").write_text(text)
    (to / "sidebar").mkdir()
    (to / "static").mkdir()
    (to / "static" / "site.css").write_text(_STYLE)
    (to / "static" / "icon.svg").write_text(_ICON)
    items = "".join(
        f'<li class="toctree-l1"><a href="{{{{ pathto("{page}", 1) }}}}">{title}</a></li>'
        for page, title in STATIC.items()
    )
    (to / "sidebar" / "static.html").write_text(f'<div class="sidebar-tree"><ul>{items}</ul></div>\n')


def _navigation() -> str:
    parts = {caption: [pages()[page] for page in group] for caption, group in PAGES.items() if caption != "Background"}
    parts["Reference"] = [f"reference/{name}" for name in REFERENCE]
    parts["Background"] = [pages()[page] for page in PAGES["Background"]]
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
        for caption, names in parts.items()
    )


_LINK = re.compile(
    r"(?P<fence>^ *```.*?^ *```$)|(?P<image>!?)\[(?P<text>(?:`[^`]*`|\[[^\]]*\]|[^\[\]])*)\]\((?P<target>[^)\s]+)\)"
    r'|(?P<code>`[^`]+`)|(?P<tag><img\b[^>]*?\bsrc=")(?P<src>[^"]+)',
    re.M | re.S,
)


def relinked(text: str, page: str, to: pathlib.Path) -> str:
    """A page's text with its links as the site has them. Raises ValueError for a link to a file that is not there."""

    def link(found: re.Match[str]) -> str:
        target = found["target"] or found["src"]
        if not target or re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve()
        if not file.exists() or not file.is_relative_to(ROOT):
            raise ValueError(f"{page}: {target}: expected a file of the repository")
        name = file.relative_to(ROOT).as_posix()
        if found["image"] or found["src"]:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to / name)
            return f"{found['tag']}{name}" if found["src"] else f"![{found['text']}]({name})"
        if name in pages():
            return f"[{found['text']}]({pages()[name]}.md{'#' + anchor if anchor else ''})"
        if (static := name.removeprefix("docs/")) in STATIC:
            return f'<a href="{static}">{found["text"]}</a>'
        return f"[{found['text']}]({REPOSITORY}/{name})" if REPOSITORY else found["text"]

    return _LINK.sub(link, text).replace("```mermaid", "```text")


def _refuse_emphasis(app: Any, doctree: Any) -> None:
    """An error for asterisks that vanish from a formula: x*y, and later z*w, in no backticks. The pages emphasise by **."""
    from docutils import nodes
    from sphinx.util import logging

    for node in doctree.findall(nodes.emphasis):
        logging.getLogger(__name__).warning("formula without backticks: *%s*", node.astext(), location=node)


# ---- the reference ----


@functools.cache
def public() -> dict[str, Any]:
    """What is public, by the name that users write, in the order of the reference."""
    told = ((module, names) for _, modules in REFERENCE.values() for module, names in modules.items())
    return {name: value for module, names in told for name, value in _of_module(module, names)}


def _of_module(module: str, names: str | None) -> Iterator[tuple[str, Any]]:
    """Its names that are told, in full; what `epskernels` offers itself, by that shorter name."""
    import epskernels

    made = importlib.import_module(module)
    if names is None:  # epskernels.diffusers has none: its names are read when they are asked for
        names = " ".join(made.__all__ if hasattr(made, "__all__") else made._pipelines().__all__)
    for name in sorted(names.split(), key=_is_scheduler):
        value = getattr(made, name)
        if inspect.isclass(value) and not value.__module__.startswith("epskernels"):
            continue  # diffusers' SchedulerMixin
        at_top = name in epskernels.__all__ and getattr(epskernels, name) is value
        yield f"{'epskernels' if at_top else module}.{name}", value


def reference() -> dict[str, str]:
    """The sources of its pages, by their names."""
    texts = {}
    for page, (title, modules) in REFERENCE.items():
        parts = [f"{title}\n{'=' * len(title)}\n"]
        for module, names in modules.items():
            if names is None:
                parts += [f"{module}\n{'-' * len(module)}\n"] if len(modules) > 1 else []
                parts.append(f".. automodule:: {module}\n")
            parts += [_entry(name, value) for name, value in _of_module(module, names)]
        texts[page] = "\n".join(parts)
    return texts


def _is_scheduler(name: str) -> bool:
    """Whether it names a twin of diffusers', which has diffusers' arguments and methods."""
    return name.endswith("Scheduler")


def _entry(name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f".. autoclass:: {name}\n" + ("" if _is_scheduler(name) else "   :members:\n")
    if inspect.isroutine(value):
        return f".. autofunction:: {name}\n"
    source, comment = _assigned(name.rpartition(".")[2], value)
    shown = f"   :value: {source}\n" if len(source) < 200 else ""
    return f".. py:data:: {name}\n{shown}\n{textwrap.indent(_inline(comment, ''), '   ')}\n"


def _assigned(name: str, value: Any) -> tuple[str, str]:
    """The source of a constant's value, and the comment beside or above it."""
    import epskernels

    for info in pkgutil.walk_packages(epskernels.__path__, "epskernels."):
        module = sys.modules.get(info.name)
        if getattr(module, name, None) is not value:
            continue
        text = inspect.getsource(module)
        for node in ast.parse(text).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                lines = text.splitlines()
                beside = re.search(r"  # (?!fmt)(.*)", lines[node.end_lineno - 1])
                above = itertools.takewhile(lambda line: line.startswith("# "), reversed(lines[: node.lineno - 1]))
                return ast.unparse(node.value), beside[1] if beside else " ".join(line[2:] for line in [*above][::-1])
    raise ValueError(f"{name}: expected a module that assigns it")


# ---- signatures, as the sources spell them ----


def signature(obj: Any) -> tuple[str, str] | None:
    """(arguments, result) with the names of types that the sources use; None for Sphinx' own."""
    if inspect.isclass(obj):
        if _is_scheduler(obj.__name__):
            return "(**configuration, eps_scaling: epskernels.scaling.ScalingLike = 1.0, correction = None)", ""
        if hasattr(obj, "__dataclass_fields__"):
            return _fields(obj), ""
        obj = vars(obj).get("__init__")
    obj = inspect.unwrap(getattr(obj, "__func__", obj))
    if not inspect.isfunction(obj):
        return None
    node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    first = node.args.args[:1]
    if first and first[0].arg in ("self", "cls"):
        del node.args.args[0]
    spelled = _Spelled(obj.__globals__)
    result = ast.unparse(spelled.visit(node.returns)) if node.returns and node.name != "__init__" else ""
    return f"({ast.unparse(spelled.visit(node.args))})", result


def _fields(kind: type) -> str:
    node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(node, ast.ClassDef)
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    spelled = _Spelled(sys.modules[kind.__module__].__dict__)
    return f"({', '.join(ast.unparse(spelled.visit(each)) for each in fields)})"


class _Spelled(ast.NodeTransformer):
    """Public names in full, which Sphinx links and shortens; private names of types as what they stand for."""

    def __init__(self, names: dict[str, Any]):
        self.names = names

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Name(node.value) if isinstance(node.value, str) and node.value in self.names else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._named(node, ast.unparse(node))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._named(node, node.id)

    def _named(self, node: Any, name: str) -> ast.AST:
        try:
            value = functools.reduce(getattr, name.split(".")[1:], self.names[name.split(".")[0]])
        except (KeyError, AttributeError):
            return node
        if isinstance(value, (int, float, str)):  # the default of an argument
            return ast.Constant(value)
        for full, known in public().items():
            if known is value:
                return ast.Name(full)
            if isinstance(known, types.UnionType) and value == known | None:
                return ast.Name(f"{full} | None")
        if isinstance(value, TypeVar):
            return ast.Name(name.lstrip("_"))
        if isinstance(value, types.UnionType) or "Callable[" in repr(value):
            return ast.parse(re.sub(r"\b(typing|collections\.abc)\.", "", str(value)), mode="eval").body
        return node


# ---- docstrings as reStructuredText ----

_ENDS = r"(?:^|(?<=[.;)\]\"'`] ))"


def _restructured(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Paragraphs, lists, formulas and arguments of a docstring; names in backticks are links where they are public."""
    names = []
    if what in ("function", "method", "class"):
        try:
            names = list(inspect.signature(obj).parameters)
        except (ValueError, TypeError):
            pass
        names += getattr(obj, "__dataclass_fields__", ())
    out: list[str] = []
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    for block in blocks:
        if block.startswith("    "):
            out += ["::", "", *textwrap.indent(textwrap.dedent(block), "    ").splitlines(), ""]
        elif block.startswith("- "):
            out += [_inline(item, name) for item in _joined(block, r"- ")] + [""]
        else:
            for paragraph in _joined(block, r"(?:\w+(?:, \w+)*: |Raises |Returns )"):
                out += _paragraph(paragraph, names, name)
    if what == "property" and (told := signature(obj.fget)):
        out[:1] = [f"``{re.sub(r'epskernels[.a-z_]*[.]', '', told[1])}``: {out[0]}"]
    lines[:] = out


def _joined(block: str, begins: str) -> list[str]:
    """The block's items, each on one line: an item begins a line, and lines that are indented go on with it."""
    items: list[str] = []
    for line in block.splitlines():
        if items and not re.match(begins, line):
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    return items


def _paragraph(text: str, names: list[str], of: str) -> list[str]:
    """A paragraph, or a list of arguments: "name: ..." at its beginning or after a sentence."""
    out: list[str] = []
    for part in re.split(_ENDS + r"(?=(?:Raises|Returns) )", text):
        known = "|".join(map(re.escape, names)) or "(?!)"
        prose, *entries = re.split(rf"{_ENDS}((?:{known})(?:, (?:{known}))*): ", part)
        out += [_inline(prose.strip(), of), ""] if prose.strip() else []
        for arguments, told in zip(entries[::2], entries[1::2], strict=True):
            shown = ", ".join(f"**{_escaped(each)}**" for each in arguments.split(", "))
            out += [f"{shown}", f"    {_inline(told.strip(), of)}", ""]
    return out


def _inline(text: str, of: str) -> str:
    parts = re.split(r"(`[^`]+`|arXiv \d{4}\.\d{5})", text)
    for i, part in enumerate(parts):
        if part.startswith("`") and len(part) > 2:
            full = _public_name(part[1:-1], of)
            parts[i] = f":py:obj:`{part[1:-1]} <{full}>`" if full else f"``{part[1:-1]}``"
        elif part.startswith("arXiv "):
            parts[i] = f"`{part} <https://arxiv.org/abs/{part[6:]}>`__"
        else:
            parts[i] = _escaped(part)
    for i in range(1, len(parts), 2):  # markup ends where a word could go on
        parts[i] = ("\\ " if parts[i - 1][-1:].strip() else "") + parts[i] + ("\\ " if parts[i + 1][:1].strip() else "")
    return "".join(parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_|<>`])", r"\\\1", text)


def _public_name(name: str, of: str) -> str | None:
    """The full name of what is public and called so, in the module that speaks of it or in `epskernels`."""
    near = (f"{of.rpartition('.')[0]}.{name}", f"{'.'.join(of.split('.')[:2])}.{name}", f"epskernels.{name}", name)
    return next((full for full in near if full in public()), None)
