"""Pictures of a training: norms, lambda and lr over steps, the penalty, update ratios, schedules, histograms.

Each `plot_...` function takes plain data and returns a `matplotlib.figure.Figure`, ready for `figure.savefig("x.png")`
or a logger; none of them touches pyplot. `pip install "lightning_l2[plots]"` brings matplotlib.
"""

from lightning_l2.plots.curves import plot_norms, plot_penalty, plot_update_ratios
from lightning_l2.plots.heatmap import plot_norm_heatmap
from lightning_l2.plots.histograms import plot_histograms
from lightning_l2.plots.history import History, read_history
from lightning_l2.plots.preview import preview
from lightning_l2.plots.schedule import plot_schedule

__all__ = [
    "History",
    "plot_histograms",
    "plot_norm_heatmap",
    "plot_norms",
    "plot_penalty",
    "plot_schedule",
    "plot_update_ratios",
    "preview",
    "read_history",
]


def __dir__() -> list[str]:
    return __all__
