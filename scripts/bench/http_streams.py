"""Streams of completions from one thread: bytes are stamped when they come and read only when all is over.

A load generator shares the machine with what it measures, so it does as little as it can while it measures.
"""
import json
import selectors
import socket
import time
from urllib.parse import urlsplit

from processes import Failed

TIMEOUT_S = 600
EVENT = b"data: "
DONE = b"data: [DONE]"


class Stream:
    """One request and the raw bytes of its answer."""

    def __init__(self, spec, address, path, model):
        self.spec = spec
        body = {
            "model": model,
            "prompt": spec["prompt"],
            "max_tokens": spec["tokens"],
            "temperature": spec.get("temperature", 0),
            "logit_bias": {str(token): -100 for token in spec.get("ban", [])},
            # An answer of a given length goes on after its end; one with a stop does not.
            "ignore_eos": not spec.get("stop"),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = json.dumps(body).encode()
        head = (
            f"POST {path}/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        self.request = head.encode() + data
        self.socket = None
        self.pieces = []
        self.events = 0
        self.over = False
        self.cut = False

    def ask(self, address, selector):
        self.socket = socket.create_connection(address, timeout=TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.asked = time.monotonic()
        self.socket.sendall(self.request)
        self.socket.setblocking(False)
        selector.register(self.socket, selectors.EVENT_READ, self)

    def take(self):
        piece = self.socket.recv(1 << 16)
        if piece:
            self.pieces.append((time.monotonic(), piece))
            self.events += piece.count(EVENT)
        if not piece or DONE in piece:
            self.over = True

    def close(self, selector):
        if self.socket:
            selector.unregister(self.socket)
            self.socket.close()
            self.socket = None

    def made(self):
        """Tokens so far, as far as the flow of bytes tells; all of them once it is over."""
        return float("inf") if self.over else self.events

    def answer(self, started):
        """What came, and when: {asked_s, at_s, tokens, text, usage}."""
        raw = b"".join(piece for _, piece in self.pieces)
        head, _, body = raw.partition(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0].split()
        if len(status) < 2 or status[1] != b"200":
            raise Failed(f"the API answered {raw[:400].decode(errors='replace')}")
        ends, total = [], 0
        for at, piece in self.pieces:
            total += len(piece)
            ends.append((total, at))
        events = []
        pending, arrival = b"", 0
        for end, chunk in chunks(body, len(head) + 4):
            pending += chunk
            while ends[arrival][0] < end:
                arrival += 1
            while b"\n\n" in pending:
                event, pending = pending.split(b"\n\n", 1)
                if event.startswith(EVENT) and event != DONE:
                    events.append((ends[arrival][1], json.loads(event[len(EVENT) :])))
        return self.read_events(events, started)

    def read_events(self, events, started):
        at_s, text, usage = [], "", None
        for at, event in events:
            if "error" in event:
                raise Failed(f"the answer ended early: {event['error'].get('message', event['error'])}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                if choice.get("text"):
                    text += choice["text"]
                    at_s.append(at - started)
        if not self.cut and not usage:
            raise Failed("an answer came without its usage")
        # Tokens without text of their own (part of a character, a special token) come with the next that has some.
        answer = {"asked_s": self.asked - started, "at_s": at_s, "text": text, "usage": usage}
        return {**answer, "n_tokens": usage["completion_tokens"] if usage else None}


def chunks(body, offset):
    """The chunks of a chunked HTTP body, each with where it ends in the raw bytes."""
    at = 0
    while True:
        line_end = body.find(b"\r\n", at)
        if line_end < 0:
            return
        size = int(body[at:line_end].split(b";")[0], 16)
        start = line_end + 2
        if size == 0 or start + size > len(body):
            return
        yield offset + start + size, body[start : start + size]
        at = start + size + 2


def run(api, model, specs):
    """Asks for streams side by side; scenarios.py says what their keys mean."""
    parts = urlsplit(api)
    address = (parts.hostname, parts.port)
    streams = [Stream(spec, address, parts.path, model) for spec in specs]
    deadline = time.monotonic() + TIMEOUT_S
    started = time.monotonic()
    with selectors.DefaultSelector() as selector:
        try:
            for stream in streams:
                if not stream.spec.get("after"):
                    stream.ask(address, selector)
            while not all(stream.over for stream in streams):
                for key, _ in selector.select(timeout=5):
                    key.data.take()
                early = [s.made() for s in streams if not s.spec.get("after")]
                enough = all(s.made() >= s.spec["together"] for s in streams if s.spec.get("together"))
                for stream in streams:
                    if stream.socket is None and not stream.over and min(early) >= stream.spec["after"]:
                        stream.ask(address, selector)
                    until = stream.spec.get("until")
                    ended = stream.spec.get("together") and enough or until is not None and streams[until].made() > 0
                    if ended and not stream.over:
                        stream.over = stream.cut = True
                    if stream.over and stream.socket:
                        stream.close(selector)
                if time.monotonic() > deadline:
                    raise Failed(f"the answers took more than {TIMEOUT_S} s")
        finally:
            for stream in streams:
                stream.close(selector)
    return [stream.answer(started) for stream in streams]
