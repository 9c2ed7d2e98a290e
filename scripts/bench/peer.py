"""The peer: llama.cpp's RPC, two workers on a core each and a head that may use both."""
import pathlib
import re
import socket
import time

from processes import Failed, Talker, clean_environment, peak_memory_bytes

# A port is chosen before llama.cpp binds it; somebody else may be quicker.
START_TRIES = 5
# llama.cpp's defaults, of its server too.
BATCH = 2048
UBATCH = 512


class Peer:
    def __init__(self, binary, model, cores, folder, slots, ctx, unified=False):
        self.binary = binary
        self.model = model
        self.cores = cores
        self.folder = pathlib.Path(folder)
        self.size = {"slots": slots, "ctx": ctx, "batch": BATCH, "ubatch": UBATCH, "unified": unified}
        self.workers = []
        self.head = None
        self.peaks = {}

    def start_workers(self, cache=False):
        """Starts a worker on each core. With `cache`, each keeps large tensors on disk for the next head."""
        for i, core in enumerate(self.cores):
            extra = ["--cache", self.folder / f"cache-{i}"] if cache else []
            for part in extra[1:]:
                part.mkdir(exist_ok=True)
            self.workers.append(self.start_worker(i, core, extra))

    def start_worker(self, i, core, extra):
        for _ in range(START_TRIES):
            log = self.folder / f"worker-{i}.log"
            worker = Talker(f"RPC worker {i}", [self.binary, "worker", "--threads", 1, *extra], [core], log)
            address = worker.read()["address"]
            if listens(address, worker):
                return worker, address
            worker.process.wait()
        raise Failed("no RPC worker could be started; see the last log\n" + log.read_text(errors="replace"))

    def start_head(self):
        """Starts a head and returns the seconds from its start until it has decoded a token."""
        size = [f"--{key}={value}" for key, value in self.size.items() if key != "unified"]
        size += ["--unified"] if self.size["unified"] else []
        line = [self.binary, "head", "--model", self.model, "--workers", ",".join(a for _, a in self.workers), *size]
        started = time.monotonic()
        env = clean_environment(RUST_LOG="llama.cpp=debug")
        self.head = Talker("RPC head", line, self.cores, self.folder / "head.log", env)
        self.head.read()
        self.context = {"ubatch": UBATCH, "scores": False}
        return time.monotonic() - started

    def stop_head(self):
        self.note_peaks()
        if self.head:
            self.head.quit()
            self.head = None

    def use(self, ubatch=UBATCH, scores=False):
        """Another context, where another is wanted; not part of any measurement."""
        wanted = {"ubatch": ubatch, "scores": scores}
        if wanted != self.context:
            self.head.ask({"do": "open", **self.size, **wanted})
            self.context = wanted

    def run(self, streams, ubatch=UBATCH, scores=False):
        """Answers streams side by side, and tells when each token came."""
        self.use(ubatch, scores)
        return self.head.ask({"do": "run", "streams": streams})["streams"]

    def pids(self):
        found = {worker.what: worker.pid for worker, _ in self.workers}
        if self.head:
            found["RPC head"] = self.head.pid
        return found

    def note_peaks(self):
        for what, pid in self.pids().items():
            self.peaks[what] = max(self.peaks.get(what, 0), peak_memory_bytes(pid))

    def placement(self):
        """What the head's log says of what lies where: {worker: {"model": MiB, "KV": MiB}}. KV tells layers."""
        workers = {address: worker.what for worker, address in self.workers}
        found = {}
        for line in (self.folder / "head.log").read_text(errors="replace").splitlines():
            place = re.search(r"RPC\d*\[([\d.:]+)\] (model|KV) buffer size = +([\d.]+) MiB", line)
            if place and place[1] in workers:
                found.setdefault(workers[place[1]], {})[place[2]] = float(place[3])
        return found

    def stop(self):
        """Stops what is left; a worker only ends by signal."""
        if self.head:
            self.head.quit()
            self.head = None
        for worker, _ in self.workers:
            worker.kill()
        self.workers = []


def listens(address, worker):
    """Whether a worker answers at its address before it ends."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 20
    while worker.process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=1):
                return True
        except OSError:
            time.sleep(0.05)
    return False


class Tokenizer:
    """The model's own vocabulary, asked once before anything is measured."""

    def __init__(self, binary, model, cores, folder):
        line = [binary, "vocab", "--model", model]
        self.talker = Talker("tokenizer", line, cores, pathlib.Path(folder) / "vocab.log")
        self.n_tokens = self.talker.read()["n_tokens"]

    def tokens(self, text):
        return self.talker.ask({"do": "tokenize", "text": text})["tokens"]

    def text(self, tokens):
        return self.talker.ask({"do": "text", "tokens": tokens})["text"]

    def quit(self):
        self.talker.quit()
