"""Draws experiments/results/exposure.json and writes the measured part of docs/exposure.md, between its two markers."""

import pathlib

import numpy as np

from epskernels.exposure import Exposure, figures

BEGIN, END = "<!-- measured: written by `make quality-report` -->\n", "<!-- end of measured -->"


def largest(row):
    """(samples, table) of the most samples that the row has."""
    return max(((int(count), table) for count, table in row.get("tables", {}).items()), default=(0, None))


def interval(estimate, digits=2):
    value, low, high = estimate
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def change(estimate):
    """A difference, in bold where its interval leaves 0 out."""
    value, low, high = estimate
    said = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{said}**" if low > 0 or high < 0 else said


def distances(rows):
    yield "| sampler, T' | samples | baseline | best uniform b | uniform | norm-matched | linear fit of it |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        count, table = largest(row)
        if table:
            names = ("uniform", "norm-matched", "linear")
            cells = [change(table[name]["frechet_difference"]) if name in table else "not above 0" for name in names]
            b = row["lambda"]["uniform"]
            if b == 1:
                cells[0] = "as baseline"
            baseline = interval(table["baseline"]["frechet"])
            yield f"| {row['sampler']}, {row['steps']} | {count:,} | {baseline} | {b:g} | {' | '.join(cells)} |"


def precision_recall(rows):
    yield "| sampler, T' | precision, baseline | uniform | norm-matched | recall, baseline | uniform | norm-matched |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        count, table = largest(row)
        if table:
            cells = []
            for measure in ("precision", "recall"):
                cells.append(interval(table["baseline"][measure], 3))
                for name in ("uniform", "norm-matched"):
                    value, low, high = table[name][f"{measure}_difference"]
                    mark = "**" if low > 0 or high < 0 else ""
                    cells.append("as baseline" if row["lambda"][name] == 1 else f"{mark}{value:+.3f}{mark}")
            yield f"| {row['sampler']}, {row['steps']} | {' | '.join(cells)} |"


def sweeps(rows):
    columns = sorted({float(b) for row in rows for b in row["sweep"]})
    yield "| sampler, T' | " + " | ".join(f"{b:g}" for b in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in rows:
        best = min(row["sweep"].values())
        cells = [row["sweep"].get(f"{b:g}") for b in columns]
        said = ["" if d is None else f"**{d:.2f}**" if d == best else f"{d:.2f}" for d in cells]
        yield f"| {row['sampler']}, {row['steps']} | {' | '.join(said)} |"


def fits(rows):
    yield "| sampler, T' | lambda_t by norms: noisiest step, middle, second, cleanest | linear k, b, R^2 | quadratic R^2 |"
    yield "|---|---|---|---|"
    for row in rows:
        if "fits" in row:
            matched = row["lambda"]["norm-matched"]
            shown = ", ".join(f"{matched[i]:.4f}" for i in (0, len(matched) // 2, -2, -1))
            line, curve = row["fits"]["linear"], row["fits"]["quadratic"]
            k, b = line["coefficients"]
            r2 = f"{k:.5f}, {b:.4f}, {line['r2']:.2f}"
            yield f"| {row['sampler']}, {row['steps']} | {shown} | {r2} | {curve['r2']:.2f} |"


def bias(measured):
    yield "| sampler, T', lambda | DeltaN, least | greatest | of the last two rows | delta_t, first row | last | of one step |"
    yield "|---|---|---|---|---|---|---|"
    for (sampler, steps, name), e in measured.items():
        gap = e.norm_gap
        chain, one = e.delta_chain, np.nanmax(e.delta_single)
        last = f"{gap[-2]:.4f}, {gap[-1]:.4f}"
        ends = f"{chain[0]:.1e} | {chain[-1]:.3f} | {one:.1e}"
        yield f"| {sampler}, {steps}, {name} | {gap.min():.4f} | {gap.max():.4f} | {last} | {ends} |"


def closed_form(e):
    yield "| t | sigma^2 | measured | closed form, independent error | closed form, measured covariance | e_t |"
    yield "|---|---|---|---|---|---|"
    for i in range(len(e.t)):
        values = (e.variance_single[i], e.variance_paper[i], e.variance_closed[i])
        said = " | ".join(f"{value:.5f}" for value in values)
        yield f"| {e.t[i]:g} | {e.sigma_out[i] ** 2:.5f} | {said} | {e.error[i]:.4f} |"


def draw(rows, measured, folder):
    """The plots; their file names."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(name, title, panels):
        figure, axes = figures(len(panels))
        for axis, (paint, settings) in zip(axes, panels, strict=True):
            paint(axis)
            axis.set(**settings)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        figure.suptitle(title, fontsize=10)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        return f"{name}.svg"

    names = []
    for row in rows:
        title = f"{row['sampler']}, T' = {row['steps']}"
        found = {
            name: e
            for (sampler, steps, name), e in measured.items()
            if (sampler, steps) == (row["sampler"], row["steps"])
        }

        def gaps(axis, found=found):
            for name, e in found.items():
                axis.errorbar(range(len(e.t)), e.norm_gap, 2 * e.norm_gap_se, marker="o", markersize=3, label=name)
            axis.axhline(1, color="black", linewidth=0.8)

        def deltas(axis, found=found):
            for name, e in found.items():
                axis.plot(range(len(e.t)), e.delta_chain, marker="o", markersize=3, label=name)
            axis.set_yscale("log")

        def sweep(axis, row=row):
            points = sorted((float(b), d) for b, d in row["sweep"].items())
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label="selection")

        if found:
            names.append(write(
                f"{row['sampler']}-{row['steps']}", title,
                [(gaps, {"title": "norm gap DeltaN, two standard errors", "xlabel": "row, the noisiest first"}),
                 (deltas, {"title": "delta_t", "xlabel": "row, the noisiest first"}),
                 (sweep, {"title": "Frechet distance by uniform b", "xlabel": "b"})],
            ))  # fmt: skip
    return names


def report(saved, results, docs):
    rows = saved["rows"]
    measured = {}
    for row in rows:
        for name in ("baseline", "uniform", "norm-matched"):
            path = results / f"{row['sampler']}-{row['steps']}-{name}.json"
            if path.exists() and not (name == "uniform" and row.get("lambda", {}).get("uniform") == 1):
                measured[row["sampler"], row["steps"], name] = Exposure.load(path)
    names = draw(rows, measured, docs / "exposure")
    first = next(iter(measured.values()))
    floor = "; ".join(f"{float(size):g}: {distance:.2f}" for size, distance in saved["noise"].items())
    parts = [
        f"Between 1,000 real digits and 1,000 others, with noise of that standard deviation on the others: {floor}.",
        "## Frechet distance, and its change by lambda", "\n".join(distances(rows)),
        "## Precision and recall", "\n".join(precision_recall(rows)),
        f"## The sweep, over {saved['select'][1]} samples from seed {saved['select'][0]} on", "\n".join(sweeps(rows)),
        "## lambda_t by norms, and its fits without the cleanest quarter of the steps", "\n".join(fits(rows)),
        "## Norm gap and delta_t", "\n".join(bias(measured)), *(f"![{name}](exposure/{name})" for name in names),
        f"## The closed form: variance after one step, {first.sampler}, {first.images} images", "\n".join(closed_form(first)),
    ]  # fmt: skip
    page = pathlib.Path(docs / "exposure.md")
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after)
    print(f"wrote {page} and {len(names)} plots")
