"""Processes of the benchmark: start them on given cores, watch them, and end them by their ids whatever happens."""
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from typing import NamedTuple

# A process that does not answer for so long has failed; the slowest answer is a 2048-token prefill of a busy machine.
ANSWER_TIMEOUT_S = 300
END_TIMEOUT_S = 20


class Failed(Exception):
    """Says what went wrong, for people."""


class Interrupted(BaseException):
    """A signal asks the benchmark to end."""


def say(text):
    """Progress is for people; standard output is the report's."""
    print(text, file=sys.stderr, flush=True)


def on_cores(cores):
    """What a child runs before it becomes its program: it and all its children stay on these cores."""
    return lambda: os.sched_setaffinity(0, set(cores))


def clean_environment(**extra):
    """This process's environment without the user's settings of Capstan."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CAPSTAN_")}
    return {**kept, **extra}


class Handle(NamedTuple):
    """A process that we did not start ourselves, and when it began: ids are given again to others."""

    pid: int
    born: int


def stat_fields(pid):
    """What follows the name in /proc/PID/stat; none when there is no such process."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def handle(pid):
    """Remembers a process; one that is gone already is remembered as never born."""
    fields = stat_fields(pid)
    return Handle(pid, int(fields[19]) if fields else -1)


def alive(process):
    """Whether a remembered process runs; a zombie that only waits to be reaped does not."""
    fields = stat_fields(process.pid)
    return fields is not None and int(fields[19]) == process.born and fields[0] not in "ZX"


def children(pid):
    """The processes that a process started."""
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []


def peak_memory_bytes(pid):
    """The most memory that a process has had resident, of which some may be pages of a mapped file."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Failed(f"process {pid} does not tell its memory")


def cpu_seconds(pid):
    """What a process has computed so far."""
    fields = stat_fields(pid)
    if fields is None:
        raise Failed(f"process {pid} is gone")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_share(pids, seconds=2.0):
    """How much of a core each of these processes takes while nobody asks anything of it."""
    before = {what: cpu_seconds(pid) for what, pid in pids.items()}
    time.sleep(seconds)
    return {what: (cpu_seconds(pid) - before[what]) / seconds for what, pid in pids.items()}


def others_share(seconds=1.0):
    """How much of all cores is taken right now, by whomever."""

    def busy_and_all():
        fields = [int(f) for f in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    busy, total = busy_and_all()
    time.sleep(seconds)
    busy_after, total_after = busy_and_all()
    return (busy_after - busy) / max(1, total_after - total)


def loopback_bytes():
    """Bytes that this machine has sent to itself, with the headers of every layer above the link."""
    for line in pathlib.Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise Failed("this machine has no loopback counters in /proc/net/dev")


def end(processes):
    """Ends remembered processes: asks, waits, kills."""
    for process in filter(alive, processes):
        os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + END_TIMEOUT_S
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in filter(alive, processes):
        os.kill(process.pid, signal.SIGKILL)


class Talker:
    """A child that answers each JSON line on its standard input with one on its standard output."""

    def __init__(self, what, line, cores, log, env=None):
        self.what = what
        self.log = log
        with open(log, "ab") as errors:
            # In a session of its own: Ctrl-C is for this script, which then ends things in order.
            self.process = subprocess.Popen(
                [str(part) for part in line],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env or clean_environment(),
                preexec_fn=on_cores(cores),
                start_new_session=True,
            )
        self.pid = self.process.pid
        self.buffer = b""

    def send(self, command):
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as e:
            raise self.failed(f"is gone: {e}") from None

    def read(self, timeout_s=ANSWER_TIMEOUT_S):
        """The next JSON line; other lines (llama.cpp prints some) are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            line, newline, rest = self.buffer.partition(b"\n")
            if newline:
                self.buffer = rest
                if line.startswith(b"{"):
                    return json.loads(line)
                continue
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self.failed(f"did not answer for {timeout_s} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 20)
            if not piece:
                raise self.failed(f"ended with code {self.process.wait()}")
            self.buffer += piece

    def failed(self, what):
        lines = pathlib.Path(self.log).read_text(errors="replace").splitlines()[-8:]
        return Failed("\n".join([f"{self.what} {what}; the end of its log:", *lines]))

    def ask(self, command):
        self.send(command)
        return self.read()

    def quit(self):
        """Ends it in order, or else by signals."""
        if self.process.poll() is None:
            try:
                self.process.stdin.write(b'{"do":"quit"}\n')
                self.process.stdin.close()
                self.process.wait(END_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired):
                self.kill()
        self.process.stdout.close()

    def kill(self):
        """Ends it without asking: a worker listens to its network only."""
        end([handle(self.pid)])
        self.process.wait()
