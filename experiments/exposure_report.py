"""Draws experiments/results/*.json and writes the measured parts of docs/exposure.md and exposure_tables.md, between markers."""

import comparison
import numpy as np
import records
from matplotlib.figure import Figure

from epskernels import calibrate
from epskernels.plots import MARKERS, PALETTE, finish, largest_gap, plain_ticks, save_figure, styled

BEGIN, END = "<!-- measured: written by `make quality-report` -->\n", "<!-- end of measured -->"
POINTS = 16  # of a curve along the chain
# What holds for all panels of a plot.
CAPTION = """T' is the number of model calls of a chain. Solid: lambda 1; dotted: the best uniform lambda.
Shaded: two standard errors. Bars: 95 % intervals of the change, of other seeds than the curves; unclear: 0 is in it.
delta_t: squared difference between the standard deviation of a chain's states and that of training."""
KINDS = ("baseline", "uniform", "norm-matched")  # whose exposure bias is measured


def paired_gap(e):
    """The norm gap down the chain from real images: of pairs."""
    return e.norm_chain / e.norm_training


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def title(row):
    return f"{row['sampler']}, {row['steps']}"


def largest(row):
    """(samples, table) of the most samples that the row has."""
    return max(((int(count), found) for count, found in row.get("tables", {}).items()), default=(0, None))


def with_tables(rows):
    return [(row, *largest(row)) for row in rows if row.get("tables")]


def interval(estimate, digits=None):
    """digits: after the point; default: by the size."""
    value, low, high = estimate
    digits = places(value) if digits is None else digits
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def places(value):
    return 1 if value >= 20 else 2 if value >= 1 else 3


def bold(said, low, high):
    """In bold where the interval leaves 0 out."""
    return f"**{said}**" if low > 0 or high < 0 else said


def change(row, found, name, measure="frechet", whole=True):
    """The difference of a lambda from the baseline."""
    if name not in found:
        return ""
    return "as baseline" if row["lambda"][name] == 1 else difference(found, name, measure, whole)


def difference(found, name, measure="frechet", whole=True):
    """What a set's distance, or another measure, has more than the baseline's, with its interval."""
    digits = max(places(found["baseline"][measure][0]), 2)
    value, low, high = found[name][f"{measure}_difference"]
    spread = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if whole else ""
    return bold(f"{value:+.{digits}f}{spread}", low, high)


def overview(rows):
    """Samplers against numbers of model calls, for the page of findings."""
    columns = sorted({group(row) for row, *_ in with_tables(rows)})
    cells = {}
    for row, _, found in with_tables(rows):
        at = cells.setdefault(row["sampler"], {})
        b = row["lambda"]["uniform"]
        lines = [f"{change(row, found, 'uniform')}", f"at {b:g}"] if b != 1 else ["best at 1"]
        at[group(row)] = "<br>".join([interval(found["baseline"]["frechet"]), *lines])
    head = ["sampler", *(f"T' = {calls}" for calls in columns)]
    return table(head, ([name, *(at.get(calls, "") for calls in columns)] for name, at in cells.items()))


def group(row):
    """Its number of model calls, edm_heun's taken for that of the others beside it."""
    return nearest(row["calls"])


def nearest(calls):
    return min((10, 20, 50, 100, 1000), key=lambda each: abs(np.log(each / calls)))


def distances(rows):
    head = ("sampler, T'", "samples", "baseline", "best uniform b", "uniform", "norm-matched", "line fitted to it")
    return table(head, (
        [title(row), f"{count:,}", interval(found["baseline"]["frechet"]), f"{row['lambda']['uniform']:g}",
         *(change(row, found, name) for name in ("uniform", "norm-matched", "fit to norms"))]
        for row, count, found in with_tables(rows)
    ))  # fmt: skip


def precision_recall(rows):
    head = ["sampler, T'"]
    for measure in ("precision", "recall"):
        head += [f"{measure}, baseline", "uniform", "norm-matched"]

    def cells(row, found):
        for measure in ("precision", "recall"):
            yield interval(found["baseline"][measure], 3)
            for name in ("uniform", "norm-matched"):
                yield change(row, found, name, measure, whole=False)

    return table(head, ([title(row), *cells(row, found)] for row, _, found in with_tables(rows)))


def shapes(rows):
    """The ablation: each shape at its best mean."""
    rows = [each for each in with_tables(rows) if len(each[0]["trials"]) > 1]
    if not rows:
        return []
    names = list(rows[0][0]["trials"])

    def cell(row, found, name):
        trials = row["trials"][name]
        return f"{change(row, found, name)} at {min(trials, key=trials.get)}"

    head = ["sampler, T'", "baseline", *names, "norm-matched", "with feedback"]
    return table(head, (
        [title(row), interval(found["baseline"]["frechet"]), *(cell(row, found, name) for name in names),
         *(change(row, found, name) for name in ("norm-matched", "with feedback"))]
        for row, _, found in rows
    ))  # fmt: skip


def sensitivity(rows):
    """How far b may be off before the distance is the baseline's again, by lines between the trials."""

    def bound(b, d, best, way):
        at = [i for i in range(len(b)) if (b[i] - b[best]) * way >= 0][::way]
        for i, j in zip(at, at[1:], strict=False):
            if d[j] > base >= d[i]:
                return f"{b[i] + (b[j] - b[i]) * (base - d[i]) / (d[j] - d[i]):.4f}"
        return f"beyond {b[at[-1]]:g}"

    cells = []
    for row in rows:
        trials = row["trials"]["uniform"]
        if "lambda" not in row or len(trials) < 3:
            continue
        b, d = zip(*sorted((float(b), distance) for b, distance in trials.items()), strict=True)
        best, base = int(np.argmin(d)), trials["1"]
        said = [title(row), f"{b[best]:g}", f"{100 * (d[best] / base - 1):+.1f} %"]
        said += ["", ""] if b[best] == 1 else [bound(b, d, best, -1), bound(b, d, best, 1)]
        cells.append(said)
    head = ("sampler, T'", "best b", "change there", "no worse than 1 from b =", "to")
    return table(head, cells)


def trials(rows):
    def cells(found):
        for b, distance in found.items():
            said = f"{b}: {distance:.{places(distance)}f}"
            yield f"**{said}**" if distance == min(found.values()) else said

    rows = [row for row in rows if row["trials"]["uniform"]]
    return table(
        ("sampler, T'", "b: distance"), ([title(row), ", ".join(cells(row["trials"]["uniform"]))] for row in rows)
    )


def fits(rows):
    def cells(row):
        matched = row["norms"]["norm-matched"]["lambda_t"]  # the cleanest steps too
        yield ", ".join(f"{matched[i]:.4f}" for i in (0, len(matched) // 2, -2, -1))
        line, curve = (calibrate.fit(matched, kind, row["steps"] // 4) for kind in ("linear", "quadratic"))
        k, b = line.coefficients
        yield f"{k:.5f}, {b:.4f}"
        for found in (line, curve):
            yield "" if np.isnan(found.r2) else f"{found.r2:.2f}"

    head = (
        "sampler, T'",
        "lambda_t by norms: noisiest step, middle, second, cleanest",
        "line k, b",
        "its R^2",
        "quadratic's",
    )
    return table(head, ([title(row), *cells(row)] for row in rows if "norm-matched" in row["norms"]))


def bias(measured):
    """Of short chains and of very long ones; the plots have all."""

    def cells(e):
        chain = e.delta_chain
        for ratio in (e.norm_gap, paired_gap(e)):
            yield ", ".join(f"{ratio[i]:.4f}" for i in (0, len(ratio) // 2, -2, -1))
        yield from (f"{chain[0]:.1e}", f"{chain[-1]:.3g}", f"{np.nanmax(e.delta_single):.1e}")

    head = ("sampler, T', lambda", "DeltaN: first row, middle, last but one, last", "the same from real images",
            "delta_t, first row", "last", "of one step, greatest")  # fmt: skip
    return table(head, (
        [f"{sampler}, {steps}, {name}", *cells(e)]
        for (sampler, steps, name), e in measured.items() if len(e.t) <= 21 or len(e.t) >= 1000
    ))  # fmt: skip


# ---- the corrections side by side ----


def compared(rows):
    """(row, samples, table, what `comparison` knows) of each row that has it."""
    return [
        (row, *largest(row["corrected"]), row["corrected"]) for row in rows if row.get("corrected", {}).get("tables")
    ]


def methods(rows):
    """The names of all methods, in the order of the first row that has all that any has."""
    longest = max((found for _, _, found, _ in compared(rows)), key=len, default={})
    return [name for name in longest if name != "baseline"]


def weights(chosen):
    """A method's weights, in short; of those that have a number."""
    said = [value for key, value in chosen.items() if key == "together"]
    return "<br>".join([*said, *(f"{key} {value:.4g}" for key, value in chosen.items() if not isinstance(value, str))])


def corrections(subject, rows):
    names = methods(rows)

    def cell(found, known, name):
        if name not in found:
            return ""
        if found[name] == found["baseline"]:
            return "as baseline"
        return "<br>".join(filter(None, [difference(found, name), weights(known["chosen"].get(name, {}))]))

    there = {(row["sampler"], group(row)) for row, *_ in compared(rows)}
    missing = [
        f"{name}, {calls}" for each, name, calls in comparison.cells([subject]) if (name, nearest(calls)) not in there
    ]
    if names:
        yield from table(["sampler, T'", "samples", "baseline", *names], (
            [title(row), f"{count:,}", interval(found["baseline"]["frechet"]), *(cell(found, known, name) for name in names)]
            for row, count, found, known in compared(rows)
        ))  # fmt: skip
    if missing:
        yield f"\nNot measured yet, by sampler and number of model calls: {'; '.join(missing)}."


# What `shares` shows: a method of its own, or the best of several.
SHOWN = {
    "uniform lambda": ["uniform"],
    "TSR": ["tsr"],
    "DC, better target": ["dc", "dc, alpha*m0"],
    "low band, constant": ["dcw low, constant"],
    "frequency": ["frequency"],
    "time shift": ["time shift"],
}


def shares(saved, calls=10):
    """How much of the distance each method takes off, in percent, of all rows of so many model calls; the best is bold."""

    def share(found, names):
        values = [found[name]["frechet"][0] for name in names if name in found]
        return 1 - min(values) / found["baseline"]["frechet"][0] if values else None

    def cells(found):
        each = [share(found, names) for names in SHOWN.values()]
        best = max(value for value in each if value is not None)
        for value in each:
            said = "" if value is None else f"{100 * value:.0f} %"
            yield f"**{said}**" if value == best else said

    return table(["model", "sampler, T'", *SHOWN], (
        [f"`{subject}`", title(row), *cells(found)]
        for subject, each in saved.items() for row, _, found, _ in compared(each["rows"]) if group(row) == calls
    ))  # fmt: skip


def variety(rows):
    """Precision, recall and delta_t of the same."""
    names = ["baseline", *methods(rows)]

    def cell(found, known, name):
        if name not in found:
            return ""
        precision, recall = (found[name][measure][0] for measure in ("precision", "recall"))
        return f"{precision:.2f}, {recall:.2f}, {known['delta'][name][-1]:.3f}" if name in known["delta"] else ""

    if compared(rows):
        yield from table(["sampler, T'", *names], (
            [title(row), *(cell(found, known, name) for name in names)] for row, _, found, known in compared(rows)
        ))  # fmt: skip


def closed_form(e):
    head = ("t", "sigma^2", "measured", "closed form, independent error", "closed form, measured covariance", "e_t")
    return table(head, (
        [f"{e.t[i]:.4g}", *(f"{value:.5f}" for value in (e.sigma_out[i] ** 2, e.variance_single[i], e.variance_paper[i],
                                                      e.variance_closed[i])), f"{e.error[i]:.4f}"]
        for i in range(len(e.t))
    ))  # fmt: skip


# ---- plots: a row of panels for each sampler, whose titles say what was found ----


def by_calls(rows):
    """(row, colour and marker, name) of each number of model calls, the same in all panels."""
    for n, row in enumerate(rows):
        yield row, {"color": PALETTE[n], "marker": MARKERS[n]}, f"T' = {row['calls']}"


def draw_along(rows, measured, axes):
    """Norm gap and delta_t along the chain, at lambda 1 and at the best lambda."""
    gaps, ends = [], []
    for row, style, said in by_calls(rows):
        for kind, line in (("baseline", "-"), ("uniform", ":")):
            if (e := measured.get((row["sampler"], row["steps"], kind))) is None:
                continue
            shown = np.unique(np.linspace(0, len(e.t) - 1, POINTS).astype(int))
            where, gap, error = np.linspace(0, 1, len(e.t))[shown], e.norm_gap[shown], 2 * e.norm_gap_se[shown]
            options = {"linestyle": line, "linewidth": 1, "color": style["color"]}
            axes[0].fill_between(where, gap - error, gap + error, color=style["color"], alpha=0.2, linewidth=0)
            axes[0].plot(where, gap, label=said if kind == "baseline" else None, **options)
            axes[1].plot(where, e.delta_chain[shown], **options)
            if kind == "baseline":
                gaps.append((e.norm_gap, e.norm_gap_se))
                ends.append(f"{e.delta_chain[-1]:.2g} at {said}")
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].locator_params(axis="y", nbins=6)
    found = largest_gap(*np.concatenate(gaps, axis=1)) if gaps else "not measured"
    axes[0].set(title=f"Without correction, predicted\nnoise is {found}", ylabel="norm: sampling / training")
    axes[1].set(title=f"Variance error at the end of the chain:\n{ends_of(ends)}", yscale="log",
                ylabel="delta_t, data units squared")  # fmt: skip
    plain_ticks(axes[1], "y")
    for axis in axes:
        axis.set(xlabel="place in the chain: 0 noisiest, 1 cleanest", xticks=[0, 0.5, 1])


def ends_of(said):
    """Of the fewest and of the most model calls."""
    return ", ".join(dict.fromkeys([*said[:1], *said[-1:]]))


def draw_distance(rows, axis):
    """The trials by lambda; of other seeds, with its interval, the one that was chosen."""
    changes = []
    for row, style, said in by_calls(rows):
        trials = sorted((float(b), distance) for b, distance in row["trials"]["uniform"].items())
        b, distances = np.array(trials).T
        axis.plot(b, distances / dict(trials)[1.0], markersize=2, linewidth=1, label=said, **style)
        _, found = largest(row)
        if found and row["lambda"]["uniform"] != 1:
            over_baseline(axis, [row["lambda"]["uniform"]], found, ["uniform"], **style)
        if found:
            changes.append(f"{clear_change(found, 'uniform')} at {said}")
    axis.set(title=f"Best lambda, change of the distance:\n{ends_of(changes)}", xlabel="lambda, the same at all steps",
             ylabel="Fréchet distance / that at 1")  # fmt: skip
    axis.locator_params(axis="x", nbins=5)
    axis.locator_params(axis="y", nbins=7)
    from_one_on(axis)


def clear_change(found, name):
    """What a set's distance has more than the baseline's, where the interval leaves 0 out."""
    value, low, high = found[name].get("frechet_difference", (0, 0, 0))
    if low == high == 0:
        return "none"
    return f"{100 * value / found['baseline']['frechet'][0]:+.0f} %" if low > 0 or high < 0 else "unclear"


def over_baseline(axis, x, found, names, **style):
    """Distances over the baseline's, with the intervals of their differences. x: where each of the names stands."""
    base = found["baseline"]["frechet"][0]
    changes = np.array([found[name].get("frechet_difference", (0, 0, 0)) for name in names])
    value, low, high = 1 + changes.T / base
    bars = {"markersize": 4, "capsize": 2, "elinewidth": 1, "linestyle": "none"}
    axis.errorbar(x, value, [value - low, high - value], **bars, **style)


def from_one_on(axis):
    """A line at 1; above it a logarithmic axis, where there are values far above. Below it an interval may pass 0."""
    axis.axhline(1, color="black", linewidth=0.8)
    if axis.dataLim.y1 > 3:
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([-1, -0.5, 0, 0.5, *(digit * 10**power for power in range(4) for digit in (1, 2, 5))])
        axis.set_ylim(axis.dataLim.y0 - 0.1, axis.dataLim.y1 * 1.2)
        plain_ticks(axis, "y")


def draw_corrections(rows, axis):
    """Distances by correction over the baseline's."""
    names, best = methods(rows), []
    known = {id(row): found for row, _, found, _ in compared(rows)}
    for n, (row, style, said) in enumerate(by_calls(rows)):
        found = known.get(id(row), {})
        shown = [name for name in names if name in found]
        if shown:
            over_baseline(axis, [names.index(name) + 0.15 * n for name in shown], found, shown, **style)
            winner = min(shown, key=lambda name: found[name]["frechet"][0])
            best.append(f"{winner}, distance {clear_change(found, winner)} at {said}")
    axis.set_xticks(range(len(names)), names, rotation=25, ha="right", rotation_mode="anchor")
    axis.set(title="Best correction: " + "; ".join(best), xlabel="correction",
             ylabel="Fréchet distance / uncorrected")  # fmt: skip
    from_one_on(axis)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))


def draw(name, rows, measured, part):
    """One sampler's panels, in its part of the figure."""
    corrects = bool(compared(rows))
    grid = part.add_gridspec(1 + corrects, 3)
    axes = styled(
        part.add_subplot(cell) for cell in [grid[0, k] for k in range(3)] + ([grid[1, :]] if corrects else [])
    )
    drawn = [row for row in rows if "lambda" in row]
    draw_along(drawn, measured, axes[:2])
    draw_distance(drawn, axes[2])
    if corrects:
        draw_corrections(rows, axes[3])
    for axis in axes:
        axis.minorticks_off()
        finish(axis, size=7)
    if (repeated := axes[2].get_legend()) is not None:  # the first's tells the colours
        repeated.remove()
    part.suptitle(name, fontsize=11, fontweight="bold", x=0.01, ha="left")


def draw_all(rows, measured, path):
    """A model's plots."""
    by_sampler = {}
    for row in rows:
        by_sampler.setdefault(row["sampler"], []).append(row)
    heights = [5.6 if compared(own) else 3 for own in by_sampler.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.9), layout="constrained")
    parts = figure.subfigures(len(heights), height_ratios=heights, squeeze=False).flat
    for (name, own), part in zip(by_sampler.items(), parts, strict=True):
        draw(name, own, measured, part)
    figure.suptitle(f"{path.stem}. {CAPTION}", fontsize=8)
    save_figure(figure, path)


def section(subject, saved, folder):
    """A model's part of the page."""
    rows, about = saved["rows"], saved["about"]
    measured = {}
    for row in rows:
        for kind in KINDS:
            if kind in row["exposure"] and not (kind == "uniform" and row.get("lambda", {}).get("uniform") == 1):
                measured[row["sampler"], row["steps"], kind] = records.to_exposure(row["exposure"][kind])
    draw_all(rows, measured, folder / f"{subject}.svg")
    one, other = about["noise"]["sets"]
    floor = "; ".join(f"{size}: {distance:.3g}" for size, distance in about["noise"].items() if size != "sets")
    select_seed, select = about["select"]
    first = next(iter(measured.values()))
    trials_of = f"over the {select:,} samples of a trial"
    parts = {  # a heading, and what the table says
        ("The corrections side by side", "Change of the Frechet distance, and the weights."): corrections(subject, rows),
        ("Their precision, recall, and delta_t", "delta_t is that at the end of the chain."): variety(rows),
        ("Frechet distance, and its change by lambda", "T' is the number of steps."): distances(rows),
        ("Precision and recall", "The baseline's, and how much each lambda changes them."): precision_recall(rows),
        ("Shapes of lambda_t", "Each at its best mean b."): shapes(rows),
        ("Best b, and how far it may be off", f"By lines between the trials, {trials_of}."): sensitivity(rows),
        ("The trials", f"The distance by b, {trials_of} from seed {select_seed:,} on; the best is bold."): trials(rows),
        ("lambda_t by norms", "Its fits leave out the cleanest quarter of the steps."): fits(rows),
        ("Norm gap and delta_t", "Of chains up to 21 rows, and of those of 1,000; the plots have all."): bias(measured),
        ("The closed form", f"Variance after one step of {first.sampler}, {first.images} of the data."): closed_form(first),
    }  # fmt: skip
    yield f"## {subject}"
    yield f"Between {one:,} of the real data and {other:,} others, with noise of that standard deviation on the others: {floor}."
    for (heading, about_it), lines in parts.items():
        if text := "\n".join(lines):
            yield f"### {heading} ({subject})\n\n{about_it}\n\n{text.lstrip()}"
    yield f"![norm gap, delta_t and distance of each sampler]({folder.name}/{subject}.svg)"


def replace(path, parts):
    """Puts the parts between the file's markers."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + rest.split(END)[1])
    print(f"wrote {path}")


def report(saved, root):
    folder = root / "docs" / "exposure"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    replace(root / "docs" / "exposure_tables.md", [part for each in saved.items() for part in section(*each, folder)])
    about = (
        "## The corrections at ten model calls\n\nHow much of the Fréchet distance each takes off, the weights chosen on other "
        "seeds; the best of a row is bold.",
        "\n".join(shares(saved)),
        "## The best uniform lambda\n\nThe Fréchet distance without scaling, its change by the best uniform lambda, and that "
        "lambda. T' counts model calls, of `edm_heun` 11, 21, 49, 99. The interval is of 95 %; a change is bold where "
        "its interval leaves 0 out.",
    )
    overviews = [f"`{subject}`:\n\n" + "\n".join(overview(each["rows"])) for subject, each in saved.items()]
    replace(root / "docs" / "exposure.md", [*about, *overviews])
