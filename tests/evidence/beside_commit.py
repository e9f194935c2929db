"""The speed of this commit against that of an earlier one, row by row of tests/bench.py.

    git worktree add ../old COMMIT
    python tests/evidence/beside_commit.py ../old [ROW ...] [--rounds 9] [--compile]

Both versions of a step run in alternating rounds in one process, so that other users of the
processor slow both. The last column is seconds of the old step / seconds of the new one, the median
over the rounds (smallest to largest). Above 1 the new one is faster. Give the row "inversion"
without --compile if COMMIT is older than its compilation.
"""

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("bench", "conftest", "helpers", "common", "vitkd", "attndistill", "dearkd", "eval_knn")


def load_bench(root):
    """Return tests/bench.py of `root`, with the scripts of the same folder."""
    for name in MODULES:
        sys.modules.pop(name, None)
    path = list(sys.path)
    sys.path[:0] = [str(root), str(root / "tests")]
    bench = importlib.import_module("bench")
    sys.path[:] = path
    return bench


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("old", type=Path, help="folder with the earlier commit")
    parser.add_argument("rows", nargs="*", help="as in tests/bench.py (all)")
    parser.add_argument("--rounds", type=int, default=9, help="that are timed (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="both steps")
    args = parser.parse_args()

    old = load_bench(args.old.resolve())
    new = load_bench(ROOT)
    amp = new.common.best_precision(new.DEVICE)
    new.common.choose_attention_kernel(new.DEVICE, amp)  # a switch of torch: it holds for both
    for bench in (old, new):
        bench.DTYPES["ours"] = {"bf16": torch.bfloat16, "fp16": torch.half, "off": torch.float}[amp]

    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {args.rounds} rounds, "
          f"amp {amp}\n\n| row | images/s old | new | old / new, seconds |\n|---|---|---|---|")
    for row in args.rows or new.ROWS:
        own = {"compile": True} if args.compile and row not in new.NOT_COMPILED else {}
        ways = {}
        for name, bench in {"old": old, "new": new}.items():
            torch.manual_seed(0)
            title, images, _, ways[name] = bench.ROWS[row](**own)
        seconds, _ = new.alternate(ways, args.rounds)
        ratios = [a / b for a, b in zip(seconds["old"], seconds["new"])]
        rates = [images / statistics.median(seconds[name]) for name in ("old", "new")]
        print(f"| {title} | {rates[0]:.3g} | {rates[1]:.3g} | {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


if __name__ == "__main__":
    main()
