"""A LightningCLI recipe, trained: its run folder, checkpoints, figures and dry run."""
