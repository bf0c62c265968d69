"""CRIS's operators, one a file: the contract, the algebra behind it, and the plain-PyTorch path."""
