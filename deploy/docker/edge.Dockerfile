# An edge alone, as one static program:
#   docker build -f deploy/docker/edge.Dockerfile -t causeway-edge .
FROM docker.io/library/rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    target=$(rustc -vV | sed -n 's/^host: //p') && \
    CARGO_TARGET_DIR=/src/target RUSTFLAGS='-C target-feature=+crt-static' \
      cargo build --release --locked -p mesh-edge --bin mesh-edge --target "$target" && \
    mkdir /out && cp "target/$target/release/mesh-edge" /out/

# Certificates of nobody, users, time zones: what a static program may ask for. It runs as root, without capabilities,
# because its key lies on the node (deploy/helm/causeway/templates/edge.yaml).
FROM gcr.io/distroless/static-debian12
COPY --from=build /out/ /usr/local/bin/
ENTRYPOINT ["mesh-edge"]
