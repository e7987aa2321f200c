# The program with CUDA's libraries. From the root of the repository:
#
#   docker build -t lowrank-compress .
#   docker run --rm --gpus all -v "$PWD:/work" lowrank-compress --budget 10B --model mixtral --out mixtral-36b
FROM rust:1.90-bookworm AS build
WORKDIR /source
COPY Cargo.toml Cargo.lock ./
COPY crates crates
COPY xtask xtask
COPY tests tests
RUN cargo install --locked --path crates/lowrank-cli --root /installed

# The runtime image has cuBLAS, cuSOLVER and nvrtc in /usr/local/cuda/lib64, where the program looks for them.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
COPY --from=build /installed/bin/lowrank-compress /usr/local/bin/
WORKDIR /work
ENTRYPOINT ["lowrank-compress"]
