"""`fastris tune`: measuring, on a GPU, which path and which tiles are the faster ones."""
