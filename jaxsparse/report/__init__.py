"""Tables, plots and files for people: how sparse each parameter is, and how it went."""

from jaxsparse.report._html import write_html as write_html
from jaxsparse.report._layers import layer_table as layer_table
from jaxsparse.report._layers import mean_of_known as mean_of_known
from jaxsparse.report._measure import table as table
from jaxsparse.report._plots import plot as plot
from jaxsparse.report._progress import Progress as Progress
from jaxsparse.report._progress import progress as progress
from jaxsparse.report._tables import Row as Row
from jaxsparse.report._tables import Table as Table
