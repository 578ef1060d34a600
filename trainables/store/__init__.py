"""What is kept on disk and in MLflow: files, checkpoints, runs, packaged models."""
