"""The codec as a gRPC service. `hourglass-server --help` for its flags."""
