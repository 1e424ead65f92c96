"""Wire format and transports between verifier and prover."""
