"""Draws a run of bench.py and writes docs/benchmarks.md, whose every figure names its run.

make report [RUN=benchmarks/results/cpu.json]
"""

import argparse
import pathlib

import harness

from epskernels.plots import MARKERS, PALETTE, figures, finish, plain_ticks, save_figure

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


# ---- plots, each a function of (results, figure's path) that returns what it found, or None where the run has nothing of it ----

NOISE = {"noise": "with noise", "plain": "without noise"}


def times(ratios):
    """How many times as fast, from ratios of time: "3.1 to 12 times"."""
    low, high = sorted(_short(1 / ratio) for ratio in (min(ratios), max(ratios)))
    return f"{low:g} times" if low == high else f"{low:g} to {high:g} times"


def _short(value):
    """With two digits, and no fewer than there are before the point."""
    return round(value) if value >= 10 else float(f"{value:.2g}")


def errors(axis, rows, at, convert, way="y", **style):
    """Points with their intervals. at: of each row, its place on the other axis. convert: a ratio -> what is drawn."""
    values = [convert(row["ratio"]) for row in rows]
    bounds = [sorted(convert(bound) for bound in row["interval"]) for row in rows]
    spread = [[value - low for value, (low, _) in zip(values, bounds, strict=True)],
              [high - value for value, (_, high) in zip(values, bounds, strict=True)]]  # fmt: skip
    x, y = (at, values) if way == "y" else (values, at)
    axis.errorbar(x, y, **{f"{way}err": spread}, markersize=4, capsize=2, **style)


def by_numel(axis, results, peer, same):
    """Lines over the number of elements, with noise and without; {feature: its rows}. same: where the peer's speed is drawn."""
    found = {}
    for feature, marker in zip(NOISE, MARKERS, strict=False):
        rows = sorted(rows_of(results, "size", peer, feature=feature), key=lambda row: row["axes"]["numel"])
        if rows:
            found[feature] = rows
            numel = [row["axes"]["numel"] for row in rows]
            errors(axis, rows, numel, lambda ratio: same / ratio, marker=marker, label=NOISE[feature])
    axis.axhline(same, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="elements of the state, float32")
    plain_ticks(axis, "x")
    return found


def saved(figure, axes, results, path, places=("best", "best")):
    """places: of the legends."""
    for axis, place in zip(axes, places, strict=False):
        finish(axis, size=9, loc=place)
    machine = results["machine"]
    said = f"{machine['processor']}, {machine['threads']} threads, {machine['date']}; bars: intervals of 95 %"
    figure.supxlabel(said, fontsize=7, color="dimgray", x=0.99, ha="right")
    save_figure(figure, path)


def beside_compile(results, path):
    """What people use now: the same formula under torch.compile, and diffusers' schedulers."""
    schedulers = list(rows_of(results, "scheduler"))
    figure, axes = figures(1 + bool(schedulers), width=4.6, height=3.6)
    found = by_numel(axes[0], results, COMPILED, same=1)
    if not found:
        return None
    (said, first), *others = [(NOISE[name], times([row["ratio"] for row in rows])) for name, rows in found.items()]
    titles = [", ".join([f"{first} as fast as torch.compile\n{said}", *(f"{much} {name}" for name, much in others)])]
    axes[0].set(title=titles[0], yscale="log", ylabel="times as fast as torch.compile")
    plain_ticks(axes[0], "y", spread="y")
    if schedulers:
        titles.append(beside_schedulers(axes[1], schedulers))
    saved(figure, axes, results, path, places=("best", "lower right"))
    return titles


def beside_schedulers(axis, rows):
    peers = list(dict.fromkeys(row["peer"] for row in rows))[::-1]
    by_shape = {}
    for row in rows:
        by_shape.setdefault(tuple(row["axes"]["shape"]), []).append(row)
    for n, (shape, own) in enumerate(by_shape.items()):
        at = [peers.index(row["peer"]) + 0.12 - 0.24 * n for row in own]
        style = {"fmt": MARKERS[n], "color": PALETTE[2 + n], "label": f"state {shape}"}
        errors(axis, own, at, lambda ratio: 1 / ratio, way="x", **style)
    title = f"{times([row['ratio'] for row in rows])} as fast as\ndiffusers' own schedulers"
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(title=title, xscale="log", xlabel="times as fast as diffusers' scheduler")
    axis.set_ylim(-1.7, len(peers) - 0.5)  # the legend below
    axis.set_yticks(range(len(peers)), [peer.removeprefix("diffusers' ") for peer in peers])
    plain_ticks(axis, "x", spread="x")
    return title


def share_of_copy(results, path):
    figure, axes = figures(1, width=6.4, height=3.4)
    found = by_numel(axes[0], results, COPY, same=100)
    if not found:
        return None
    name, rows = list(found.items())[-1]  # without noise, where it is there
    ends = [f"{100 / row['ratio']:.0f} % at {row['axes']['numel']:,} elements" for row in (rows[0], rows[-1])]
    titles = [f"Speed of a step {NOISE[name]} over that of a copy:\n{', '.join(dict.fromkeys(ends))}"]
    axes[0].set(title=titles[0], ylabel="speed of a step / speed of a copy, %", ylim=(0, None))
    saved(figure, axes, results, path)
    return titles


def by_size(results, path):
    """Cost of larger batches and states."""
    panels = [
        (rows, key, *said)
        for group, key, *said in (("batch", "batch", "samples", 1, 2), ("growth", "numel", "elements", 1000, 10))
        if (rows := sorted(rows_of(results, group), key=lambda row: row["axes"][key]))
    ]
    if not panels:
        return None
    figure, axes = figures(len(panels), width=4.6, height=3.4)
    titles = []
    for axis, (rows, key, what, one, base) in zip(axes, panels, strict=True):
        sizes = [row["axes"][key] for row in rows]
        errors(axis, rows, sizes, lambda ratio: ratio, marker="o", label="step, out=")
        axis.plot([one, sizes[-1]], [1, sizes[-1] / one], color="black", linewidth=0.8, label="proportional")
        titles.append(f"{sizes[-1]:,} {what} take\n{_short(rows[-1]['ratio']):g} times as long as {one:,}")
        axis.set(title=titles[-1], xlabel=what, ylabel=f"time of a step / its time with {one:,}")
        axis.set_xscale("log", base=base)
        axis.set_yscale("log", base=base)
        plain_ticks(axis, "x", "y")
    saved(figure, axes, results, path)
    return titles


PLOTS = (beside_compile, share_of_copy, by_size)


def draw(results, folder):
    """The plots of a run: {file name: what it says}."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for plot in PLOTS:
        if titles := plot(results, folder / f"{plot.__name__}.svg"):
            found[f"{plot.__name__}.svg"] = "; ".join(title.replace("\n", " ") for title in titles)
    return found


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
    yield "bootstrap's interval of 95 %. A target is met where the ratio itself, not its interval, is at or below it. Written by"
    yield "`make report`; do not edit."
    yield ""
    yield "`make bench` measures all of it, in six passes, each a process of its own. A part of it, in one pass:"
    yield "`python benchmarks/bench.py --passes 1 --only '^feature: plain'`; on a busy machine its intervals are wide."
    yield f"The parts are {', '.join(TITLES)}, memory."
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
    for plot, said in plots.items():
        yield f"\n![{said}](benchmarks/{plot})"
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
