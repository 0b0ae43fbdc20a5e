"""Published trainings as bundles of schedules and settings."""

from jaxsparse.recipes._obert import Recipe as Recipe
from jaxsparse.recipes._obert import obert_downstream as obert_downstream
from jaxsparse.recipes._obert import obert_upstream as obert_upstream
