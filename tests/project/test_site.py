"""The documentation: docstrings that stand alone, a reference that tells each public name once, and the site in a browser."""

import collections
import functools
import http.server
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
import types
import urllib.parse

import pytest

import epskernels
from epskernels import k_diffusion, samplers
from epskernels.docstrings import described

from ..support.markdown_examples import ROOT

_spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
conf = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(conf)

FUNCTIONS = {f"samplers.{name}": getattr(samplers, name) for name in [*samplers.SAMPLERS, "dit"]} | {
    f"k_diffusion.{name}": getattr(k_diffusion, name) for name in k_diffusion.__all__ if name.startswith("sample_")
}


# ---- docstrings ----


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_tells_every_argument(name):
    function = FUNCTIONS[name]
    entries = re.findall(r"^(\w+(?:, \w+)*): \S", function.__doc__, re.M)
    assert [one for entry in entries for one in entry.split(", ")] == list(inspect.signature(function).parameters)
    assert not re.search(rf"\bas (in|for) `?({'|'.join(samplers.SAMPLERS)})\b", function.__doc__)


def test_described():
    common = {"a": "first.", "b": "of all.", "c": "never."}

    @described(common, {"b": "of some."})
    def function(a, b, low, high, kept):
        """What it does.

        high: a bound: not
            the lowest.
        kept, low: of its own.
        Raises ValueError for c: and others.
        """

    assert function.__doc__.splitlines() == [
        "What it does.", "", "a: first.", "b: of some.", "high: a bound: not the lowest.", "kept, low: of its own.",
        "Raises ValueError for c: and others.",
    ]  # fmt: skip

    def incomplete(a, low, high, kept):
        """What it does."""

    with pytest.raises(ValueError, match="incomplete: expected a text for each argument, found none for low, kept"):
        described(common, {"high": "there."})(incomplete)

    def undocumented(anything):
        pass

    assert described(common)(undocumented).__doc__ is None  # as under python -OO


# ---- what Sphinx reads: made without it ----


def test_the_navigation_lists_every_page():
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(conf.pages())
    assert len(set(conf.pages().values())) == len(conf.pages())


def test_every_public_name_stands_in_the_reference_once():
    texts = conf.reference()
    entries = re.findall(r"^\.\. (?:py:data|autofunction|autoclass):: (\S+)$", "\n".join(texts.values()), re.M)
    assert [name for name, times in collections.Counter(entries).items() if times > 1] == []
    values = [functools.reduce(getattr, name.split(".")[1:], epskernels) for name in entries]
    tops = {name: getattr(epskernels, name) for name in {*epskernels.__all__, *epskernels._AT_FIRST_USE}}
    modules = {name: value for name, value in tops.items() if isinstance(value, types.ModuleType)}
    modules |= {"table": sys.modules["epskernels.table"], "diffusers": sys.modules["epskernels.diffusers.pipelines"]}
    public = {f"epskernels.{name}": value for name, value in tops.items() if name not in modules}
    public |= {
        f"epskernels.{module}.{name}": getattr(each, name) for module, each in modules.items() for name in each.__all__
    }
    public.pop("epskernels.diffusers.SchedulerMixin")  # diffusers' own
    wrong = {}
    for name, value in public.items():
        told = sum(each is value for each in values) if callable(value) else name in entries
        if told != 1:
            wrong[name] = told
    assert not wrong and len(public) > 200


def test_each_link_of_the_pages_leads_to_a_file(tmp_path):
    conf.write_sources(tmp_path)  # raises where one does not
    home = (tmp_path / "index.md").read_text()
    assert "](diffusers.md)" in home and not re.search(r"(?<!!)\[[^]]*\]\(docs/", home)
    assert home.count("{toctree}") == len(conf.PAGES) + 1 and (tmp_path / "reference" / "samplers.rst").exists()


def test_a_folder_of_something_else_is_kept(tmp_path):
    """`sphinx-build docs site` names docs/ as the folder that the sources are written to."""
    (tmp_path / "conf.py").write_text("")
    with pytest.raises(ValueError, match="expected a folder of this build's own, such as build/docs"):
        conf.write_sources(tmp_path)
    assert (tmp_path / "conf.py").exists()


def test_pictures_are_small():
    sizes = {path: path.stat().st_size for path in (ROOT / "docs").rglob("*.svg")}
    assert len(sizes) > 5 and max(sizes.values()) < 200_000, sizes


def test_links(tmp_path, monkeypatch):
    def relinked(text, page="docs/exposure.md"):
        return conf.relinked(text, page, tmp_path)

    assert relinked("[a](../README.md#install) [`b`](comfyui.md) [c](#here) [d](https://e.f)") == (
        "[a](index.md#install) [`b`](comfyui.md) [c](#here) [d](https://e.f)"
    )
    assert relinked("![plot](exposure/power.svg)") == "![plot](docs/exposure/power.svg)"
    assert (tmp_path / "docs/exposure/power.svg").exists()
    in_code = "`[a](no.md)`\n\n```python\nx[0](no.md)\n```\n"
    assert relinked(in_code) == in_code
    assert relinked("see [the checks](../csrc/arguments.h)") == "see the checks"
    monkeypatch.setattr(conf, "REPOSITORY", "https://host/blob/main")
    assert relinked("[the checks](../csrc/arguments.h)") == "[the checks](https://host/blob/main/csrc/arguments.h)"
    with pytest.raises(ValueError, match=r"docs/exposure.md: no.md: expected a file of the repository"):
        relinked("[a](no.md)")


def test_links_of_a_static_page(tmp_path, monkeypatch):
    for page in conf.STATIC:
        text = conf.static_page(page)
        assert 'href="../index.html"' in text and 'href="../exposure.html"' in text and ".md" not in text
    (tmp_path / "docs" / "static").mkdir(parents=True)
    (tmp_path / "docs" / "static" / "a.html").write_text('<a href="../../setup.py">')
    monkeypatch.setattr(conf, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"docs/static/a.html: ../../setup.py: expected a page of the site"):
        conf.static_page("static/a.html")


# ---- the site, built and opened ----


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site, built anew with every warning an error."""
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name, reason=f"{name} is not installed: `make docs` brings it")
    folder = tmp_path_factory.mktemp("site")
    (ROOT / "build" / "docs").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", folder / "doctrees"]
    result = subprocess.run([*command, "build/docs", folder / "html"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    handler = functools.partial(_Quiet, directory=folder / "html")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(page.relative_to(folder / "html").as_posix() for page in (folder / "html").rglob("*.html"))
        yield f"http://127.0.0.1:{server.server_port}", pages
        server.shutdown()


POINTS = "lines => lines.map(line => line.getAttribute('points'))"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make docs` brings it")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here: Debian's package chromium")
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.mark.deep
@pytest.mark.parametrize("width", [1400, 390], ids=["desktop", "phone"])
def test_every_page_opens_without_an_error_and_fits(site, chromium, width):
    address, pages = site
    wrong = []
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: message.type == "error" and wrong.append((page.url, message.text)))
    page.on("pageerror", lambda error: wrong.append((page.url, str(error))))
    page.on("response", lambda response: response.status >= 400 and wrong.append((page.url, response.url)))
    for path in pages:
        page.goto(f"{address}/{path}")
        wide, unloaded = page.evaluate(
            "[document.documentElement.scrollWidth - window.innerWidth,"
            " [...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)]"
        )
        wrong += [(path, f"{wide} pixels too wide")] * (wide > 0) + [(path, image) for image in unloaded]
    assert len(pages) > 25 and not wrong
    page.close()


@pytest.mark.deep
@pytest.mark.parametrize("width, columns", [(1400, 6), (390, 4)], ids=["desktop", "phone"])
def test_the_page_with_the_sliders(site, chromium, width, columns):
    """It shows what its address asks for; each control changes digits, curves, words and the address."""
    data = json.loads((ROOT / "docs/explore/data.js").read_text().removeprefix("show(").removesuffix(");\n"))
    page = chromium.new_page(viewport={"width": width, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{site[0]}/index.html")
    page.locator(".sidebar-tree a", has_text="See the effect").first.evaluate("link => link.click()")
    page.wait_for_url("**/explore/index.html*")

    def shown(name, steps, strength):
        """Whether the page says so, in words, curves and address; {canvas: its digits}."""
        page.wait_for_url(f"**#method={name}&steps={steps}&strength={strength:g}")
        method = next(each for each in data["methods"] if each["name"] == name)
        cells = method["cells"][data["steps"].index(steps)]
        own, base = (cells[method["weights"].index(weight)]["distance"] for weight in (strength, method["nothing"]))
        said = page.locator("#summary").inner_text()
        assert said.startswith(f"{steps} steps, ")
        assert (
            own is None
            or strength == method["nothing"]
            or f"Fréchet distance {own:g}, without correction {base:g}: " in said
        )
        points = [len(each.split()) for each in page.locator("svg polyline").evaluate_all(POINTS)]
        assert points.count(steps) == 4 and (own is None or len(method["weights"]) in points)
        assert page.locator("#before").evaluate("canvas => canvas.width") == columns * data["size"]
        return {name: page.locator(f"#{name}").evaluate("canvas => canvas.toDataURL()") for name in ("before", "after")}

    first = shown("lambda-unscaled", 10, 0.85)
    page.locator("#strength").press("ArrowRight")
    moved = shown("lambda-unscaled", 10, 0.875)
    assert moved["before"] == first["before"] != first["after"] != moved["after"]
    page.locator("#steps").press("ArrowRight")
    assert shown("lambda-unscaled", 20, 0.875)["before"] != first["before"]
    page.locator("#steps").press("End")
    assert shown("lambda-unscaled", 50, 0.875) and "Not measured" in page.locator("#distance-says").inner_text()
    page.locator("#steps").press("Home")
    page.get_by_label("DCW").check()
    dcw = next(each for each in data["methods"] if each["name"] == "dcw")
    best = min(zip((cell["distance"] for cell in dcw["cells"][0]), dcw["weights"], strict=True))[1]
    shown("dcw", 5, best)
    page.locator("#strength").press("Home")
    none = shown("dcw", 5, 0)
    assert none["before"] == none["after"] and page.locator("#after-title").inner_text() == "The same"
    page.locator("#best").click()
    shown("dcw", 5, best)
    page.goto(f"{page.url.partition('#')[0]}#method=dcw&steps=20&strength=-0.1")
    shown("dcw", 20, -0.1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and not wrong
    page.close()


@pytest.mark.deep
def test_every_internal_link_leads_to_its_place(site, chromium):
    address, pages = site
    page, places, links = chromium.new_page(), {}, []
    for path in pages:
        page.goto(f"{address}/{path}")
        places[path], found = page.evaluate(
            "[[...document.querySelectorAll('[id]')].map(each => each.id), [...document.links].map(each => each.href)]"
        )
        links += [(path, link) for link in found if link.startswith(address)]
    broken = set()
    for path, link in links:
        target, _, anchor = link.removeprefix(f"{address}/").partition("#")
        if target not in places or (anchor and urllib.parse.unquote(anchor) not in places[target]):
            broken.add((path, link))
    assert len(links) > 1000 and not broken
    page.close()


@pytest.mark.deep
@pytest.mark.parametrize(
    "words, title, expected",
    [
        ("ddim_inverse", "epskernels.samplers.ddim_inverse", "reference/samplers.html"),
        ("guidance_rescale", "epskernels.guidance_rescale", "reference/step.html"),
        ("AOTInductor", "Export, AOTInductor, C++", "production_export.html"),
        ("noise alone", "Glossary > Noise alone", "glossary.html#noise-alone"),
    ],
)
def test_search(site, chromium, words, title, expected):
    address, _ = site
    page = chromium.new_page()
    page.goto(f"{address}/index.html")
    page.locator("input[name=q]").first.fill(words)
    page.keyboard.press("Enter")
    page.locator("#search-results ul.search li a").first.wait_for()
    found = page.locator("#search-results ul.search li > a")
    titles = found.all_inner_texts()
    assert title in titles[:5], titles[:10]
    found.nth(titles.index(title)).click()
    page.wait_for_url(f"{address}/{expected}*")
    page.close()
