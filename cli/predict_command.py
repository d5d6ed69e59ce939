"""`millstream predict`: score a file of rows with the champion, in this process, without asking the server row by row."""

BATCH_ROWS = 32
