"""What is asked of both sides, and what is read off the times at which their tokens came.

Both sides get the same streams and tell the same thing: when each token came. So every figure of the two is computed by
the same lines here. A stream is a prompt and the most tokens that follow it, and may say more:

| key | means |
|---|---|
| `after` | it comes when each stream that came at once has made so many tokens |
| `until` | it ends at the first token of this other stream |
| `together` | it ends when all streams that have this have made so many tokens |
| `stop` | tokens that end it |
| `ban` | tokens that are never chosen |
"""
import pathlib
import random
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Plain English that is there in every checkout.
CORPUS = ["LICENSE", "README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"]
# What a request to decode from the start is: long enough to be a prompt, short enough not to matter.
SHORT = 8
# Tokens after a 2048-token prompt, to see decode at that depth.
DEEP_TOKENS = 25
# More than any side decodes while another's prompt is prefilled: the stream is cut when that is done.
ENDLESS = 900
# The decoding streams go for so long before a prompt comes beside them.
SETTLED = 24

FUNCTION = """fn moving_average(values: &[f64], window: usize) -> Vec<f64> {
    let mut result = Vec::with_capacity(values.len());
    let mut total = 0.0;
    for (index, value) in values.iter().enumerate() {
        total += value;
        if index >= window {
            total -= values[index - window];
        }
        let count = (index + 1).min(window);
        if count == 0 {
            result.push(0.0);
        } else {
            result.push(total / count as f64);
        }
    }
    if result.iter().any(|mean| mean.is_nan()) {
        result.iter_mut().filter(|mean| mean.is_nan()).for_each(|mean| *mean = 0.0);
    }
    result
}"""
NEW_NAMES = ["running_sum", "window_sum", "partial_sum", "sum_so_far", "accumulator", "rolling_sum", "current_sum"]


class Prompts:
    """Prompts of exact lengths, none of which begins like another, so that no cached prefix helps anybody."""

    def __init__(self, tokenizer, seed):
        text = "\n".join((ROOT / name).read_text() for name in CORPUS)
        self.tokens = tokenizer.tokens(re.sub(r"[|`#*]+", " ", text))
        self.random = random.Random(seed)
        self.starts = sorted(set(self.tokens))
        self.random.shuffle(self.starts)
        self.end = tokenizer.tokens("<|im_end|>")
        # A stream of a given length is to be text all along: the API sends nothing for a token that has no text.
        specials = [tokenizer.tokens(text) for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
        self.specials = [tokens[0] for tokens in specials if len(tokens) == 1]
        self.tokenizer = tokenizer

    def of(self, length):
        at = self.random.randrange(len(self.tokens) - length)
        if not self.starts:
            raise ValueError("more prompts are wanted than there are ways to begin one")
        return [self.starts.pop(), *self.tokens[at : at + length - 1]]

    def edit(self, round_):
        """An edit task in the chat format that both models were trained on."""
        name = NEW_NAMES[round_ % len(NEW_NAMES)]
        return self.tokenizer.tokens(
            "<|im_start|>system\nYou are a careful programmer.<|im_end|>\n<|im_start|>user\n"
            f"```rust\n{FUNCTION}\n```\n\nRewrite this function so that the variable `total` is called `{name}` "
            "everywhere. Change nothing else.<|im_end|>\n<|im_start|>assistant\n```rust\n"
        )


def one(prompts, length, tokens, **more):
    return {"prompt": prompts.of(length), "tokens": tokens, "ban": prompts.specials, **more}


def prefill(prompts, length, tokens=1):
    return [one(prompts, length, tokens)]


def decode(prompts, streams, tokens):
    """Streams that all go on until the last of them has made its tokens."""
    return [one(prompts, SHORT, ENDLESS, together=tokens) for _ in range(streams)]


def prompt_beside(prompts, decoding, length):
    """`decoding` streams, and once they run, a prompt beside them; they end when its first token comes."""
    beside = [one(prompts, SHORT, ENDLESS, until=decoding) for _ in range(decoding)]
    return [*beside, one(prompts, length, 1, after=SETTLED)]


def edit(prompts, round_, tokens):
    return [{"prompt": prompts.edit(round_), "tokens": tokens, "stop": prompts.end}]


def ttft_s(answer):
    return answer["at_s"][0] - answer["asked_s"]


def prefill_rate(streams, answers):
    return len(streams[0]["prompt"]) / ttft_s(answers[0])


def tokens_per_arrival(answer):
    """1, or a little more where tokens without text of their own came together with others."""
    made = answer.get("n_tokens") or len(answer["at_s"])
    return (made - 1) / max(1, len(answer["at_s"]) - 1) if made > 1 else 1.0


def decode_rate(answers):
    """Tokens per second of all streams together, while all of them decode."""
    begin = max(a["at_s"][0] for a in answers)
    end = min(a["at_s"][-1] for a in answers)
    if end <= begin:
        raise ValueError("the streams never decoded at the same time; ask for more tokens")
    count = sum(tokens_per_arrival(a) * sum(begin < t <= end for t in a["at_s"]) for a in answers)
    return count / (end - begin)


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def itl_beside(answers):
    """Gaps between a stream's tokens before another's prompt came and while it was prefilled: p50 and p95 of each.

    A gap counts as `while` when any of it lies between the request and its first token.
    """
    stream, beside = answers[0]["at_s"], answers[-1]
    asked, first = beside["asked_s"], beside["at_s"][0]
    gaps = list(zip(stream, stream[1:]))
    quiet = [b - a for a, b in gaps if b <= asked]
    loaded = [b - a for a, b in gaps if b > asked and a < first]
    # The last gap may still be open when the stream is cut: it was at least so long, which counts when that is longest.
    open_gap = first - max(t for t in stream if t <= first)
    if not loaded or open_gap > max(loaded):
        loaded.append(open_gap)
    return {
        "itl_p50_quiet": percentile(quiet, 0.5),
        "itl_p95_quiet": percentile(quiet, 0.95),
        "itl_p50_beside_2048": percentile(loaded, 0.5),
        "itl_p95_beside_2048": percentile(loaded, 0.95),
    }
