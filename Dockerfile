# tollgate: one binary in an image without a shell, run by nobody in particular.
#
#   docker build -t tollgate .

FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/target \
    CARGO_TARGET_DIR=/target cargo build --release --locked -p tollgate \
    && cp /target/release/tollgate /usr/local/bin/tollgate \
    && mkdir /state

# glibc and the certificates of public authorities, nothing else.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /usr/local/bin/tollgate /usr/local/bin/tollgate
# What is kept over a restart: a volume that its user may write to. Everything else may be read-only.
COPY --from=build --chown=nonroot:nonroot /state /var/lib/tollgate
WORKDIR /var/lib/tollgate
VOLUME /var/lib/tollgate
USER nonroot:nonroot
EXPOSE 8080 8081
# Asks /readyz where the configuration says the admin listener is: not ready once it is told to end.
HEALTHCHECK --interval=5s --timeout=4s --start-period=5s --retries=3 CMD ["/usr/local/bin/tollgate", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/tollgate"]
CMD ["serve"]
