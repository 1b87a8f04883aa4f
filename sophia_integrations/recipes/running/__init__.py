"""A checked recipe to a trained model: ``train.py`` is the run, ``folder.py`` the folder that it fills."""
