"""Run each demo with five seeds, one after the other, and keep what it prints in results.jsonl.

    python tests/evidence/demos.py [DEMO]     # what has no line yet; DEMO: "vitkd --demo", ...

A line is called demo/SCRIPT, or demo/dearkd-data-free. Its "table" holds the last lines of the
demo, its "seconds" the time of the whole command. Seconds mean something only if nothing else runs.
"""

import json
import re
import subprocess
import sys
import time
from importlib.metadata import version

from study import RESULTS, ROOT, cpu_model, read_results

DEMOS = ("vitkd --demo", "attndistill --demo", "dearkd --demo", "dearkd --demo-data-free")


def read_table(text):
    """Return {row: number} of a demo's last lines."""
    table = {}
    for name, top1 in re.findall(r"^(\S.*?) +(?:k-NN )?top-1 +([\d.]+) %$", text, re.MULTILINE):
        table[name.removesuffix(", with labels")] = float(top1)
    for name, top1, distance in re.findall(
            r"^(\S+) +images: top-1 of the CNN +([\d.]+) %, distance ([\d.]+)$", text,
            re.MULTILINE):
        table[f"{name}: top-1 of the CNN"] = float(top1)
        table[f"{name}: distance"] = float(distance)
    return table


def run_demo(demo, seed):
    """Return the line of one demo."""
    script, flag = demo.split()
    command = f"{script}.py {flag} --seed {seed}"
    start = time.time()
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, text=True, check=True,
                          capture_output=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.strip()
    return {
        "name": name_of(demo),
        "seed": seed,
        "command": f"python {command}",
        "commit": commit,
        "cpu": cpu_model(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": version("torch"), "torchvision": version("torchvision")},
        "table": read_table(done.stdout),
        "seconds": round(time.time() - start)}


def name_of(demo):
    return f"demo/{demo.replace(' --demo', '')}"


def main(demos):
    for seed in range(5):
        for demo in demos:
            if (name_of(demo), seed) not in read_results():
                line = run_demo(demo, seed)
                with RESULTS.open("a") as results:
                    results.write(json.dumps(line, ensure_ascii=False) + "\n")
                print(line["name"], seed, line["table"], line["seconds"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or DEMOS)
