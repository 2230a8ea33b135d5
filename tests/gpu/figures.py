"""What is predicted of a GPU before anything runs on it, beside what was measured.

    seconds = max(bytes / bandwidth of the data sheet, elements * instructions / (multiprocessors * 128 * clock))

instructions: of an element on the fast path, as tests/ops/test_cuda_build.py reads them from the library that was built; a
multiprocessor issues 4 warps of 32 threads a clock. It is a floor: nothing waits, and memory moves what the data sheet says.
"""

import math

LANES = 128
# GB/s, by what the driver's name of the GPU holds: the vendor's data sheets.
BANDWIDTH = {
    "A100-SXM4-80GB": 2039, "A100-SXM4-40GB": 1555, "A100 80GB PCIe": 1935, "A100-PCIE-40GB": 1555, "H100 80GB HBM3": 3350,
    "H100 PCIe": 2000, "H200": 4800, "B200": 8000,
}  # fmt: skip
# By the benchmark's feature: the title of the instruction budget.
TITLES = {
    "plain": "x and f", "noise": "with noise", "guidance": "with guidance", "guidance+noise": "with guidance and noise",
    "band": "by band", "normal": "normal",
}  # fmt: skip


def bandwidth(gpu):
    """GB/s, or None for a GPU whose data sheet is not listed."""
    return next((value for name, value in BANDWIDTH.items() if name in gpu), None)


def predicted(machine, budget, title, elements, moved):
    """(seconds, what bounds them), or (None, why not)."""
    if title not in budget:
        return None, "its instructions were not counted"
    sheet, clock = bandwidth(machine["gpu"]), machine["max SM clock, MHz"]
    if not sheet or not clock:
        return None, "its data sheet is not listed" if clock else "its clock is unknown"
    memory = moved / (sheet * 1e9)
    issue = elements * budget[title]["instructions"] / (machine["multiprocessors"] * LANES * clock * 1e6)
    return (memory, "memory") if memory >= issue else (issue, "issue")


def rows(machine, budget, benchmark):
    """A row for each figure: of large states in a CUDA graph, the kernels, and the copy that they are compared with."""
    measured, largest = {}, {}
    for row in (benchmark or {}).get("results", ()):
        if row["how"] == "node" and row["seconds"]:
            key = row["feature"], row["dtype"]
            measured[*key, tuple(row["shape"]), row["provider"]] = row["seconds"]
            largest[key] = max(largest.get(key, (0, ())), (math.prod(row["shape"]), tuple(row["shape"]), row["bytes"]))
    for feature, title in TITLES.items():
        for dtype in ("float32", "bfloat16"):
            elements, shape, moved = largest.get((feature, dtype), (None, None, None))
            figure = {"figure": f"{title}, {dtype}", "shape": shape, "predicted": None, "bound by": "not measured"}
            if shape:
                seconds, why = predicted(machine, budget, f"{title}, {dtype}", elements, moved)
                figure |= {"predicted": seconds, "bound by": why}
            figure |= {name: measured.get((feature, dtype, shape, name)) for name in ("cuda", "triton", "copy")}
            yield figure


def microseconds(seconds):
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def over(seconds, floor):
    return "-" if seconds is None or floor is None else f"{seconds / floor:.2f}"


def page(machine, parts, figures, targets):
    """The parts, and each figure predicted and measured, in Markdown."""
    lines = [f"# {machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {machine['commit'][:12]}", ""]
    lines += ["| part | predicted | measured | seconds | last line |", "|---|---|---|---|---|"]
    for name, part in parts.items():
        found = {True: "passes", False: "FAILS", None: "unfinished"}[part["passed"]]
        counts = ", ".join(f"{count} {kind}" for kind, count in part.get("counts", {}).items())
        lines += [f"| {name} | passes | {found} | {part['seconds']} | {counts or part['last_line']} |"]
    lines += [
        "",
        "Microseconds of a launch in a CUDA graph, at the largest shape measured; in brackets, over the prediction.",
        "",
    ]
    lines += [
        "| figure | shape | bound by | predicted | CUDA | Triton | copy of as many bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures:
        cells = [
            f"{microseconds(row[name])} ({over(row[name], row['predicted'])})" for name in ("cuda", "triton", "copy")
        ]
        shape = row["shape"] or "-"
        lines += [
            f"| {row['figure']} | {shape} | {row['bound by']} | {microseconds(row['predicted'])} | {' | '.join(cells)} |"
        ]
    lines += ["", "| target | predicted | measured |", "|---|---|---|"]
    for target in targets:
        worst = "not measured" if target["worst"] is None else f"{target['worst']:.3f}, {target['where']}"
        lines += [f"| {target['claim']} | {target['target']} | {worst}, {target['measured']} of {target['of']} |"]
    return "\n".join(lines) + "\n"
