"""VeriAttn as published: floating point, checked within calibrated tolerances. Apart from the exact verifier, and weaker."""
