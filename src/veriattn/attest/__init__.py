"""Attestation: keys bound to a quote, receipts signed with them, and the verification of both."""
