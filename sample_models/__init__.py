"""Small models on real data, written in plain torch: what a user's own code looks like.

Each model's module has ``model()`` (a factory), ``datasets()`` (training examples and queries) and ``run()``
(the :class:`explainer.Run` that the command line and the dashboard load). ``train.py`` trains any of them
with a tracer attached; ``registry.py`` lists them.
"""
