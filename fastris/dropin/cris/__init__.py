"""CRIS's parts in strangers' models: what they are found by, and what of ours then runs."""
