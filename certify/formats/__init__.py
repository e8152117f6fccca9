"""File formats of the verification community: ONNX networks and VNN-LIB properties."""
