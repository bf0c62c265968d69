"""Questions of their own: looking once, the data loader, float16 sums, what training parts add."""
