"""KV-Shield: secret permutations, so that keys and values in the prover's memory are scrambled."""
