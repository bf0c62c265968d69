"""Models as programs for products: ONNX for any runtime, or PyTorch's exported programs."""
