"""The fused GEMMs of a flow block."""
