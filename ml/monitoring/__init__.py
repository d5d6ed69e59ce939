"""Watching a served model: do requests and new data still look like what it was trained on, and are its answers still right?

config.py       what a check is asked to do
check.py        one check from end to end
records.py      what the predictor logs, line by line; logged.py reads it back
reference.py    what the champion was trained on and how it answered then
new_data.py     what came under the model's prefix since
drift.py        all tests of one sample; sample_tests.py and word_tests.py are the tests
findings.py     corrects for the number of tests and asks for a size
live_metric.py  the primary metric on labels that came later
state.py        the repeat rule: an event only after several findings in a row
report.py       the page of a check; histograms.py and pictures.py draw for it
"""
