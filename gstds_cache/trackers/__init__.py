"""Experiment trackers: what a training run tells TensorBoard, Weights & Biases and MLflow."""
