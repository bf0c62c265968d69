"""The systems: one package each, beside what all of them must offer and the names they go by."""
