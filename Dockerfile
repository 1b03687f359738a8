# docker build -t nanodoge .                                                          a CPU, torch of 0.2 GB
# docker build -t nanodoge --build-arg TORCH_BACKEND=cu128 .                          a GPU: any --torch-backend of uv
# docker run -it -v $PWD/out:/nanodoge/out nanodoge                                   the first run
# docker run -it -v $PWD/out:/nanodoge/out -p 8000:8000 nanodoge python serve.py out/stories --host=0.0.0.0
FROM python:3.13-slim
ARG TORCH_BACKEND=cpu
WORKDIR /nanodoge
# g++ compiles the C++ step, by which a CPU writes one text four to six times as fast as by torch.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv
COPY pyproject.toml requirements.txt ./
COPY nanodoge nanodoge
COPY *.py ./
RUN uv pip install --system --no-cache --torch-backend=${TORCH_BACKEND} -r requirements.txt -e .[serve]
COPY . .
CMD ["python", "train.py"]
