"""`--smoke`: any recipe in two minutes on a CPU, with a miniature of its model and data."""
