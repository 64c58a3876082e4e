"""Pixels to faces with embeddings: the engine port, its ONNX and dlib kinds, and the packs of weights they run on."""
