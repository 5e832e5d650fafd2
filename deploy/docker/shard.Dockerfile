# A shard alone:
#   docker build -f deploy/docker/shard.Dockerfile -t causeway-shard .
FROM docker.io/library/rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    CARGO_TARGET_DIR=/src/target cargo build --release --locked -p mesh-cloud --bin mesh-cloud && \
    mkdir /out && cp target/release/mesh-cloud /out/

# glibc and nothing else: no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /out/ /usr/local/bin/
# Edges, people's tools and other shards; edges in networks without UDP.
EXPOSE 7400/udp 7400/tcp
ENTRYPOINT ["mesh-cloud"]
