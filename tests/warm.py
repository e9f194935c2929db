"""A process that has imported torch and runs scripts in forks of itself: real processes of their
own, but ready two or three seconds earlier than a new Python.

A line of stdin is a JSON list: the number of processes (above 1: ranks, as torchrun starts them),
files for stdout and stderr, argv (a script, or -m and a module). A line of stdout answers it: the
largest exit status.
"""

import json
import os
import runpy
import socket
import sys

# for the scripts, not for use here
import torch.distributed.run
import torch.fx.passes.shape_prop  # noqa: F401
import torchvision.models.feature_extraction  # noqa: F401


def fork(argv, files, ranks):
    pid = os.fork()
    if pid:
        return pid
    os.environ.update({name: str(value) for name, value in ranks.items()})
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    sys.path[0] = os.getcwd()
    sys.argv = argv[argv[0] == "-m":]
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")
    sys.exit()


for line in sys.stdin:
    processes, out, err, *argv = json.loads(line)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        ranks = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost",
                 "MASTER_PORT": free.getsockname()[1]}
    pids = [fork(argv, [out, err], {} if processes == 1 else {"RANK": i, "LOCAL_RANK": i, **ranks})
            for i in range(processes)]
    print(max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids), flush=True)
