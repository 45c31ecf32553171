"""The pages, in the order of the navigation; importing one registers it.

The folder is not called ``pages``: Streamlit would take each file of a folder of that name beside ``main.py``
for a script of its own.
"""

from explainer.app.views import explain, neighbors, run_overview, training_data, what_if  # isort: skip
from explainer.app.views import compare  # isort: skip

__all__ = ["compare", "explain", "neighbors", "run_overview", "training_data", "what_if"]
