"""vLLM: the client's side, and what runs inside its workers (`worker`, `reload`, `cpu`)."""
