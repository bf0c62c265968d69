"""The compile gate: what training and evaluation launch, built for every card without a GPU, and its cost there."""
