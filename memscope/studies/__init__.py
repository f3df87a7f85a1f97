"""Studies: tables that answer one question about a target over many simulations."""
