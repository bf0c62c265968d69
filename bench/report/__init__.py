"""Tables, charts, comparisons and the measured blocks of the documentation."""
