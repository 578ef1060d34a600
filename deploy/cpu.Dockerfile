# A machine without a GPU: docker build -f deploy/cpu.Dockerfile -t robustness-grid-cpu .
# The newest packages that pyproject.toml allows, and none of the CUDA libraries of torch.
FROM python:3.11-slim
WORKDIR /robustness-grid
COPY . .
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend cpu --editable '.[test]'
ENV RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
CMD ["robustness-grid", "--help"]
