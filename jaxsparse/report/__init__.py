"""Tables, plots and files for people: how sparse each parameter is, and how it went."""

from jaxsparse.report._by_layer import plot_errors as plot_errors
from jaxsparse.report._by_layer import plot_sparsity as plot_sparsity
from jaxsparse.report._curves import plot_sensitivity as plot_sensitivity
from jaxsparse.report._curves import plot_tradeoff as plot_tradeoff
from jaxsparse.report._formats import format_table as format_table
from jaxsparse.report._histograms import plot_weights as plot_weights
from jaxsparse.report._html import write_html as write_html
from jaxsparse.report._layers import layer_table as layer_table
from jaxsparse.report._layers import mean_of_known as mean_of_known
from jaxsparse.report._measure import table as table
from jaxsparse.report._plots import plot as plot
from jaxsparse.report._progress import Progress as Progress
from jaxsparse.report._progress import progress as progress
from jaxsparse.report._tables import Row as Row
from jaxsparse.report._tables import Table as Table

__all__ = [
    "Progress",
    "Row",
    "Table",
    "format_table",
    "layer_table",
    "mean_of_known",
    "plot",
    "plot_errors",
    "plot_sensitivity",
    "plot_sparsity",
    "plot_tradeoff",
    "plot_weights",
    "progress",
    "table",
    "write_html",
]
