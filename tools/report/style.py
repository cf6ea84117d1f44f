"""How all plots look: one figure drawn twice, for light and for dark pages, as SVG."""

import os

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, told apart by all kinds of colour vision; the darkest and the palest follow the page.
LIGHT = {"ink": "#1f2328", "soft": "#59636e", "grid": "#d1d9e0", "page": "#ffffff",
         "colors": ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#59636e"]}
DARK = {"ink": "#e6edf3", "soft": "#9198a1", "grid": "#3d444d", "page": "#0d1117",
        "colors": ["#4aa8e0", "#f08a4b", "#2fc79a", "#e29ac4", "#e3b341", "#8fd0f5", "#9198a1"]}


def settings(theme):
    return {
        "svg.hashsalt": "kvlite", "svg.fonttype": "path", "font.size": 10, "font.family": "DejaVu Sans",
        "figure.facecolor": theme["page"], "axes.facecolor": theme["page"], "savefig.facecolor": theme["page"],
        "axes.edgecolor": theme["soft"], "axes.labelcolor": theme["ink"], "text.color": theme["ink"],
        "xtick.color": theme["soft"], "ytick.color": theme["soft"], "axes.titlecolor": theme["ink"],
        "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.grid": True, "grid.color": theme["grid"], "grid.linewidth": 0.6, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9,
        "axes.prop_cycle": plt.cycler(color=theme["colors"]), "lines.linewidth": 1.8,
    }


def draw(folder, name, plot, size=(8, 4), **data):
    """plot(figure, theme, **data) draws; writes folder/name.svg and folder/name-dark.svg."""
    for suffix, theme in (("", LIGHT), ("-dark", DARK)):
        with plt.rc_context(settings(theme)):
            figure = plt.figure(figsize=size, layout="constrained")
            plot(figure, theme, **data)
            figure.savefig(os.path.join(folder, f"{name}{suffix}.svg"), metadata={"Date": None})
            plt.close(figure)


def picture(folder, name, text):
    """The two as one picture that follows the reader's page."""
    return (f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.svg">'
            f'<img alt="{text}" src="{folder}/{name}.svg"></picture>')
