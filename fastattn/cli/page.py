"""HTML pages that need nothing else: one style, plots as data."""

from __future__ import annotations

import base64
import html
import io
import platform

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastattn import __version__, _extension

__all__ = ["figure_html", "page", "plt"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem; border-bottom: 1px solid color-mix(in srgb,
currentColor 20%, transparent); }
img { max-width: 100%; background: white; border-radius: 8px; margin: 1rem 0; }
pre { overflow-x: auto; padding: 1rem; border-radius: 8px; background: color-mix(in srgb,
currentColor 8%, transparent); }
footer { opacity: .7; font-size: .9rem; margin-top: 2rem; }
"""


def figure_html(figure: plt.Figure, description: str) -> str:
    """The figure as an <img> with its data inside; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def page(title: str, body: str) -> str:
    """A whole page around ``body``, with what it was made with at the foot."""
    facts = (
        f"fastattn {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, CPU kernels: {_extension.cpu_isa() or 'none'}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{body}<footer>{facts}</footer></body></html>"
    )
