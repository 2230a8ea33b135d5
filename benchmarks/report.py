"""Draws a run of bench.py and writes docs/benchmarks.md, whose every figure names its run.

make report [RUN=benchmarks/results/cpu.json]
"""

import argparse
import pathlib

import harness
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
COPY, COMPILED = "a copy of the same bytes", "torch.compile"
TITLES = {
    "limit": "The limit: the same bytes, the same noise",
    "size": "By size",
    "feature": "By feature",
    "band": "With the low band corrected",
    "dtype": "By dtype",
    "scheduler": "Beside diffusers' schedulers: one step",
    "formula": "Beside the papers' formulas in eager PyTorch",
    "loop": "Whole trajectories, with a model that costs nothing",
    "real model": "Whole trajectories with the bundled model: what is above 1 is all that is not the model",
    "batch": "Growth with the batch",
    "growth": "Growth with the size",
    "rows": "Distinct rows in a batch",
    "threads": "Threads",
    "call": "What a call costs, at 1,024 elements",
    "compiled call": "What a call costs under torch.compile, at 1,024 elements",
}


def rows_of(results, group, peer=None, **axes):
    for row in results["rows"]:
        if row["group"] == group and peer in (None, row["peer"]):
            if all(row["axes"].get(axis) == value for axis, value in axes.items()):
                yield row


def line(axis, rows, x, y, label):
    """A line over the rows, with their intervals."""
    rows = sorted(rows, key=x)
    values = [y(row["ratio"]) for row in rows]
    bounds = [sorted(y(bound) for bound in row["interval"]) for row in rows]
    spread = [[value - low for value, (low, _) in zip(values, bounds, strict=True)],
              [high - value for value, (_, high) in zip(values, bounds, strict=True)]]  # fmt: skip
    axis.errorbar([x(row) for row in rows], values, yerr=spread, marker="o", markersize=3, capsize=2, label=label)


def draw(results, folder):
    """The plots of a run; their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    numel, machine = (lambda row: row["axes"]["numel"]), results["machine"]["processor"]

    def figure(name, title, xlabel, ylabel, paint):
        drawing, axis = plt.subplots(figsize=(6.4, 3.8))
        axis.set_xscale("log")
        paint(axis)
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        drawing.text(0.99, 0.01, machine, ha="right", fontsize=6, color="gray")
        drawing.tight_layout()
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same file for the same numbers
            drawing.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(drawing)
        return f"{name}.svg"

    def roofline(axis):
        for feature in ("plain", "noise"):
            line(axis, rows_of(results, "size", COPY, feature=feature), numel, lambda r: 1 / r, feature)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(0)

    def beside_compiled(axis):
        for feature in ("plain", "noise"):
            line(axis, rows_of(results, "size", COMPILED, feature=feature), numel, lambda r: 1 / r, feature)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")

    def by_batch(axis):
        growth(axis, "batch", "batch", 1, base=2)

    def by_size(axis):
        growth(axis, "growth", "numel", 1000, base=10)

    def growth(axis, group, name, one, base):
        rows = list(rows_of(results, group))
        line(axis, rows, lambda row: row["axes"][name], lambda r: r, "step, out=")
        sizes = sorted(row["axes"][name] for row in rows)
        axis.plot(sizes, [size / one for size in sizes], color="black", linewidth=0.8, label="proportional")
        for scale in (axis.set_xscale, axis.set_yscale):
            scale("log", base=base)

    plots = [
        figure("share_of_copy", "Share of the speed of a copy of the same bytes, out=", "elements", "share", roofline),
        figure("beside_compile", "How many times faster than torch.compile", "elements", "times", beside_compiled),
    ]
    if list(rows_of(results, "batch")):
        plots.append(figure("by_batch", "Cost of a batch over that of one sample", "samples", "ratio", by_batch))
    if list(rows_of(results, "growth")):
        plots.append(figure("by_size", "Cost of a state over that of 1,000 elements", "elements", "ratio", by_size))
    return plots


def table(rows):
    yield "| | beside | ratio [95 %] | target |"
    yield "|---|---|---|---|"
    for row in rows:
        low, high = row["interval"]
        met = "" if row["target"] is None else f"{row['target']:.3g}: {'met' if row['met'] else '**not met**'}"
        yield f"| {row['name']} | {row['peer']} | {row['ratio']:.3f} [{low:.3f}, {high:.3f}] | {met} |"


def page(results, run, plots):
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield "# Benchmarks"
    yield ""
    yield "Time of epskernels over time of the peer; below 1 is faster. Medians over interleaved rounds, with the hierarchical"
    yield "bootstrap's interval of 95 %. Written by `make report`; do not edit."
    yield ""
    yield f"Every figure on this page is of the run `{run}`: {machine['processor']}, {machine['threads']} threads,"
    yield f"{machine['cpu_capability']}, {machine['compiler']}; Python {machine['python']}, {versions};"
    yield f"commit {machine['commit'][:12]}, {machine['date']}; command `{machine['command']}`."
    yield ""
    missed = [row for row in results["rows"] if row["met"] is False]
    judged = [row for row in results["rows"] if row["met"] is not None]
    yield f"Targets: {len(judged) - len(missed)} of {len(judged)} met."
    for row in missed:
        yield f"- not met: {row['group']}, {row['name']} beside {row['peer']}: {row['ratio']:.3f}, target {row['target']:.3g}"
    for plot in plots:
        yield f"\n![{plot}](benchmarks/{plot})"
    for group, title in TITLES.items():
        rows = list(rows_of(results, group))
        if rows:
            yield f"\n## {title}\n"
            yield from table(rows)
            fits = {name: fit for name, fit in results["growth"].items() if name.startswith(f"{group},")}
            yield from (f"\n{name}: {exponent:.3f}" for name, exponent in fits.items())
    if results["memory"]:
        yield "\n## Memory of a call\n"
        yield "Counted, not timed: allocations, and the most memory held beyond the inputs, in units of the state."
        yield "\n| | form | allocations | peak |"
        yield "|---|---|---|---|"
        for row in results["memory"]:
            yield f"| {row['feature']} | {row['form']} | {row['allocations']} | {row['peak_over_state']:.2f} |"
    yield "\n## On a GPU\n"
    gpu = results["gpu"] or {"not measured": "the run left it out"}
    if "not measured" in gpu:
        yield f"Not measured: {gpu['not measured']}. `make gpu-check` measures it."
    else:
        yield f"{gpu['machine']['device']}:"
        yield "\n| claim | target | worst | where | |"
        yield "|---|---|---|---|---|"
        for target in gpu["targets"]:
            met = {True: "met", False: "**not met**", None: "not measured"}[target["met"]]
            worst = "" if target["worst"] is None else f"{target['worst']:.3f}"
            yield f"| {target['claim']} | {target['target']} | {worst} | {target['where'] or ''} | {met} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--docs", default=ROOT / "docs", type=pathlib.Path)
    args = parser.parse_args()
    results = harness.asked_for(parser, args.run)
    plots = draw(results, args.docs / "benchmarks")
    run = pathlib.Path(args.run).resolve()
    name = run.relative_to(ROOT) if run.is_relative_to(ROOT) else run.name
    (args.docs / "benchmarks.md").write_text("\n".join(page(results, name, plots)) + "\n")
    print(f"{args.docs / 'benchmarks.md'} and {len(plots)} plots, of {name}")


if __name__ == "__main__":
    main()
