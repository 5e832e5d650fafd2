# People's tool alone:
#   docker build -f deploy/docker/meshctl.Dockerfile -t causeway-meshctl .
FROM docker.io/library/rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    CARGO_TARGET_DIR=/src/target cargo build --release --locked -p meshctl --bin meshctl && \
    mkdir /out && cp target/release/meshctl /out/

# glibc and nothing else: no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /out/ /usr/local/bin/
ENTRYPOINT ["meshctl"]
