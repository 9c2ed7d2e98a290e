"""The report as a picture: total decode against streams, and every ratio."""
import pathlib
import sys

from measure import STREAMS
from report import LABELS, RATIOS, bound_of, middle

COLOURS = {"rpc": "#8a8f98", "capstan": "#1f6feb", "bound": "#d29922"}


def draw(report, folder):
    """Writes bench.svg and bench.png."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and ids do not change from run to run.
    matplotlib.rcParams.update({"svg.hashsalt": "capstan", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    models = report["models"]
    figure, axes = pyplot.subplots(len(models), 2, figsize=(11, 3.8 * len(models)), squeeze=False)
    for (name, model), (left, right) in zip(models.items(), axes):
        draw_decode(left, name, model["raw"])
        draw_ratios(right, name, model["ratios"])
    title = f"Capstan and llama.cpp RPC, two nodes × one core\n{report['machine']}, {report['date']}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    # Without the time of drawing, so that the same figures give the same file.
    figure.savefig(pathlib.Path(folder) / "bench.svg", metadata={"Date": None})
    figure.savefig(pathlib.Path(folder) / "bench.png", dpi=150)
    pyplot.close(figure)


def draw_decode(axes, name, raw):
    def line(values, label, colour, style):
        points = [(b, v) for b, v in values if v]
        if points:
            axes.plot(*zip(*points), style, color=colour, label=label)

    for side, label in (("rpc", "llama.cpp RPC"), ("capstan", "Capstan")):
        line([(b, middle(raw, f"decode_b{b}", side)) for b in STREAMS], label, COLOURS[side], "o-")
    line([(b, bound_of(raw, b)) for b in STREAMS[1:]], "bound: max(seq(B), 2·seq(B/2)) of RPC", COLOURS["bound"], "--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(STREAMS, [str(b) for b in STREAMS])
    axes.set_ylim(bottom=0)
    axes.set(title=f"{name}: total decode", xlabel="streams at once", ylabel="tokens/s")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def draw_ratios(axes, name, ratios):
    metrics = [metric for metric in RATIOS if metric in ratios][::-1]
    values = [ratios[metric] for metric in metrics]
    labels = [LABELS[metric].partition(" (")[0] for metric in metrics]
    bars = axes.barh(labels, values, color=[COLOURS["capstan"] if v >= 1 else COLOURS["bound"] for v in values])
    axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=3)
    axes.axvline(1, color=COLOURS["rpc"], linewidth=1, zorder=0)
    # A load that is ten times as fast would push the rest against the edge.
    others = [v for metric, v in zip(metrics, values) if metric != "ready"] or [1]
    axes.set_xlim(0, max(2.5, max(others) * 1.25))
    axes.set(title=f"{name}: times as good as RPC")


if __name__ == "__main__":
    import json

    source = pathlib.Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.parent)
