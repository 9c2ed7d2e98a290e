"""One model, measured on both sides in turn."""
import time

import scenarios
from processes import Failed, idle_share, loopback_bytes, others_share, say

# More than a process that waits takes; less than one that spins.
IDLE_SHARE_MAX = 0.05
IDLE_TRIES = 10
STREAMS = [1, 2, 4, 8, 16]
# Of each stream of the warm-up.
WARM_TOKENS = 48
# The peer's other sizes of what it computes at once, for honesty: {prompt: [first round and later, first round only]}.
OTHER_UBATCHES = {512: ([256], [128]), 2048: ([512], [128])}
UBATCH_OF = {128: 512, 512: 512, 2048: 256}
PLAIN, DEFAULT = "plain", "default"
KINDS = ["prefill", "decode", "beside", "edit", "ready"]


class Figures:
    """Samples of each metric, of each side."""

    def __init__(self):
        self.samples = {}
        self.units = {}

    def add(self, side, metric, value, unit):
        self.samples.setdefault(metric, {}).setdefault(side, []).append(value)
        self.units[metric] = unit


class Measurement:
    """Both sides of one model, up and warm."""

    def __init__(self, name, peer, ours, prompts, quick, only):
        self.name = name
        self.peer = peer
        self.ours = ours
        self.prompts = prompts
        self.quick = quick
        self.only = only
        self.figures = Figures()
        self.notes = []
        self.plain = DEFAULT
        self.edits = []

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            say(f"    note: {text}")

    def start(self):
        """Brings both sides up and warms them: files are in the page cache, shards in the store, kernels have run."""
        say(f"{self.name}: starting llama.cpp RPC")
        self.peer.start_workers()
        self.peer.start_head()
        say(f"{self.name}: starting Capstan")
        self.ours.start()
        self.ours.load(DEFAULT)
        if self.ours.can_switch:
            # A second load would disturb what the first one measures of itself.
            self.shares_while_idle()
            self.plain = PLAIN
            self.ours.load(PLAIN, speculation=False)
            self.shares_while_idle()
        else:
            self.note("this capstan has no --speculation; every figure is taken with its defaults")
        for streams in (lambda: scenarios.prefill(self.prompts, 64, 8), lambda: scenarios.decode(self.prompts, 4, 12)):
            self.peer.run(streams())
            for deployment in {DEFAULT, self.plain}:
                self.ours.run(streams(), deployment)
        if not self.only or "decode" in self.only:
            # A server is asked for months: what is measured is how it serves, not how it gets to know its stages.
            for streams in STREAMS:
                specs = scenarios.decode(self.prompts, streams, WARM_TOKENS)
                self.peer.run(specs)
                self.ours.run(specs, self.plain)
        self.check_idle()

    def shares_while_idle(self):
        """Waits until nobody computes, as Capstan's stages do at first to measure themselves; who still does, if any."""
        for _ in range(IDLE_TRIES):
            shares = idle_share({**self.peer.pids(), **self.ours.pids()})
            if max(shares.values()) <= IDLE_SHARE_MAX:
                break
        return shares

    def check_idle(self):
        """Whoever waits must leave the cores to whoever is measured."""
        for what, share in self.shares_while_idle().items():
            self.figures.samples.setdefault("idle_share", {})[what] = share
            if share > IDLE_SHARE_MAX:
                self.note(f"{what} takes {share:.0%} of a core while it waits")

    def round(self, number):
        """Every scenario once, on one side and then the other; who begins changes from round to round."""
        busy = others_share()
        if busy > 0.15:
            self.note(f"before round {number + 1} other programs took {busy:.0%} of the processors")
        sides = ["rpc", "capstan"] if number % 2 == 0 else ["capstan", "rpc"]
        for kind, step in self.steps(number):
            if self.only and kind not in self.only:
                continue
            for side in sides:
                step(side)
        if not self.only or "prefill" in self.only:
            self.peer_with_other_ubatches(number)
        if number == 0 and not self.quick and (not self.only or "decode" in self.only):
            self.peer_with_scores()
        self.memory()

    def steps(self, number):
        steps = [("prefill", lambda side, n=n: self.prefill(side, n)) for n in (128, 128, 512, 2048)]
        steps += [("decode", lambda side, b=b: self.decode(side, b)) for b in STREAMS]
        beside = [(4, 512), (1, 2048)]
        steps += [("beside", lambda side, b=b, n=n: self.beside(side, b, n)) for b, n in beside]
        steps += [("edit", lambda side: self.edit(side, number)), ("ready", self.ready)]
        return steps

    def ask(self, side, streams, ubatch=512, deployment=None):
        if side == "rpc":
            return self.peer.run(streams, ubatch)
        answers = self.ours.run(streams, deployment or self.plain)
        for answer in answers:
            # A stream that was cut told no usage, and a token that is part of a character comes with the next.
            if answer.get("n_tokens") is None:
                answer["n_tokens"] = len(self.prompts.tokenizer.tokens(answer["text"]))
        return answers

    def prefill(self, side, length):
        tokens = scenarios.DEEP_TOKENS if length == 2048 else 1
        streams = scenarios.prefill(self.prompts, length, tokens)
        if side == "rpc":
            self.peer.use(UBATCH_OF[length])
        before = loopback_bytes()
        answers = self.ask(side, streams, UBATCH_OF[length])
        sent = loopback_bytes() - before
        rate = scenarios.prefill_rate(streams, answers)
        self.figures.add(side, f"prefill_{length}", rate, "tok/s")
        self.tell(side, f"prefill {length}", f"{rate:.1f} tok/s")
        if length == 512:
            self.figures.add(side, "ttft_512", scenarios.ttft_s(answers[0]) * 1000, "ms")
            self.figures.add(side, "wire_prefill_512", sent / length, "bytes/token")
        if length == 2048:
            self.figures.add(side, "decode_b1_deep", scenarios.decode_rate(answers), "tok/s")
        self.check_uncached(side, answers)

    def check_uncached(self, side, answers):
        """A prompt that was taken from the cache is not a prompt that was computed."""
        for answer in answers:
            details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
            if details.get("cached_tokens", 0) > 4:
                raise Failed(f"{side}: {details['cached_tokens']} tokens of a prompt came from a cache")

    def decode(self, side, streams):
        tokens = self.tokens_of(streams)
        specs = scenarios.decode(self.prompts, streams, tokens)
        before = loopback_bytes()
        answers = self.ask(side, specs)
        sent = loopback_bytes() - before
        rate = scenarios.decode_rate(answers)
        self.figures.add(side, f"decode_b{streams}", rate, "tok/s")
        self.tell(side, f"decode, {streams} at once", f"{rate:.1f} tok/s")
        if streams == 1:
            made = len(answers[0]["at_s"])
            self.figures.add(side, "wire_decode", sent / (made + scenarios.SHORT), "bytes/token")
            # The product as it comes, on text that cannot be guessed: what speculation costs where it cannot help.
            if side == "capstan" and self.plain != DEFAULT:
                answers = self.ask(side, scenarios.decode(self.prompts, 1, tokens), deployment=DEFAULT)
                rate = scenarios.decode_rate(answers)
                self.figures.add(side, "decode_b1_guessing", rate, "tok/s")

    def tokens_of(self, streams):
        tokens = {1: 128, 2: 96, 4: 64, 8: 64, 16: 48}[streams]
        return tokens // 2 if self.quick else tokens

    def beside(self, side, decoding, length):
        answers = self.ask(side, scenarios.prompt_beside(self.prompts, decoding, length))
        if decoding == 1:
            for metric, seconds in scenarios.itl_beside(answers).items():
                self.figures.add(side, metric, seconds * 1000, "ms")
            told = scenarios.itl_beside(answers)["itl_p95_beside_2048"]
            self.tell(side, "ITL p95 while 2048 tokens are prefilled", f"{told * 1000:.0f} ms")
            return
        ttft = scenarios.ttft_s(answers[-1])
        self.figures.add(side, "ttft_512_busy", ttft * 1000, "ms")
        self.tell(side, f"TTFT of 512 tokens beside {decoding} streams", f"{ttft * 1000:.0f} ms")

    def edit(self, side, number):
        answers = self.ask(side, scenarios.edit(self.prompts, number, 320), deployment=DEFAULT)
        rate = scenarios.decode_rate(answers)
        self.figures.add(side, "decode_ngram_edit", rate, "tok/s")
        answer = answers[0]
        text = answer["text"] if side == "capstan" else self.prompts.tokenizer.text(answer["tokens"])
        text = text.removesuffix("<|im_end|>")
        usage = (answer.get("usage") or {}).get("capstan") or {}
        made = answer.get("n_tokens") or len(answer["at_s"])
        named = {"drafted": "drafted_tokens", "accepted": "accepted_tokens"}
        guesses = {key: usage.get(key, usage.get(long)) for key, long in named.items()}
        guesses = {key: value for key, value in guesses.items() if value is not None}
        self.edits.append({"side": side, "round": number, "tokens": made, "text": text, **guesses})
        self.tell(side, f"edit task, {made} tokens {guesses or ''}", f"{rate:.1f} tok/s")

    def ready(self, side):
        if side == "rpc":
            self.peer.stop_head()
            seconds = self.peer.start_head()
        else:
            self.ours.unload(DEFAULT)
            seconds = self.ours.load(DEFAULT)
        self.figures.add(side, "ready", seconds * 1000, "ms")
        self.tell(side, "load to ready", f"{seconds * 1000:.0f} ms")
        self.warm_again(side)

    def warm_again(self, side):
        """What was loaded anew has its first steps behind it before it is measured again."""
        self.ask(side, scenarios.decode(self.prompts, 2, 8), deployment=DEFAULT)

    def peer_with_scores(self):
        """Decode without flash attention, which llama.cpp takes by default and Capstan on processors does not."""
        for streams in STREAMS:
            specs = scenarios.decode(self.prompts, streams, self.tokens_of(streams))
            rate = scenarios.decode_rate(self.peer.run(specs, scores=True))
            self.figures.add("rpc", f"decode_b{streams}_scores", rate, "tok/s")
            self.tell("rpc", f"decode, {streams} at once, no flash attention", f"{rate:.1f} tok/s")
        specs = scenarios.prefill(self.prompts, 2048, scenarios.DEEP_TOKENS)
        rate = scenarios.decode_rate(self.peer.run(specs, UBATCH_OF[2048], scores=True))
        self.figures.add("rpc", "decode_b1_deep_scores", rate, "tok/s")
        self.tell("rpc", "decode after 2048, no flash attention", f"{rate:.1f} tok/s")

    def peer_with_other_ubatches(self, number):
        for length, (always, once) in OTHER_UBATCHES.items():
            for ubatch in always + (once if number == 0 and not self.quick else []):
                streams = scenarios.prefill(self.prompts, length)
                rate = scenarios.prefill_rate(streams, self.peer.run(streams, ubatch))
                self.figures.add("rpc", f"prefill_{length}_ubatch_{ubatch}", rate, "tok/s")
                self.tell("rpc", f"prefill {length} with ubatch {ubatch}", f"{rate:.1f} tok/s")

    def memory(self):
        self.peer.note_peaks()
        self.ours.note_peaks()

    def peer_with_cache(self):
        """llama.cpp's workers can keep large tensors on disk; its head is then ready sooner."""
        self.peer.stop()
        self.peer.start_workers(cache=True)
        self.peer.start_head()
        self.peer.stop_head()
        seconds = self.peer.start_head()
        self.figures.add("rpc", "ready_worker_cache", seconds * 1000, "ms")
        self.tell("rpc", "load to ready with the workers' cache", f"{seconds * 1000:.0f} ms")

    def tell(self, side, what, value):
        who = {"rpc": "llama.cpp RPC", "capstan": "Capstan"}[side]
        say(f"  {time.strftime('%H:%M:%S')}  {who:<14} {what:<42} {value}")
