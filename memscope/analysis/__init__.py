"""Functions of traces: ledger, effects (Table 1), grid (Table 2), differences, limits, agreement and notes."""
