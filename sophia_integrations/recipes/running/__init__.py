"""A checked recipe to a trained model: ``train.py`` is the call, ``run.py`` the run, ``folder.py`` what it fills."""
