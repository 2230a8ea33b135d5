"""The picture of the modules in docs/architecture.md is drawn from the code, and nothing imports in a circle.

`python -m tests.project.test_modules` draws it again.
"""

import graphlib
import pathlib

import grimp

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "architecture.md"
BEGIN, END = "```mermaid\n", "```\n"
# A name of a published setting is looked up where lambda's grammar is read; the settings are made of its schedules.
BY_NAME_ALONE = ("scaling", "published_settings")


def imports():
    """{module: what it imports}, packages as one, `typing` left out, which all of them name."""
    graph = grimp.build_graph("epskernels", exclude_type_checking_imports=True, cache_dir=None)

    def name(module):
        return module.removeprefix("epskernels").lstrip(".").split(".")[0] or "epskernels"

    found = {name(module): set() for module in graph.modules}
    for module in graph.modules:
        found[name(module)] |= {name(other) for other in graph.find_modules_directly_imported_by(module)}
    found[BY_NAME_ALONE[0]].discard(BY_NAME_ALONE[1])
    return {m: others - {m, "typing"} for m, others in found.items() if m not in ("typing", "__main__")}


def reached(module, direct):
    """Everything that a module imports, through others too."""
    return set().union(*({other} | reached(other, direct) for other in direct[module]))


def picture():
    """Mermaid's text: arrows to what is imported, without those that others imply."""
    direct = imports()
    lines = ["flowchart TD"]
    for module in sorted(direct):
        through = set().union(*(reached(other, direct) for other in direct[module]))
        lines += [f"  {module} --> {other}" for other in sorted(direct[module] - through)]
    return "\n".join(lines) + "\n"


def drawn():
    text = PAGE.read_text()
    begin = text.index(BEGIN) + len(BEGIN)
    return text, begin, text.index(END, begin)


def test_nothing_imports_in_a_circle():
    assert len(list(graphlib.TopologicalSorter(imports()).static_order())) == len(imports())


def test_the_picture_is_drawn_from_the_code():
    text, begin, end = drawn()
    assert text[begin:end] == picture(), "python -m tests.project.test_modules draws it again"


if __name__ == "__main__":
    text, begin, end = drawn()
    PAGE.write_text(text[:begin] + picture() + text[end:])
