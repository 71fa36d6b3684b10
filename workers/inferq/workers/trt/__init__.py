"""TensorRT: builds ONNX files into plans, keeps the plans, and says what may be run of them."""
