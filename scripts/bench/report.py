"""Medians, ratios and bounds of what was measured, as JSON and as one Markdown table."""
from statistics import median

from measure import STREAMS

LABELS = {
    "prefill_128": "prefill, 128 tokens (tok/s)",
    "prefill_512": "prefill, 512 tokens (tok/s)",
    "prefill_2048": "prefill, 2048 tokens (tok/s)",
    "decode_b1": "decode, 1 stream (tok/s)",
    "decode_b1_deep": "decode, 1 stream, after 2048 tokens (tok/s)",
    "decode_b2": "decode, 2 streams, total (tok/s)",
    "decode_b4": "decode, 4 streams, total (tok/s)",
    "decode_b8": "decode, 8 streams, total (tok/s)",
    "decode_b16": "decode, 16 streams, total (tok/s)",
    "decode_ngram_edit": "decode, edit task, n-gram guesses (tok/s)",
    "ttft_512": "TTFT, 512 tokens, alone (ms)",
    "ttft_512_busy": "TTFT, 512 tokens, beside 4 streams (ms)",
    "itl_p50_quiet": "ITL p50, 1 stream alone (ms)",
    "itl_p95_quiet": "ITL p95, 1 stream alone (ms)",
    "itl_p50_beside_2048": "ITL p50, while 2048 tokens are prefilled (ms)",
    "itl_p95_beside_2048": "ITL p95, while 2048 tokens are prefilled (ms)",
    "ready": "load to ready, warm shards (ms)",
    "wire_decode": "on the wire, decode (bytes/token)",
    "wire_prefill_512": "on the wire, prefill (bytes/token)",
    "peak_memory": "peak memory, all processes (MiB)",
}
# What `ratios` of the report holds, by contract.
RATIOS = [
    *(f"prefill_{n}" for n in (128, 512, 2048)),
    *(f"decode_b{b}" for b in STREAMS),
    "decode_ngram_edit",
    "ready",
]
SIDES = ["rpc", "capstan"]


def of_model(measurement):
    """The report of one model."""
    raw = {}
    figures = measurement.figures
    for metric, sides in figures.samples.items():
        if metric not in figures.units:
            continue
        raw[metric] = {"unit": figures.units[metric]}
        for side, samples in sides.items():
            raw[metric][side] = {"median": median(samples), "samples": samples}
    peaks = {"rpc": measurement.peer.peaks, "capstan": compared_peaks(measurement)}
    raw["peak_memory"] = {"unit": "MiB"}
    for side, processes in peaks.items():
        mib = {what: round(peak / 2**20, 1) for what, peak in processes.items()}
        raw["peak_memory"][side] = {"median": round(sum(mib.values()), 1), "processes": mib}
    ratios = {metric: ratio(raw, metric) for metric in RATIOS if ratio(raw, metric) is not None}
    return {
        "ratios": {metric: round(value, 3) for metric, value in ratios.items()},
        "bound": bounds(raw),
        "raw": raw,
        "idle_share": figures.samples.get("idle_share", {}),
        "edits": measurement.edits,
        "placement": {"rpc": measurement.peer.placement(), "capstan": measurement.ours.stages},
        "notes": measurement.notes,
    }


def compared_peaks(measurement):
    """The daemons and the stages of the deployment that was measured most: the others are there for comparison only."""
    peaks = measurement.ours.peaks
    return {what: peak for what, peak in peaks.items() if what.startswith(("daemon", f"{measurement.plain}:"))}


def middle(raw, metric, side):
    return raw.get(metric, {}).get(side, {}).get("median")


def ratio(raw, metric):
    """How many times better Capstan is; none when a side lacks the figure."""
    rpc, ours = middle(raw, metric, "rpc"), middle(raw, metric, "capstan")
    if not rpc or not ours:
        return None
    more_is_better = raw[metric]["unit"] == "tok/s"
    return ours / rpc if more_is_better else rpc / ours


def bounds(raw):
    """Ours as a share of what two interleaved groups could reach at most by the peer's own figures."""
    found = {}
    for streams in STREAMS[1:]:
        bound, ours = bound_of(raw, streams), middle(raw, f"decode_b{streams}", "capstan")
        if bound and ours:
            found[f"b{streams}"] = round(ours / bound, 3)
    return found


def bound_of(raw, streams):
    """`max(seq(B), 2 × seq(B/2))`, where seq is the peer's total rate."""
    all_at_once, half = (middle(raw, f"decode_b{b}", "rpc") for b in (streams, streams // 2))
    return max(all_at_once, 2 * half) if all_at_once and half else None


def number(value):
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(report):
    """One Markdown table: a row a metric, three columns a model."""
    models = report["models"]
    heading = ["", *(cell for model in models for cell in (f"{model}: RPC", "Capstan", "ratio"))]
    lines = [row(heading), row(["---", *["---:"] * (len(heading) - 1)])]
    for metric, label in LABELS.items():
        cells = [label]
        for model in models.values():
            raw = model["raw"]
            better = ratio(raw, metric)
            cells += [number(middle(raw, metric, side)) for side in SIDES]
            cells.append("–" if better is None else f"**{better:.2f}**" if metric in RATIOS else f"{better:.2f}")
        lines += told(cells)
    for streams in STREAMS[1:]:
        cells = [f"bound for {streams} streams (tok/s), and Capstan's share of it"]
        for model in models.values():
            bound, share = bound_of(model["raw"], streams), model["bound"].get(f"b{streams}")
            cells += [number(bound), number(middle(model["raw"], f"decode_b{streams}", "capstan"))]
            cells.append("–" if share is None else f"{share:.0%}")
        lines += told(cells)
    return "\n".join(lines)


def told(cells):
    """A row, unless nothing of it was measured."""
    return [row(cells)] if set(cells[1:]) != {"–"} else []


def row(cells):
    return "| " + " | ".join(cells) + " |"


def footnotes(report):
    """What the table has no room for."""
    lines = []
    for name, model in report["models"].items():
        raw = model["raw"]
        lines += ubatch_footnotes(name, raw)
        lines += scores_footnote(name, raw)
        cached = middle(raw, "ready_worker_cache", "rpc")
        if cached:
            lines.append(f"{name}, RPC with the workers' disk cache (off by default): ready in {number(cached)} ms.")
        guessing = middle(raw, "decode_b1_guessing", "capstan")
        if guessing:
            plain = middle(raw, "decode_b1", "capstan")
            lines.append(
                f"{name}, Capstan with guessing on, on text it cannot guess: {number(guessing)} tok/s, "
                f"{guessing / plain:.0%} of off."
            )
        lines += edit_footnote(name, model["edits"])
        for side, processes in (("RPC", raw["peak_memory"]["rpc"]), ("Capstan", raw["peak_memory"]["capstan"])):
            told = ", ".join(f"{what.split(': ')[-1]} {mib:.0f}" for what, mib in processes["processes"].items())
            lines.append(f"{name}, peak memory of {side} (MiB): {told}.")
        lines += [f"{name}: {note}." for note in model["notes"]]
    return lines


def ubatch_footnotes(name, raw):
    """The peer's prefill with other ubatches than the table's, and what the ratio is against the fastest of all."""
    lines = []
    for length in (512, 2048):
        metric = f"prefill_{length}"
        others = {m.rpartition("_")[2]: middle(raw, m, "rpc") for m in raw if m.startswith(f"{metric}_ubatch_")}
        usual, ours = (middle(raw, metric, side) for side in SIDES)
        if others and usual and ours:
            told = ", ".join(f"{number(rate)} with {ubatch}" for ubatch, rate in others.items())
            best = ours / max(usual, *others.values())
            lines.append(
                f"{name}, RPC's prefill of {length} tokens with other ubatches (tok/s): {told}; against the fastest of "
                f"all Capstan's ratio is {best:.2f}."
            )
    return lines


def scores_footnote(name, raw):
    """The peer's decode without flash attention, and Capstan's ratios against it."""
    told = []
    for metric, label in LABELS.items():
        rate, ours = middle(raw, f"{metric}_scores", "rpc"), middle(raw, metric, "capstan")
        if rate and ours:
            told.append(f"{label.removeprefix('decode, ').removesuffix(' (tok/s)')} {number(rate)} ({ours / rate:.2f})")
    if not told:
        return []
    return [f"{name}, RPC's decode with flash attention off (tok/s, and Capstan's ratio to it): {'; '.join(told)}."]


def edit_footnote(name, edits):
    texts = {side: {e["round"]: e["text"] for e in edits if e["side"] == side} for side in SIDES}
    rounds = texts["rpc"].keys() & texts["capstan"].keys()
    if not rounds:
        return []
    same = sum(texts["rpc"][round_] == texts["capstan"][round_] for round_ in rounds)
    told = f"{name}, edit task: both sides gave the same text in {same} of {len(rounds)} rounds"
    guessed = [e for e in edits if e.get("drafted")]
    if guessed:
        drafted, accepted = (sum(e[key] for e in guessed) for key in ("drafted", "accepted"))
        told += f"; {accepted} of {drafted} guesses were right ({accepted / drafted:.0%})"
    return [told + "."]


def markdown(report):
    rounds = "1 round" if report["rounds"] == 1 else f"{report['rounds']} rounds"
    head = f"{report['date']}, {report['machine']}; `{report['command']}`, {rounds}."
    notes = "\n".join(f"- {line}" for line in footnotes(report))
    return f"{head}\n\n{table(report)}\n\n{notes}\n"
