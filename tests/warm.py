"""A process that has imported torch and runs scripts in forks of itself: real processes of their
own, but ready two or three seconds earlier than a new Python.

It answers each line of stdin, a JSON list, by a line of stdout:
    start, environment, files for stdout and stderr, argv (a script, -m and a module, or Python's
    path and what a new Python shall run)  ->  pid
    poll, pid  ->  exit status (minus the signal's number), null while it runs
"""

import json
import os
import runpy
import sys

# for the scripts, not for use here
import torch.distributed.run
import torch.fx.passes.shape_prop  # noqa: F401
import torchvision.models.feature_extraction  # noqa: F401


def run(environment, files, argv):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    if argv[0] == sys.executable:
        os.execv(argv[0], argv)
    sys.path[0] = os.getcwd()
    sys.argv = argv[argv[0] == "-m":]
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")
    sys.exit()


for line in sys.stdin:
    what, *job = json.loads(line)
    if what == "start":
        answer = os.fork()
        if answer == 0:
            run(*job)
    else:
        pid, status = os.waitpid(*job, os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps(answer), flush=True)
