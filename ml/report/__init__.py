"""What people read of a run: the table on the terminal and the HTML report, both drawn from a `PipelineOutcome`."""
