"""A checked recipe to a trained model in a run folder: the framework's own objects, its own fit, and our callback.

Read in this order: ``train.py`` (one call of ``sophia train``), ``resolved.py`` (what it runs), ``run_folder.py``
(where), then for each framework a runner and a callback that writes into the folder: ``trainer_run.py`` and
``trainer_callback.py``, ``lightning_run.py`` and ``lightning_callback.py``.
"""
