"""How small a run in miniature is."""

STEPS, INTERVAL = 8, 3  # estimates at steps 1, 4 and 7
ROWS, LENGTH, LONGEST = 4, 64, 256
