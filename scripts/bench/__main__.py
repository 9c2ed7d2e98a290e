"""Capstan beside llama.cpp's RPC: the same model, prompts and cores, in turn, in one run.

Prints a Markdown table of medians and ratios on standard output and writes target/reports/bench.json, .md, .svg and
.png. docs/benchmarks.md says what each figure is and how it is taken. Whatever happens, everything that was started is
ended again.
"""
import argparse
import datetime
import fcntl
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import report
from measure import KINDS, Measurement
from ours import Capstan, usable_cores
from peer import Peer, Tokenizer
from processes import Failed, Interrupted, say
from scenarios import ROOT, Prompts

MODELS = {"qwen2.5-coder-0.5b": "qwen", "smollm2": "smollm2"}
SLOTS = 16
# 2048 tokens of prompt, and room for a stream that decodes while they are prefilled.
CTX = 3072


def machine():
    """The processor and how much of it is used, for people."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = names[0] if names else platform.machine()
    return f"{name}, 2 of {os.cpu_count()} cores, {memory_gib:.0f} GiB"


def fetch(which):
    """The model's path; answers at once when it is there."""
    done = subprocess.run([ROOT / "scripts/fetch-model.sh", which], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failed(f"the model {which} could not be fetched")
    return pathlib.Path(done.stdout.strip())


class Benchmark:
    def __init__(self, args):
        self.args = args
        self.rounds = 1 if args.quick else args.rounds
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="capstan-bench-"))
        self.open = []
        self.report = {
            "machine": machine(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": args.command,
            "rounds": self.rounds,
            "models": {},
        }

    def run(self):
        started = time.monotonic()
        cores = usable_cores()
        # Everything shares the two cores of the nodes, this load generator too.
        os.sched_setaffinity(0, set(cores))
        for name in self.args.model:
            model = fetch(MODELS[name])
            # Both sides find the file in the page cache.
            with open(model, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
            self.model(name, model, cores)
        say(f"bench: it took {(time.monotonic() - started) / 60:.1f} minutes")

    def model(self, name, model, cores):
        folder = self.folder / name
        folder.mkdir()
        tokenizer = Tokenizer(self.args.peer, model, cores, folder)
        self.open.append(tokenizer)
        peer = Peer(self.args.peer, model, cores, folder, SLOTS, CTX, self.args.unified)
        ours = Capstan(self.args.capstan, model, cores, folder, SLOTS, CTX, self.args.layers)
        self.open += [peer, ours]
        prompts = Prompts(tokenizer, self.args.seed)
        measurement = Measurement(name, peer, ours, prompts, self.args.quick, self.args.only)
        measurement.start()
        for number in range(self.rounds):
            say(f"{name}: round {number + 1} of {self.rounds}")
            measurement.round(number)
            # Kept after each round: a run that is cut short has told what it knows.
            self.report["models"][name] = report.of_model(measurement)
            self.write()
        if not self.args.only or "ready" in self.args.only:
            placement = self.report["models"][name]["placement"]
            measurement.peer_with_cache()
            self.report["models"][name] = {**report.of_model(measurement), "placement": placement}
            self.write()
        if problems := self.stop():
            raise Failed("; ".join(problems))

    def write(self):
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / "bench.json").write_text(json.dumps(self.report, indent=2, ensure_ascii=False) + "\n")
        (self.args.out / "bench.md").write_text(report.markdown(self.report))

    def stop(self):
        """Ends all that is open; returns what did not end in order."""
        problems = []
        while self.open:
            each = self.open[-1]
            try:
                problems += (each.quit() if isinstance(each, Tokenizer) else each.stop()) or []
            except Exception as e:  # The others must still be ended.
                problems.append(f"{type(each).__name__} could not be ended: {type(e).__name__}: {e}")
            # Only now: whoever interrupts this finds it among what is open, and ends it again.
            self.open.pop()
        return problems

    def logs(self):
        """The ends of the daemons' logs, before their folders go."""
        return [line for each in self.open if isinstance(each, Capstan) for line in each.log_ends()]


def plot(args):
    """Drawn by a Python that has matplotlib."""
    python = args.plot_python
    line = [python, str(pathlib.Path(__file__).with_name("plot.py")), str(args.out / "bench.json")]
    if subprocess.run(line, stdout=sys.stderr).returncode != 0:
        say(f"bench: the plot could not be drawn by {python}")
        return False
    return True


def alone():
    """Refuses a second benchmark beside this one: each would measure the other. The file stays open until the end."""
    lock = open(pathlib.Path(tempfile.gettempdir()) / "capstan-bench.lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("bench: another benchmark runs on this machine; wait until it is done")
    return lock


def interrupt(signum, _frame):
    raise Interrupted(signal.Signals(signum).name)


def arguments():
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--capstan", type=pathlib.Path, default=ROOT / "target/release/capstan")
    parser.add_argument(
        "--peer", type=pathlib.Path, default=ROOT / "target/peer/release/examples/rpc-peer", help="llama.cpp's RPC"
    )
    parser.add_argument("--model", action="append", choices=list(MODELS), help="one of them, or all (default)")
    parser.add_argument("--rounds", type=int, default=3, help="each scenario is run so often on both sides")
    parser.add_argument("--quick", action="store_true", help="one round of fewer tokens, to see that it works")
    parser.add_argument("--only", action="append", choices=KINDS, help="measure these kinds of figures only")
    parser.add_argument("--layers", help="who holds what, as `capstan load` takes it (default: its own choice)")
    parser.add_argument("--unified", action="store_true", help="the peer keeps one KV cache for all sequences")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the prompts")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target/reports")
    parser.add_argument("--plot-python", default=sys.executable, help="a Python with matplotlib")
    args = parser.parse_args()
    args.model = args.model or list(MODELS)
    args.command = os.environ.get("BENCH_COMMAND") or " ".join(["scripts/bench", *sys.argv[1:]])
    for binary, target in ((args.capstan, "make build"), (args.peer, "make bench")):
        if not binary.is_file():
            parser.error(f"{binary} is missing; `{target}` makes it")
    args.capstan, args.peer, args.out = (path.resolve() for path in (args.capstan, args.peer, args.out))
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    say(f"bench: the prompts' seed is {args.seed}")
    return args


def main():
    args = arguments()
    lock = alone()
    endings = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    for each in endings:
        signal.signal(each, interrupt)
    benchmark = Benchmark(args)
    code, problem = 0, None
    try:
        benchmark.run()
    except Failed as e:
        code, problem = 1, str(e)
    except Interrupted as e:
        code, problem = 130, f"{e} came"
    except Exception as e:
        import traceback

        traceback.print_exc()
        code, problem = 1, f"{type(e).__name__}: {e}"
    finally:
        # From here on nothing stops the stopping.
        for each in endings:
            signal.signal(each, signal.SIG_IGN)
        if problem:
            print(f"\nbench: {problem}", *(benchmark.logs() if code == 1 else []), sep="\n", file=sys.stderr)
        leftovers = benchmark.stop()
        shutil.rmtree(benchmark.folder, ignore_errors=True)
    for leftover in leftovers:
        say(f"bench: {leftover}")
    if code == 0:
        print(report.markdown(benchmark.report))
        code = 0 if plot(args) and not leftovers else 1
        say(f"bench: the report is in {args.out}: bench.json, bench.md, bench.svg, bench.png")
    lock.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
