"""Capstan as a user runs it: two daemons, a core each, joined by a ticket, asked over HTTP."""
import json
import os
import pathlib
import shutil
import subprocess
import time

import http_streams
from processes import (
    END_TIMEOUT_S,
    Failed,
    alive,
    children,
    clean_environment,
    end,
    handle,
    on_cores,
    peak_memory_bytes,
)

NODES = ["alpha", "beta"]
COMMAND_TIMEOUT_S = 300


class Capstan:
    # Measuring machine and links would take the cores of who is measured.
    measure = "off"

    def __init__(self, binary, model, cores, folder, slots, ctx, layers=None):
        self.binary = binary
        self.model = model
        self.cores = cores
        self.folder = pathlib.Path(folder)
        self.size = ["--slots", str(slots), "--ctx", str(ctx)]
        self.layers = layers
        self.daemons = {}
        self.api = None
        self.peaks = {}
        # Every stage that was ever seen, to check in the end that it is gone.
        self.seen = {}
        self.running = None
        self.stages = []

    def command(self, node, *args):
        """Runs a capstan command as a user of `node`, on its core, and returns what it printed."""
        env = clean_environment(
            CAPSTAN_NAME=node,
            CAPSTAN_API_ADDR="127.0.0.1:0",
            CAPSTAN_BIND_ADDR="127.0.0.1:0",
            CAPSTAN_THREADS="1",
            CAPSTAN_MEASURE=self.measure,
            XDG_CONFIG_HOME=str(self.folder / "config"),
        )
        line = [str(self.binary), "--data-dir", str(self.folder / node), *[str(a) for a in args]]
        # `up` leaves the daemon behind, which keeps the core, as do the stages it starts.
        core = self.cores[NODES.index(node)]
        self.running = subprocess.Popen(
            line,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=on_cores([core] if args[0] == "up" else self.cores),
        )
        try:
            out, err = self.running.communicate(timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.running.kill()
            self.running.communicate()
            raise Failed(f"`capstan {args[0]}` on {node} took more than {COMMAND_TIMEOUT_S} s") from None
        if self.running.returncode != 0:
            raise Failed(f"`capstan {args[0]}` on {node} failed: {(err or out).strip()}")
        self.running = None
        return out

    def start(self):
        for node in NODES:
            up = json.loads(self.command(node, "up", "--json"))
            self.daemons[node] = handle(up["pid"])
            if node == NODES[0]:
                ticket, self.api = up["ticket"], up["api"]
        for node in NODES[1:]:
            self.command(node, "join", ticket)
        # Speculation can be switched only where it is there to be switched.
        self.can_switch = "--speculation" in self.command(NODES[0], "load", "--help")

    def load(self, name, speculation=True):
        """Loads the model, and returns the seconds from the command until a token was answered."""
        where = ["--layers", self.layers] if self.layers else ["--nodes", ",".join(NODES)]
        switch = ["--speculation", "off"] if self.can_switch and not speculation else []
        started = time.monotonic()
        self.command(NODES[0], "load", self.model, "--name", name, "--replicas", "0", *where, *self.size, *switch,
                     "--json")
        self.run([{"prompt": [1], "tokens": 1}], name)
        seconds = time.monotonic() - started
        self.note_stages()
        return seconds

    def unload(self, name):
        self.note_peaks()
        self.command(NODES[0], "unload", name)

    def run(self, streams, name):
        """Answers streams side by side over HTTP, and tells when each token came."""
        return http_streams.run(self.api, name, streams)

    def deployments(self):
        return json.loads(self.command(NODES[0], "status", "--json"))["deployments"]

    def note_stages(self):
        for deployment in self.deployments():
            for stage in deployment["stages"]:
                if stage["pid"]:
                    what = f"{deployment['name']}: stage {stage['stage']} on {stage['node_name']}"
                    self.seen[what] = handle(stage["pid"])
            self.stages = [
                {"stage": s["stage"], "node": s["node_name"], "layers": s["layers"]} for s in deployment["stages"]
            ]

    def pids(self):
        return {what: process.pid for what, process in self.living().items()}

    def living(self):
        daemons = {f"daemon {node}": daemon for node, daemon in self.daemons.items()}
        return {what: process for what, process in {**daemons, **self.seen}.items() if alive(process)}

    def note_peaks(self):
        for what, pid in self.pids().items():
            self.peaks[what] = max(self.peaks.get(what, 0), peak_memory_bytes(pid))

    def stop(self):
        """Stops everything, and returns what could not be stopped in order."""
        problems = []
        self.end_running_command()
        for node in NODES:
            if not (self.folder / node).exists():
                continue
            try:
                pid = json.loads((self.folder / node / "daemon.json").read_text())["pid"]
                self.daemons[node] = handle(pid)
                # A load that was interrupted has stages that nobody has told us about.
                known = set(self.pids().values())
                self.seen.update({f"a stage of {node} ({c})": handle(c) for c in children(pid) if c not in known})
            except (OSError, ValueError, KeyError):
                pass  # It is stopped already, or never came up.
            try:
                self.command(node, "stop")
            except Failed as e:
                problems.append(str(e))
        # `stop` has asked them; what does not end in time is ended here.
        deadline = time.monotonic() + END_TIMEOUT_S
        while (left := self.living()) and time.monotonic() < deadline:
            time.sleep(0.05)
        problems += [f"{what} (process {process.pid}) was still there" for what, process in left.items()]
        end(list(left.values()))
        for node in NODES:
            shutil.rmtree(self.folder / node, ignore_errors=True)
        return problems

    def log_ends(self, lines=15):
        """The ends of the daemons' logs, for when something failed."""
        found = []
        for node in NODES:
            log = self.folder / node / "logs" / "daemon.log"
            if log.exists():
                found += [f"--- the end of {node}'s log", *log.read_text(errors="replace").splitlines()[-lines:]]
        return found

    def end_running_command(self):
        """A command that was interrupted half-way: `up` is left to finish, so that what it starts can be stopped."""
        process, self.running = self.running, None
        if process is None or process.poll() is not None:
            return
        if "up" in process.args or "join" in process.args:
            try:
                process.communicate(timeout=90)
                return
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        process.communicate()


def usable_cores():
    """The two cores that everything here runs on."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Failed("the benchmark needs two cores: one for each node")
    return cores[:2]
