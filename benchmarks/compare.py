"""Two runs of bench.py, row by row: which ratios moved by more than their spread.

    make bench-compare OLD=benchmarks/results/a.json NEW=benchmarks/results/b.json

A regression is a ratio whose whole interval lies above the old one, and which is worse by at least 3 %. Exit status 1 where
there is one, 2 where there are no such results.
"""

import argparse
import collections

import harness

LEAST = 0.03


def verdict(old, new):
    """ "slower", "faster" or "same" of one row in two runs."""
    (old_low, old_high), (new_low, new_high) = old["interval"], new["interval"]
    if new_low > old_high and new["ratio"] > old["ratio"] * (1 + LEAST):
        return "slower"
    if new_high < old_low and new["ratio"] < old["ratio"] / (1 + LEAST):
        return "faster"
    return "same"


def overlap(old, new):
    """Whether the runs agree: their intervals meet."""
    return old["interval"][0] <= new["interval"][1] and new["interval"][0] <= old["interval"][1]


def compare(old, new):
    """[(row of old, row of new, verdict)] of the rows that both have, and the keys that one lacks."""
    by_key = [{harness.key(row): row for row in results["rows"]} for results in (old, new)]
    both = [key for key in by_key[0] if key in by_key[1]]
    rows = [(by_key[0][key], by_key[1][key], verdict(by_key[0][key], by_key[1][key])) for key in both]
    return rows, sorted(by_key[0].keys() ^ by_key[1].keys())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    args = parser.parse_args()
    old, new = harness.asked_for(parser, args.old), harness.asked_for(parser, args.new)
    for field in ("processor", "cpu_capability", "threads", "versions"):
        if old["machine"][field] != new["machine"][field]:
            print(f"NOTE: {field} differs: {old['machine'][field]} and {new['machine'][field]}")
    rows, lacking = compare(old, new)
    for before, after, said in rows:
        if said != "same":
            title = f"{before['group']}: {before['name']} / {before['peer']}"
            spans = [
                f"{row['ratio']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]" for row in (before, after)
            ]
            print(f"{said.upper():<7} {title:<90} {spans[0]} -> {spans[1]}")
    for group, count in sorted(collections.Counter(group for group, *_ in lacking).items()):
        print(f"in one run only: {count} rows of {group}")
    counts = {said: sum(row[2] == said for row in rows) for said in ("slower", "faster", "same")}
    agree = sum(overlap(before, after) for before, after, _ in rows)
    print(
        f"{len(rows)} rows: {counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same; ", end=""
    )
    print(f"the intervals of {agree} meet ({agree / max(1, len(rows)):.1%})")
    raise SystemExit(counts["slower"] > 0)


if __name__ == "__main__":
    main()
