"""Programs in an interpreter that has imported torch and nothing of this project: a fork takes a tenth of a start."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: Forks for every line of its input, a request, and answers with the child's exit status.
SERVER = """
import json, os, sys
import torch

def become(directory, environment, paths, program):
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(os.path.join(directory, name), flags), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:], sys.path[:] = ["-c"], [*paths, *sys.path]
    os.chdir(environment["PWD"])
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})

for line in iter(sys.stdin.readline, ""):
    request = json.loads(line)
    child = os.fork()
    if not child:
        become(**request)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(program: str, environment: Mapping[str, str], cwd: Path, paths: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program as ``python -c`` does, with such an environment, and ``paths`` in front of the modules' path."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for stream in ("in", "out", "err"):
            (directory / stream).touch()
        request = {
            "directory": name,
            "environment": {**environment, "PWD": str(cwd)},
            "paths": ["", *paths],
            "program": program,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        printed = [(directory / stream).read_text() for stream in ("out", "err")]
    return subprocess.CompletedProcess(program, status, *printed)
