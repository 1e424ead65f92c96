"""The untrusted side: a separate process that computes and claims."""
