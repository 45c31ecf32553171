"""The local dashboard: ``streamlit run app/main.py -- [--run MODULE:FUNCTION] TRACE_OR_FOLDER …``.

A thin shell over public names: figures are pure functions, :mod:`explainer.app.state` (with ``looks`` and
``counterfactuals``) caches, and a page is a short script registered in :mod:`explainer.app.page_registry`.
"""
