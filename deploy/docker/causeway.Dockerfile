# All four programs in one image, for the chart:
#   docker build -f deploy/docker/causeway.Dockerfile -t causeway .
FROM docker.io/library/rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    CARGO_TARGET_DIR=/src/target cargo build --release --locked \
      -p control -p mesh-cloud -p mesh-edge -p meshctl \
      --bin mesh-control --bin mesh-cloud --bin mesh-edge --bin meshctl && \
    mkdir /out && cd target/release && cp mesh-control mesh-cloud mesh-edge meshctl /out/

# glibc and nothing else: no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /out/ /usr/local/bin/
# What runs is said by whoever starts it: mesh-control, mesh-cloud, mesh-edge or meshctl.
CMD ["meshctl", "--help"]
